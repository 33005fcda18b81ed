"""Running statistics of a batch that is cut: updated once as by the whole batch, or frozen."""

import functools
import operator
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from statistics import median

import pytest
import torch
import torch.nn.functional as F
from black_box import BlackBox
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import assert_exact, sgd, twin
from states import fingerprint, identities
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from autobatch import Accumulator, InexactStepError, StepResult
from autobatch.training.batchnorm import pooling
from autobatch.training.batchnorm.modes import (
    check_batch_norm,
    frozen_statistics,
    normalises_by_batch,
    updating_layers,
)
from autobatch.training.batchnorm.pooling import StatisticsPool, pooled_statistics
from autobatch.training.batchnorm.statistics import RunningStatistics


def rows(examples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, 4, 3, 3, generator=generator, dtype=torch.float64)
    drift = torch.linspace(-3, 3, examples, dtype=torch.float64)  # Micro-batches differ in mean.
    return x + drift[:, None, None, None], torch.randint(0, 3, (examples,), generator=generator)


class First(nn.Module):
    """BatchNorm on the input itself: its inputs are the undivided ones."""

    def __init__(self, momentum: float | None = 0.1, calls: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm2d(4, momentum=momentum)
        self.head = nn.Linear(4, 3)
        self.calls = calls
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros((), dtype=x.dtype)
        for call in range(self.calls):
            total = total + self.norm(x * (call + 1) + call)
        scores: Tensor = self.head(total.mean((2, 3)))
        return scores


def statistics(model: nn.Module) -> list[Tensor]:
    return [
        tensor.clone()
        for module in model.modules()
        if isinstance(module, _BatchNorm)
        for tensor in (module.running_mean, module.running_var, module.num_batches_tracked)
        if tensor is not None
    ]


def step(model: nn.Module, micro_batch: int | None, examples: int = 11) -> StepResult:
    return Accumulator(model, sgd(model), micro_batch=micro_batch).step(rows(examples))


@settings(deadline=None, max_examples=40)
@given(
    micro_batch=st.integers(2, 11),
    momentum=st.sampled_from([0.1, 0.5, 1.0, None]),
    calls=st.integers(1, 3),
    windows=st.integers(1, 3),
)
def test_a_layer_with_the_undivided_inputs_is_updated_as_by_the_undivided_batch(
    micro_batch: int, momentum: float | None, calls: int, windows: int
) -> None:
    ours, whole = First(momentum, calls), First(momentum, calls)
    accumulator = Accumulator(ours, sgd(ours), micro_batch=micro_batch)
    for seed in range(windows):
        accumulator.step(rows(11, seed))
        whole(rows(11, seed)[0])
    assert_exact(statistics(ours), statistics(whole))


def test_the_full_momentum_for_each_micro_batch_goes_elsewhere() -> None:
    naive, whole = First(), First()
    for part in rows(11)[0].split(4):
        naive(part)
    whole(rows(11)[0])
    with pytest.raises(AssertionError, match="not close"):
        assert_exact(statistics(naive), statistics(whole))


def test_averaging_variances_forgets_the_part_between_micro_batches() -> None:
    variances = torch.stack([part.var((0, 2, 3)) for part in rows(11)[0].split(4)]).mean(0)
    with pytest.raises(AssertionError, match="not close"):
        assert_exact(variances, rows(11)[0].var((0, 2, 3)))


def test_one_micro_batch_is_the_layer_s_own_business_bit_for_bit() -> None:
    ours, whole = First(), First()
    step(ours, None)
    whole(rows(11)[0])
    torch.testing.assert_close(statistics(ours), statistics(whole), rtol=0, atol=0)


class Own(nn.BatchNorm1d):
    """A subclass with a forward pass of its own, as libraries of models have them."""

    def forward(self, input: Tensor) -> Tensor:  # Torch's name.
        return super().forward(input)


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, Own])
def test_momentum_and_forward_are_put_back_also_after_an_error(kind: type[nn.BatchNorm1d]) -> None:
    model = kind(4)
    before = fingerprint(model)

    def fail() -> None:
        with pooled_statistics(RunningStatistics([model])):
            assert "forward" in vars(model)
            assert model.momentum == (1.0 if kind is Own else 0.1)
            raise KeyError("mine")

    with pytest.raises(KeyError):
        fail()
    assert fingerprint(model) == before


def test_an_error_while_statistics_are_applied_leaves_the_layers_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> Tensor:
        raise KeyError("mine")

    monkeypatch.setattr(pooling, "_updated", fail)
    model = First()
    before = fingerprint(model)
    with pytest.raises(KeyError):
        pool(model, rows(8)[0].split(4))
    assert fingerprint(model) == before


def test_memory_running_out_leaves_no_mark_on_the_statistics() -> None:
    ours, whole = BlackBox(3), BlackBox(100)
    x = torch.randn(11, 1, 5, 5)
    y = torch.randint(0, 3, (11,))
    for model, micro_batch in ((ours, None), (whole, 3)):
        torch.manual_seed(1)
        Accumulator(model, sgd(model), micro_batch=micro_batch).step((x, y))
    assert_exact(list(ours.buffers()), list(whole.buffers()))


def test_frozen_and_untracked_layers_are_left_alone() -> None:
    model = nn.Sequential(
        nn.BatchNorm2d(4).eval(),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.Flatten(),
        nn.Linear(36, 3),
    ).double()
    before = [buffer.clone() for buffer in model.buffers()]
    step(model, 4)
    torch.testing.assert_close(list(model.buffers()), before, rtol=0, atol=0)


@pytest.mark.usefixtures("unasked")
def test_a_layer_that_some_micro_batches_pass_by_counts_those_that_met_it() -> None:
    class Sometimes(First):
        def forward(self, x: Tensor) -> Tensor:
            normed = self.norm(x) if x[0].mean() < 1 else x
            scores: Tensor = self.head(normed.mean((2, 3)))
            return scores

    model, reference = Sometimes(), First()
    x, _ = rows(12)
    met = torch.cat([part for part in x.split(4) if part[0].mean() < 1])
    assert 0 < len(met) < 12
    step(model, 4, examples=12)
    reference(met)
    assert_exact(statistics(model), statistics(reference))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_activations_are_not_counted_twice(reentrant: bool) -> None:
    class Checkpointed(First):
        def forward(self, x: Tensor) -> Tensor:
            run = functools.partial(checkpoint, self.norm, use_reentrant=reentrant)
            scores: Tensor = self.head(run(x.requires_grad_()).mean((2, 3)))
            return scores

    ours, whole = Checkpointed(), First()
    step(ours, 4)
    whole(rows(11)[0])
    assert_exact(statistics(ours), statistics(whole))


def test_gradients_are_those_of_micro_batches_normalised_by_themselves() -> None:
    ours, slow = First(), twin(First())
    step(ours, 4)
    x, y = rows(11)
    for part, target in zip(x.split([4, 4, 3]), y.split([4, 4, 3]), strict=True):
        nn.functional.cross_entropy(slow(part), target, reduction="sum").div(11).backward()
    sgd(slow).step()
    assert_exact(list(ours.parameters()), list(slow.parameters()))


def pooled_over(
    model: nn.Module, micro_batches: int
) -> AbstractContextManager[StatisticsPool | None]:
    """What a window of so many does with the model's statistics."""
    layers = updating_layers(model.modules())
    return (
        pooled_statistics(RunningStatistics(layers))
        if micro_batches > 1 and layers
        else nullcontext()
    )


def pool(model: nn.Module, parts: Sequence[Tensor], context: Sequence[int] = ()) -> list[Tensor]:
    """The statistics after a logical batch; the last micro-batches may have context examples."""
    every = [0] * (len(parts) - len(context)) + list(context)
    with pooled_over(model, len(parts)) as pooled:
        for part, count in zip(parts, every, strict=True):
            if pooled is not None:
                pooled.begin(context=count)
            model(part)
            if pooled is not None:
                pooled.end()
    return statistics(model)


def undivided(model: nn.Module, x: Tensor) -> list[Tensor]:
    model(x)
    return statistics(model)


def drifting(examples: int, shape: tuple[int, ...]) -> Tensor:
    x = torch.randn(examples, *shape, generator=torch.Generator().manual_seed(0)).double()
    return x + torch.linspace(-3, 3, examples).double().view(-1, *[1] * len(shape))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm1d, (4,)),
        (nn.BatchNorm1d, (4, 3)),
        (nn.BatchNorm2d, (4, 3, 2)),
        (nn.BatchNorm3d, (4, 3, 2, 2)),
    ],
)
def test_context_examples_are_not_counted(
    layer: Callable[[int], nn.Module], shape: tuple[int, ...]
) -> None:
    x = drifting(5, shape)
    parts = [x[:2], x[2:4], x[3:5]]  # The last one's neighbour comes with it.
    whole = undivided(layer(4).double(), x)
    assert_exact(pool(layer(4).double(), parts, context=[1]), whole)
    with pytest.raises(AssertionError, match="not close"):
        assert_exact(pool(layer(4).double(), parts), whole)


def test_context_examples_are_not_counted_in_any_call_nor_where_an_example_has_several_rows() -> (
    None
):
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4, dtype=torch.float64)

        def forward(self, x: Tensor) -> None:
            for call in (1, 2, 3):
                self.norm((x * call).reshape(-1, 4))

    x = drifting(5, (3, 4))
    parts = [x[:2], x[2:4], x[3:5]]
    assert_exact(pool(Rows(), parts, context=[1]), undivided(Rows(), x))


def test_a_window_that_saw_one_value_updates_the_mean_and_leaves_the_variance() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(1, momentum=0.5)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.norm(x) if x.sum() > 10 else x
            return result

    parts = [torch.tensor([[0.0], [1.0]]), torch.tensor([[9.0], [4.0]])]
    mean, variance, batches = pool(Last(), parts, context=[1])
    assert (mean.item(), variance.item(), batches.item()) == (2.0, 1.0, 1)


def test_a_call_on_no_values_adds_none_but_is_a_batch_as_torch_has_it() -> None:
    def model() -> nn.Module:
        layer = nn.BatchNorm1d(4).double()
        assert layer.running_mean is not None
        layer.running_mean.fill_(5)
        return layer

    x = drifting(5, (4,))
    assert_exact(pool(model(), [x[:0], x[:2], x[:0], x[2:]]), undivided(model(), x))
    assert_exact(pool(model(), [x[:0], x[:0]]), undivided(model(), x[:0]))


def test_calls_that_some_micro_batches_do_not_make_are_pooled_over_those_that_do() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4, dtype=torch.float64)
            self.after = nn.BatchNorm1d(4, dtype=torch.float64)

        def forward(self, x: Tensor) -> None:
            self.after(self.norm(x) * 0 + x)
            if x.mean() > -1:
                self.norm(x * 2)

    x = drifting(9, (4,))
    model, reference = Twice(), Twice()
    assert float(x[:3].mean()) < -1 < float(x[3:6].mean())
    pool(model, x.split(3))
    reference.norm(x)
    reference.norm(x[3:] * 2)
    reference.after(x)
    assert_exact(statistics(model), statistics(reference))


@pytest.mark.parametrize("momentum", [0.0, 0.3, None])
@pytest.mark.parametrize("affine", [True, False])
def test_a_layer_that_counts_no_batches_is_updated_as_by_torch(
    momentum: float | None, affine: bool
) -> None:
    def model() -> nn.Module:
        layer = nn.BatchNorm1d(4, momentum=momentum, affine=affine, dtype=torch.float64)
        layer.num_batches_tracked = None
        return layer

    x = drifting(5, (4,))
    assert_exact(pool(model(), x.split(2)[:2]), undivided(model(), x[:4]))


class Doubled(nn.Module):
    """Of a weight, as torch.nn.utils.parametrize has it."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def parametrized() -> nn.Module:
    layer = nn.BatchNorm2d(4)
    nn.utils.parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.BatchNorm1d(4), (4,)),
        (lambda: nn.BatchNorm1d(4), (4, 3)),
        (lambda: nn.BatchNorm2d(4, eps=0.1), (4, 3, 2)),
        (lambda: nn.BatchNorm2d(4, affine=False, momentum=None), (4, 3, 2)),
        (lambda: nn.BatchNorm3d(4, dtype=torch.bfloat16), (4, 3, 2, 2)),
        (lambda: Own(4), (4, 3)),
        (parametrized, (4, 3, 2)),
    ],
)
def test_a_layer_in_pieces_gives_what_it_gives_alone_bit_for_bit(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    """Its own forward pass is not what runs there."""
    layer, alone = make(), make()
    dtype = torch.bfloat16 if "bfloat16" in str(layer.state_dict()) else torch.float32
    with pooled_over(layer, 2) as pooled:
        assert pooled is not None
        for part in drifting(6, shape).to(dtype).split(3):
            mine, other = part.clone().requires_grad_(), part.clone().requires_grad_()
            pooled.begin()
            output, expected = layer(mine), alone(other)
            pooled.end()
            output.square().sum().backward()
            expected.square().sum().backward()
            torch.testing.assert_close((output, mine.grad), (expected, other.grad), rtol=0, atol=0)
    gradients = [[parameter.grad for parameter in model.parameters()] for model in (layer, alone)]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("x", "message"),
    [((1, 4), "more than 1 value per channel"), ((2, 4, 1, 1), "expected 2D or 3D")],
)
def test_a_layer_in_pieces_refuses_what_it_refuses_alone(x: tuple[int, ...], message: str) -> None:
    layer = nn.BatchNorm1d(4)
    before = fingerprint(layer)
    with pytest.raises(ValueError, match=message):
        pool(layer, [torch.ones(2, 4), torch.ones(x)])
    assert fingerprint(layer) == before


def test_a_call_in_evaluation_mode_uses_the_layer_s_own_statistics_and_does_not_count() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4, dtype=torch.float64)
            self.seen: list[Tensor] = []

        def forward(self, x: Tensor) -> None:
            self.norm.eval()
            self.seen.append(self.norm(x))
            self.norm.train()
            self.norm(x)
            self.norm.track_running_stats = False  # As virtual adversarial training does.
            self.norm(x * 7)
            self.norm.track_running_stats = True

    x = drifting(6, (4,))
    model, whole = Both(), Both()
    assert_exact(pool(model, x.split(2)), undivided(whole, x))
    assert_exact([torch.cat(model.seen)], whole.seen)


def test_a_layer_that_no_longer_tracks_keeps_its_statistics() -> None:
    layer = nn.BatchNorm1d(4, dtype=torch.float64)
    layer.track_running_stats = False
    before = statistics(layer)
    assert_exact(pool(layer, drifting(6, (4,)).split(2)), before)
    assert updating_layers([layer]) == []
    assert normalises_by_batch([layer])


def test_a_layer_may_be_given_its_input_by_name_and_hooks_may_change_it() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4, dtype=torch.float64)

        def forward(self, x: Tensor) -> None:
            self.norm(input=x)

    x = drifting(5, (4,))
    parts = [x[:2], x[2:4], x[3:5]]
    assert_exact(pool(Named(), parts, context=[1]), undivided(Named(), x))

    def changed() -> nn.Module:
        layer = nn.BatchNorm1d(4, dtype=torch.float64)
        layer.register_forward_pre_hook(
            lambda _, inputs: torch.cat([inputs[0] + 1, inputs[0]], 1).view(-1, 4)
        )
        return layer

    assert_exact(pool(changed(), parts, context=[1]), undivided(changed(), x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_statistics_in_16_bits_are_pooled_in_32(dtype: torch.dtype) -> None:
    x = (drifting(16, (4, 64, 64)) * 4).to(dtype)  # The sum of squares is beyond float16.
    pooled = pool(nn.BatchNorm2d(4, dtype=dtype), x.split(3))
    whole = undivided(nn.BatchNorm2d(4, dtype=dtype), x)
    torch.testing.assert_close(pooled, whole, rtol=2 * torch.finfo(dtype).eps, atol=2e-3)


def test_buffers_that_a_subclass_adds_are_not_touched() -> None:
    class Scaled(nn.BatchNorm1d):
        def __init__(self) -> None:
            super().__init__(4, dtype=torch.float64)
            self.register_buffer("scale", torch.tensor(3.0, dtype=torch.float64))

        def forward(self, input: Tensor) -> Tensor:
            assert isinstance(self.scale, Tensor)
            result: Tensor = super().forward(input) * self.scale
            assert result.abs().max() > 2  # Scaled by what is its own.
            return result

    x = drifting(5, (4,))
    assert_exact(pool(Scaled(), x.split(3)), undivided(Scaled(), x))


def test_after_an_error_the_layers_are_what_they_were_with_the_same_tensors() -> None:
    model = First()
    before, objects = fingerprint(model), identities(model)

    def fail() -> None:
        with pooled_statistics(RunningStatistics([model.norm])) as pooled:
            pooled.begin()
            model(rows(4)[0])
            pooled.end()
            model.norm.eval()  # It stays so: the mode is the caller's.
            model(rows(4)[0])
            model.norm.train()
            raise KeyError("mine")

    with pytest.raises(KeyError):
        fail()
    assert fingerprint(model) == before
    assert identities(model) == objects


class Deep(nn.Module):
    """One layer of each kind, one of them on what another gave."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.BatchNorm2d(4)
        self.second = nn.BatchNorm1d(4)
        self.third = nn.BatchNorm3d(2)
        self.fourth = nn.SyncBatchNorm(4)
        self.head = nn.Linear(4, 3)
        self.double()
        for layer in (self.first, self.second, self.third, self.fourth):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.running_mean.normal_()
            layer.running_var.uniform_(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.third(x.view(-1, 2, 2, 3, 3)).view(-1, 4, 9)
        scores: Tensor = self.head(self.fourth(self.second(x)).tanh().sum(2))
        return scores


@given(micro_batch=st.integers(1, 11), seed=st.integers(0, 9))
def test_with_frozen_statistics_any_split_is_the_undivided_step(
    micro_batch: int, seed: int
) -> None:
    ours, whole = Deep(), Deep()
    before = statistics(ours)
    x, y = rows(11, seed)
    with frozen_statistics(ours):
        result = Accumulator(ours, sgd(ours), micro_batch=micro_batch).step((x, y))
    for layer in (whole.first, whole.second, whole.third, whole.fourth):
        layer.eval()
    loss = nn.functional.cross_entropy(whole(x), y)
    loss.backward()
    optimizer = sgd(whole)
    optimizer.step()
    assert result.loss == pytest.approx(loss.item(), rel=1e-12)
    assert_exact(list(ours.parameters()), list(whole.parameters()))
    torch.testing.assert_close(statistics(ours), before, rtol=0, atol=0)
    assert not torch.equal(ours.first.weight, torch.ones(4).double()), "the weights train"


def test_without_freezing_a_split_is_another_step() -> None:
    ours, whole = First(), First()
    step(ours, 4)
    step(whole, None)
    with pytest.raises(AssertionError, match="not close"):
        assert_exact(list(ours.parameters()), list(whole.parameters()))


def test_freezing_leaves_no_trace_whatever_happens() -> None:
    class Nested(nn.BatchNorm2d):
        """Like timm's, with layers of its own."""

        def __init__(self) -> None:
            super().__init__(4)
            self.inside = nn.Dropout()

    norm = Nested()
    model = nn.ModuleList([norm, nn.BatchNorm2d(4).eval(), nn.InstanceNorm2d(4, affine=True)])
    before, objects = fingerprint(model), identities(model)

    def fail() -> None:
        with frozen_statistics(model):
            assert [module.training for module in model.modules()] == [
                True,
                False,
                True,
                False,
                True,
            ]
            assert not normalises_by_batch(model.modules())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert fingerprint(model) == before
    assert identities(model) == objects


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_without_statistics_cannot_be_frozen_and_is_named(training: bool) -> None:
    norm = nn.BatchNorm2d(4, track_running_stats=False).train(training)
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Sequential(norm))
    before = fingerprint(model)
    message = r"BatchNorm2d '1\.0' .*track_running_stats"
    with pytest.raises(ValueError, match=message), frozen_statistics(model):
        pass
    assert fingerprint(model) == before


@pytest.mark.parametrize("mode", ["micro", "frozen", "refuse"])
def test_the_three_modes_are_taken(mode: str) -> None:
    assert check_batch_norm(mode) == mode


@pytest.mark.parametrize("mode", ["Frozen", "", None, True, 3])
def test_another_mode_is_named_with_the_choices(mode: object) -> None:
    with pytest.raises(ValueError, match="'micro', 'frozen', 'refuse'") as refused:
        check_batch_norm(mode)
    assert repr(mode) in str(refused.value)


class ByHand(nn.Module):
    """Calls its layer past the layer's hooks, and, optionally, past the layer itself."""

    def __init__(self, *, past_itself: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5).double()
        self.forward_of = nn.BatchNorm1d.forward if past_itself else lambda norm, x: norm.forward(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_of(self.norm, x)


def test_a_layer_whose_forward_is_called_by_hand_is_pooled_like_any_other() -> None:
    x = drifting(8, (5,))
    ours, whole = ByHand(past_itself=False), ByHand(past_itself=False)
    assert_exact(pool(ours, x.split(3)), undivided(whole, x))


def test_untracked_updates_of_statistics_are_refused_in_a_cut_batch() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(ByHand(past_itself=True), nn.Linear(5, 3).double())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = torch.randn(8, 5, dtype=torch.float64), torch.randint(0, 3, (8,))
    Accumulator(model, optimizer).step(batch)
    before = fingerprint(model)
    with pytest.raises(InexactStepError, match="not tracked"):
        Accumulator(model, optimizer, micro_batch=4).step(batch)
    assert fingerprint(model) == before


class Rebinding(nn.BatchNorm1d):
    """As torch had it once, and copies have it still: a new number of batches for each call."""

    new_statistics = False

    def forward(self, input: Tensor) -> Tensor:  # Torch's name.
        assert self.num_batches_tracked is not None
        self.num_batches_tracked = self.num_batches_tracked + 1
        share = self.momentum
        if share is None:
            share = 1 / float(self.num_batches_tracked)
        if self.new_statistics:
            assert self.running_mean is not None
            self.running_mean = self.running_mean.clone()
        mean, variance = self.running_mean, self.running_var
        return F.batch_norm(input, mean, variance, training=True, momentum=share)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_layer_that_binds_a_new_number_for_each_call_is_pooled(momentum: float | None) -> None:
    x = drifting(8, (5,))
    ours, whole = (Rebinding(5, momentum=momentum).double() for _ in range(2))
    for _ in range(2):
        own = list(ours.buffers())
        assert_exact(pool(ours, x.split(3)), undivided(whole, x))
        assert all(map(operator.is_, ours.buffers(), own))


class Ghost(nn.BatchNorm1d):
    """Two calls that look like one."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.cat([super(Ghost, self).forward(half) for half in input.chunk(2)])


@pytest.mark.parametrize("kind", ["ghost", "new statistics", "by hand as well"])
def test_what_only_looks_like_a_call_is_refused_and_leaves_no_trace(kind: str) -> None:
    norm = (Ghost if kind == "ghost" else Rebinding if "new" in kind else nn.BatchNorm1d)(5)
    if isinstance(norm, Rebinding):
        norm.new_statistics = True
    model = Twice(norm.double(), by_hand="hand" in kind)
    before, own = fingerprint(model), list(model.buffers())
    with pytest.raises(InexactStepError, match="not tracked"):
        pool(model, drifting(8, (5,)).split(4))
    assert fingerprint(model) == before
    assert all(map(operator.is_, model.buffers(), own))


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, Own])
def test_a_hidden_call_in_the_last_micro_batch_alone_is_refused(kind: type[nn.BatchNorm1d]) -> None:
    model = Twice(kind(5).double(), by_hand=False)
    before = fingerprint(model)

    def last_by_hand() -> None:
        with pooled_over(model, 3) as pooled:
            assert pooled is not None
            for place, part in enumerate(drifting(9, (5,)).split(3)):
                model.by_hand = place == 2
                pooled.begin()
                model(part)
                pooled.end()

    with pytest.raises(InexactStepError, match="not tracked"):
        last_by_hand()
    model.by_hand = False
    assert fingerprint(model) == before


class Twice(nn.Module):
    """Calls its layer, and perhaps its class's forward too."""

    def __init__(self, norm: nn.BatchNorm1d, *, by_hand: bool) -> None:
        super().__init__()
        self.norm, self.by_hand = norm, by_hand

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.norm(x)
        return outputs + nn.BatchNorm1d.forward(self.norm, x) if self.by_hand else outputs


def test_a_call_with_others_buffers_is_not_the_layer_s_own() -> None:
    """functional_call passes other buffers; the layer keeps its own unchanged."""

    class Lent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(5).double()

        def forward(self, x: Tensor) -> Tensor:
            copies = {name: buffer.clone() for name, buffer in self.norm.named_buffers()}
            other: Tensor = torch.func.functional_call(self.norm, copies, (2 * x,))
            outputs: Tensor = self.norm(x)
            return outputs + other

    x = drifting(8, (5,))
    assert_exact(pool(Lent(), x.split(3)), undivided(Lent(), x))


def test_the_table_of_how_far_micro_batches_are_is_what_comes_out() -> None:
    """docs/exactness.md, relative, median of 20 seeds: rounded there to two digits."""
    rows: dict[str, list[list[float]]] = {"pooled": [], "naive": [], "rescaled": []}
    for seed in range(20):
        torch.manual_seed(seed)
        base = nn.Sequential(
            nn.BatchNorm1d(8), nn.Linear(8, 16), nn.ReLU(), nn.BatchNorm1d(16), nn.Linear(16, 4)
        ).double()
        x, y = torch.randn(16, 8).double() * 2 + 1, torch.randint(0, 4, (16,))
        whole = twin(base)
        assert isinstance(whole, nn.Sequential)
        expected = far_run(whole, [(x, y)], pooled=False)
        for name, found in rows.items():
            model = twin(base)
            assert isinstance(model, nn.Sequential)
            if name == "rescaled":
                for layer in updating_layers(model.modules()):
                    layer.momentum = 1 - (1 - 0.1) ** 0.5
            halves = list(zip(x.split(8), y.split(8), strict=True))
            loss, gradient = far_run(model, halves, pooled=name == "pooled")
            found.append(
                [
                    abs(loss - expected[0]) / expected[0],
                    apart(gradient, expected[1]),
                    *(
                        apart(getattr(model[place], kind), getattr(whole[place], kind))
                        for place in (0, 3)
                        for kind in ("running_mean", "running_var")
                    ),
                ]
            )
    medians = {
        name: [median(column) for column in zip(*found, strict=True)]
        for name, found in rows.items()
    }
    assert medians["pooled"] == pytest.approx(
        [0.028, 0.68, 0, 0, 0.060, 0.0021], rel=0.06, abs=1e-15
    )
    assert medians["naive"][2:] == pytest.approx([0.90, 0.23, 0.90, 0.086], rel=0.06)
    assert medians["rescaled"][2:] == pytest.approx([0.011, 0.019, 0.059, 0.0027], rel=0.06)


def far_run(
    model: nn.Module, parts: list[tuple[Tensor, Tensor]], *, pooled: bool
) -> tuple[float, Tensor]:
    total = 0.0
    with pooled_over(model, len(parts) if pooled else 1) as pool:
        for x, y in parts:
            if pool is not None:
                pool.begin()
            loss = nn.functional.cross_entropy(model(x), y, reduction="sum") / 16
            if pool is not None:
                pool.end()
            loss.backward()
            total += loss.item()
    return total, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())
