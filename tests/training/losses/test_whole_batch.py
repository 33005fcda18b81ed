"""A loss of the whole batch is exact in pieces: one graph over them all is the reference."""

import functools
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import assert_exact, assert_same_parameters, small_model, twin
from states import fingerprint
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from autobatch import (
    Accumulator,
    InexactStepError,
    StepInterruptedError,
    WholeBatch,
    find_and_train,
)
from autobatch.data.micro_batches import cut_to
from autobatch.data.tree import tensors
from autobatch.training.engine import grad_cache

Triple = tuple[Tensor, Tensor, Tensor]
Outputs = tuple[Tensor, ...]
LossOfAll = Callable[[Outputs, Tensor], Tensor]
SIZES = (4, 3, 3)


class Towers(nn.Module):
    """Two encoders; what else is returned comes from subclasses."""

    def __init__(self, dropout: float = 0.0, first: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = self._tower(dropout), self._tower(dropout)
        self.first = (first or nn.Identity()).double()

    @staticmethod
    def _tower(dropout: float) -> nn.Sequential:
        layers = nn.Linear(5, 8), nn.GELU(), nn.Dropout(dropout), nn.LayerNorm(8), nn.Linear(8, 4)
        return nn.Sequential(*layers).double()

    def forward(self, left: Tensor, right: Tensor) -> Outputs:
        return self.left(self.first(left)), self.right(right)


def triples(examples: int = 10, seed: int = 1) -> Triple:
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(2, examples, 5, generator=generator, dtype=torch.float64)
    return left, right, torch.randint(0, 3, (examples,), generator=generator)


def info_nce(outputs: Outputs, targets: Tensor) -> Tensor:
    scores = F.normalize(outputs[0]) @ F.normalize(outputs[1]).T / 0.3
    places = torch.arange(len(targets))
    return (F.cross_entropy(scores, places) + F.cross_entropy(scores.T, places)) / 2


def batch_hard_triplet(outputs: Outputs, targets: Tensor) -> Tensor:
    distances = (outputs[0][:, None] - outputs[0][None]).square().sum(-1)
    same = targets[:, None] == targets[None]
    furthest = distances.masked_fill(~same, 0).amax(1)
    nearest = distances.masked_fill(same, 1e9).amin(1)
    return F.softplus(furthest - nearest.clamp(max=50)).mean()


def one_minus_correlation(outputs: Outputs, targets: Tensor) -> Tensor:
    pair = torch.stack([outputs[0][:, 0], targets.to(outputs[0].dtype)])
    return 1 - torch.corrcoef(pair)[0, 1]


LOSSES = {f.__name__: f for f in (info_nce, batch_hard_triplet, one_minus_correlation)}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def sgd(*modules: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for module in modules for p in module.parameters()], lr=1.0)


def one_graph_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: LossOfAll,
    batch: Triple,
    sizes: Sequence[int],
    dtype: torch.dtype | None = None,
) -> float:
    """The obvious way: a graph over all pieces, in their order; the whole is one piece."""
    pieces = zip(*(tensor.split(list(sizes)) for tensor in batch), strict=True)
    optimizer.zero_grad()
    with torch.autocast("cpu", dtype) if dtype else nullcontext():
        outputs = [model(left, right) for left, right, _ in pieces]
        joined = tuple(
            torch.cat(column) if column[0].ndim else column[0]
            for column in zip(*outputs, strict=True)
        )
        value = loss(joined, batch[2])
    value.backward()
    optimizer.step()
    return value.item()


def sizes_of(batch: Triple, micro_batch: int) -> tuple[int, ...]:
    return cut_to(batch, micro_batch)[1]


@every_loss
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_two_passes_equal_one_graph_over_the_same_pieces(loss: LossOfAll, dropout: float) -> None:
    ours, whole = Towers(dropout), Towers(dropout)
    torch.manual_seed(5)
    steps = [
        Accumulator(ours, sgd(ours), WholeBatch(loss), micro_batch=4).step(triples(seed=seed))
        for seed in (1, 2)
    ]
    after = torch.get_rng_state()
    torch.manual_seed(5)
    losses = [one_graph_step(whole, sgd(whole), loss, triples(seed=s), SIZES) for s in (1, 2)]
    assert [step.micro_batch_sizes for step in steps] == [SIZES, SIZES]
    assert_same_parameters(ours, whole)
    assert_exact([step.loss for step in steps], losses)
    assert torch.equal(after, torch.get_rng_state())


@every_loss
@settings(max_examples=25)
@given(
    examples=st.integers(2, 17),
    micro_batch=st.integers(1, 17),
    seed=st.integers(0, 2**16),
    dropout=st.sampled_from([0.0, 0.3]),
)
def test_any_split_takes_the_undivided_step(
    loss: LossOfAll, examples: int, micro_batch: int, seed: int, dropout: float
) -> None:
    if loss is one_minus_correlation and len(set(triples(examples, seed)[2].tolist())) == 1:
        return  # A constant correlates with nothing: nan, cut or not.
    batch = triples(examples, seed)
    # With dropout only the same pieces draw the same masks; without, the batch itself will do.
    sizes = sizes_of(batch, micro_batch) if dropout else (examples,)
    ours, whole = Towers(dropout), Towers(dropout)
    torch.manual_seed(seed)
    step = Accumulator(ours, sgd(ours), WholeBatch(loss), micro_batch=micro_batch).step(batch)
    torch.manual_seed(seed)
    assert_exact(step.loss, one_graph_step(whole, sgd(whole), loss, batch, sizes))
    assert_same_parameters(ours, whole)


@every_loss
def test_the_mean_of_the_pieces_losses_takes_another_step(loss: LossOfAll) -> None:
    wrong, whole = Towers(), Towers()
    optimizer = sgd(wrong)
    for left, right, targets in zip(*(t.split(list(SIZES)) for t in triples()), strict=True):
        (loss(wrong(left, right), targets) * len(left) / 10).backward()
    optimizer.step()
    one_graph_step(whole, sgd(whole), loss, triples(), (10,))
    with pytest.raises(AssertionError, match="not close"):
        assert_same_parameters(wrong, whole)


def test_a_second_pass_with_other_random_numbers_takes_another_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours, whole = Towers(0.4), Towers(0.4)
    torch.manual_seed(5)
    one_graph_step(whole, sgd(whole), info_nce, triples(), SIZES)
    torch.manual_seed(5)
    accumulator = Accumulator(ours, sgd(ours), WholeBatch(info_nce), micro_batch=4)
    gradients = grad_cache._output_gradients

    def and_a_draw(*args: object) -> object:
        found = gradients(*args)  # type: ignore[arg-type]
        monkeypatch.setattr(torch, "set_rng_state", lambda _: None)
        return found

    monkeypatch.setattr(grad_cache, "_output_gradients", and_a_draw)
    accumulator.step(triples())
    with pytest.raises(AssertionError, match="not close"):
        assert_same_parameters(ours, whole)


def test_a_batch_that_is_not_cut_takes_one_pass() -> None:
    calls: list[tuple[int, bool]] = []
    ours, whole = Towers(0.4), Towers(0.4)
    ours.register_forward_pre_hook(
        lambda _, inputs: calls.append((len(inputs[0]), torch.is_grad_enabled()))
    )
    torch.manual_seed(5)
    step = Accumulator(ours, sgd(ours), WholeBatch(info_nce)).step(triples())
    torch.manual_seed(5)
    assert_exact(step.loss, one_graph_step(whole, sgd(whole), info_nce, triples(), (10,)))
    assert_same_parameters(ours, whole)
    assert calls == [(10, True)]
    Accumulator(ours, sgd(ours), WholeBatch(info_nce), micro_batch=4).step(triples())
    # One that is cut takes two, and of the first pass one graph at most is held.
    first, second = [(4, True), (3, False), (3, False)], [(size, True) for size in SIZES]
    assert calls == [(10, True), *first, *second]


# What a forward pass moves, it moves once.


class Own(nn.BatchNorm1d):
    """A subclass with a forward pass of its own, as libraries of models have them."""

    def forward(self, input: Tensor) -> Tensor:  # Torch's name.
        return super().forward(input)


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, Own])
@pytest.mark.parametrize(("examples", "micro_batch"), [(10, 4), (3, 2)], ids=["10", "2 + 1"])
def test_running_statistics_move_once_and_are_those_of_the_undivided_batch(
    examples: int, micro_batch: int, kind: type[nn.BatchNorm1d]
) -> None:
    ours = Towers(0.4, kind(5))
    whole = nn.BatchNorm1d(5).double()
    batch = triples(examples)
    whole(batch[0])
    Accumulator(ours, sgd(ours), WholeBatch(info_nce), micro_batch=micro_batch).step(batch)
    assert_exact(list(ours.first.buffers()), list(whole.buffers()))


def test_batch_norm_still_normalises_each_piece_by_itself() -> None:
    ours, whole = Towers(0.4, nn.BatchNorm1d(5)), Towers(0.4, nn.BatchNorm1d(5))
    torch.manual_seed(5)
    Accumulator(ours, sgd(ours), WholeBatch(info_nce), micro_batch=4).step(triples())
    torch.manual_seed(5)
    one_graph_step(whole, sgd(whole), info_nce, triples(), SIZES)
    assert_exact(list(ours.parameters()), list(whole.parameters()))
    assert [int(m.first.num_batches_tracked) for m in (ours, whole)] == [1, 3]  # type: ignore[arg-type]  # The control.


class TermCounter(nn.Module):
    """Moves a buffer and plain attributes, and makes its output depend on them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.average: Tensor
        self.register_buffer("average", torch.zeros(5, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.average.mul_(0.5).add_(x.detach().mean(0))
        return x * self.calls + self.average.clone()


@pytest.mark.parametrize("kind", ["spectral norm", "counting"])
def test_other_buffers_move_as_in_one_pass_over_the_pieces(kind: str) -> None:
    def model() -> Towers:
        torch.manual_seed(1)
        norm = nn.utils.parametrizations.spectral_norm
        return Towers(0.4, TermCounter() if kind == "counting" else norm(nn.Linear(5, 5).double()))

    ours, whole = model(), model()
    torch.manual_seed(5)
    Accumulator(ours, sgd(ours), WholeBatch(info_nce), micro_batch=4).step(triples())
    torch.manual_seed(5)
    one_graph_step(whole, sgd(whole), info_nce, triples(), SIZES)
    assert_same_parameters(ours, whole)
    assert getattr(ours.first, "calls", 3) == 3


# Parameters and outputs of every kind.


class LearnedTemperature(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.tensor(-1.0, dtype=torch.float64))
        self.dropout = nn.Dropout(0.2)

    def forward(self, outputs: Outputs, targets: Tensor) -> Tensor:
        left, right = F.normalize(self.dropout(outputs[0])), F.normalize(outputs[1])
        return F.cross_entropy(left @ right.T / self.log.exp(), torch.arange(len(targets)))


def test_a_loss_with_a_parameter_of_its_own_trains_it_and_its_random_numbers_count() -> None:
    (ours, loss), (whole, theirs) = ((Towers(0.4), LearnedTemperature()) for _ in range(2))
    torch.manual_seed(5)
    Accumulator(ours, sgd(ours, loss), WholeBatch(loss), micro_batch=4).step(triples())
    after = torch.get_rng_state()
    torch.manual_seed(5)
    one_graph_step(whole, sgd(whole, theirs), theirs, triples(), SIZES)
    assert_same_parameters(ours, whole)
    assert_same_parameters(loss, theirs)
    assert loss.log.item() != -1
    assert torch.equal(after, torch.get_rng_state())


class Scaled(Towers):
    """Returns a scale beside the representations, as CLIP does."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def forward(self, left: Tensor, right: Tensor) -> Outputs:
        return *super().forward(left, right), self.logit_scale.exp()


def scaled_nce(outputs: Outputs, targets: Tensor) -> Tensor:
    left, right, scale = outputs
    return F.cross_entropy(scale * F.normalize(left) @ F.normalize(right).T, targets * 0)


def test_the_gradient_of_a_scalar_output_counts_once() -> None:
    ours, whole = Scaled(), Scaled()
    Accumulator(ours, sgd(ours), WholeBatch(scaled_nce), micro_batch=4).step(triples())
    one_graph_step(whole, sgd(whole), scaled_nce, triples(), (10,))
    assert_same_parameters(ours, whole)
    assert ours.logit_scale.item() != 0.5


def test_a_scalar_that_each_piece_makes_for_itself_is_refused() -> None:
    class Balanced(Towers):
        def forward(self, left: Tensor, right: Tensor) -> Outputs:
            outputs = super().forward(left, right)
            return *outputs, outputs[0].square().mean()

    model = Balanced()
    loss = WholeBatch(lambda outputs, targets: info_nce(outputs, targets) + outputs[2])
    with pytest.raises(InexactStepError, match="must agree in their scalars"):
        Accumulator(model, sgd(model), loss, micro_batch=4).step(triples())


def test_targets_that_a_forward_makes_of_parameters_get_their_gradient() -> None:
    def towers(model: nn.Module, batch: object) -> tuple[Tensor, Tensor]:
        assert isinstance(model, Towers)
        assert isinstance(batch, tuple)
        return model.left(batch[0]), model.right(batch[1])

    def pair_loss(left: object, right: object) -> Tensor:
        assert isinstance(left, Tensor)
        assert isinstance(right, Tensor)
        return info_nce((left, right), torch.zeros(len(left)))

    ours, whole = Towers(0.4), Towers(0.4)
    torch.manual_seed(5)
    accumulator = Accumulator(ours, sgd(ours), WholeBatch(pair_loss), micro_batch=4, forward=towers)
    accumulator.step(triples())
    torch.manual_seed(5)
    one_graph_step(whole, sgd(whole), info_nce, triples(), SIZES)
    assert_same_parameters(ours, whole)


def test_targets_without_a_gradient_may_be_changed_in_place_as_in_an_undivided_batch() -> None:
    def impolite(outputs: Outputs, targets: Tensor) -> Tensor:
        return one_minus_correlation(outputs, targets.clamp_(min=-1))

    ours, whole = Towers(), Towers()
    batch = (*triples()[:2], torch.linspace(-3, 3, 10, dtype=torch.float64))
    Accumulator(ours, sgd(ours), WholeBatch(impolite), micro_batch=4).step(batch)
    one_graph_step(whole, sgd(whole), impolite, batch, (10,))
    assert_same_parameters(ours, whole)


def test_outputs_that_the_loss_ignores_and_complex_ones_are_no_obstacle() -> None:
    class Spectral(Towers):
        def forward(self, left: Tensor, right: Tensor) -> Outputs:
            outputs = super().forward(left, right)
            return *outputs, torch.fft.fft(outputs[0]), outputs[1].argmax(1), outputs[1].detach()

    def loss(outputs: Outputs, targets: Tensor) -> Tensor:
        return info_nce(outputs, targets) + outputs[2].abs().mean().square()

    ours, whole = Spectral(0.4), Spectral(0.4)
    torch.manual_seed(5)
    Accumulator(ours, sgd(ours), WholeBatch(loss), micro_batch=4).step(triples())
    torch.manual_seed(5)
    one_graph_step(whole, sgd(whole), loss, triples(), SIZES)
    assert_same_parameters(ours, whole)


def test_frozen_towers_stay_and_get_no_gradient() -> None:
    ours, whole = Towers(), Towers()
    for model in (ours, whole):
        model.right.requires_grad_(False)
    Accumulator(ours, sgd(ours), WholeBatch(info_nce), micro_batch=4).step(triples())
    one_graph_step(whole, sgd(whole), info_nce, triples(), (10,))
    assert_same_parameters(ours, whole)


def test_autocast_covers_the_loss_too() -> None:
    ours, whole = Towers().float(), Towers().float()
    left, right, targets = triples()
    batch = (left.float(), right.float(), targets)
    accumulator = Accumulator(
        ours, sgd(ours), WholeBatch(info_nce), micro_batch=4, precision="bf16"
    )
    step = accumulator.step(batch)
    loss = one_graph_step(whole, sgd(whole), info_nce, batch, SIZES, torch.bfloat16)
    assert step.loss == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(ours.state_dict(), whole.state_dict(), rtol=1e-2, atol=1e-3)


def test_a_weight_that_autocast_casts_without_a_graph_still_learns() -> None:
    class Late(nn.Module):
        """The first piece, of 4, does not need all of the weights; those of 3 do."""

        def __init__(self) -> None:
            super().__init__()
            self.always, self.late = nn.Linear(5, 4), nn.Linear(5, 4)

        def forward(self, left: Tensor, right: Tensor) -> Outputs:
            other = self.always(right)
            return self.always(left), other if len(left) == 4 else other + self.late(right)

    model = Late()
    before = twin(model)
    left, right, targets = triples()
    Accumulator(model, sgd(model), WholeBatch(info_nce), micro_batch=4, precision="bf16").step(
        (left.float(), right.float(), targets)
    )
    for ours, start in zip(model.parameters(), before.parameters(), strict=True):
        assert not torch.equal(ours, start)


def test_a_scaler_that_has_never_scaled_is_made_ready() -> None:
    ours, whole = Towers(0.4), Towers(0.4)
    torch.manual_seed(5)
    accumulator = Accumulator(
        ours,
        sgd(ours),
        WholeBatch(info_nce),
        micro_batch=4,
        scaler=torch.amp.GradScaler("cpu", init_scale=1024.0),
    )
    step = accumulator.step(triples())
    torch.manual_seed(5)
    assert_exact(step.loss, one_graph_step(whole, sgd(whole), info_nce, triples(), SIZES))
    assert_same_parameters(ours, whole)


def test_gradients_of_16_bits_are_summed_in_more() -> None:
    ours, whole = Towers().bfloat16(), Towers().bfloat16()
    left, right, targets = triples(64)
    batch = (left.bfloat16(), right.bfloat16(), targets)
    results = []
    for dtype in (torch.float32, None):
        model = twin(ours)
        accumulator = Accumulator(
            model, sgd(model), WholeBatch(info_nce), micro_batch=1, gradient_dtype=dtype
        )
        accumulator.step(batch)
        results.append(model)
    one_graph_step(whole.double(), sgd(whole), info_nce, triples(64), (64,))

    def distance(model: nn.Module) -> float:
        pairs = zip(model.parameters(), whole.parameters(), strict=True)
        return sum(
            float((ours.double() - theirs).detach().square().sum()) for ours, theirs in pairs
        )

    assert distance(results[0]) < distance(results[1])


# Refused.


OUTPUTS: dict[str, Callable[[Tensor], object]] = {
    "of all pairs": lambda rows: rows @ rows.T,
    "of two views": lambda rows: torch.cat([rows, rows]),
    "of classes": lambda rows: (rows, torch.zeros(3, 5)),
    "of lists": lambda rows: [[row] for row in rows],
    "of one number": lambda rows: rows.mean(),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs_that_cannot_be_joined_are_refused_and_nothing_has_moved(kind: str) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.BatchNorm1d(5).double(), small_model())

        def forward(self, x: Tensor) -> object:
            return OUTPUTS[kind](self.inner(x))

    model = Odd()
    before = fingerprint(model)
    loss = WholeBatch(lambda outputs, _: next(tensors(outputs)).sum())
    with pytest.raises(InexactStepError, match="cannot be joined"):
        Accumulator(model, sgd(model), loss, micro_batch=4).step((triples()[0], triples()[2]))
    assert fingerprint(model) == before


def test_a_model_that_is_another_one_at_the_second_pass_is_refused() -> None:
    calls: list[int] = []

    class Fickle(Towers):
        def forward(self, left: Tensor, right: Tensor) -> Outputs:
            calls.append(len(left))
            outputs = super().forward(left, right)
            return outputs if len(calls) <= 3 else (outputs[0][:, :2], outputs[1])

    model = Fickle()
    before = twin(model)
    with pytest.raises(InexactStepError, match="its outputs differ"):
        Accumulator(model, sgd(model), WholeBatch(info_nce), micro_batch=4).step(triples())
    assert_same_parameters(model, before)


def test_outputs_of_which_only_some_pieces_depend_on_parameters_are_refused() -> None:
    class Uneven(Towers):
        def forward(self, left: Tensor, right: Tensor) -> Outputs:
            one, other = super().forward(left, right)
            return one, other.detach() if len(left) == 4 else other

    model = Uneven()
    with pytest.raises(InexactStepError, match="others depend on parameters"):
        Accumulator(model, sgd(model), WholeBatch(info_nce), micro_batch=4).step(triples())


@pytest.mark.parametrize("given", [None, nn.Linear, 3])
def test_what_is_no_loss_is_refused(given: object) -> None:
    with pytest.raises(TypeError, match="WholeBatch needs a callable"):
        WholeBatch(given)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [1.0, torch.zeros(1), (torch.tensor(1.0), 3)])
@pytest.mark.parametrize("micro_batch", [4, 10])
def test_a_loss_that_is_no_scalar_is_refused(value: object, micro_batch: int) -> None:
    model = Towers()
    loss = WholeBatch(lambda *_: value)
    with pytest.raises(TypeError, match="must be a scalar"):
        Accumulator(model, sgd(model), loss, micro_batch=micro_batch).step(triples())


# Memory.


class Fails(TorchDispatchMode):
    """Runs out of memory at one operation, counted from 1."""

    def __init__(self, at: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.at, self.operations = at, 0

    def __torch_dispatch__(  # type: ignore[no-untyped-def]
        self, func, types, args=(), kwargs=None
    ):
        self.operations += 1
        if self.operations == self.at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return func(*args, **(kwargs or {}))


def clipping(model: nn.Module, micro_batch: int) -> Accumulator:
    loss = WholeBatch(info_nce)
    return Accumulator(model, sgd(model), loss, micro_batch=micro_batch, clip_grad_norm=0.1)


@functools.cache
def without_failure(micro_batch: int) -> tuple[Towers, float, Tensor, int]:
    model = Towers(0.4, nn.BatchNorm1d(5))
    accumulator = clipping(model, micro_batch)
    torch.manual_seed(5)
    with Fails(at=0) as mode:
        loss = accumulator.step(triples()).loss
    return model, loss, torch.get_rng_state(), mode.operations


@settings(max_examples=25)
@given(fraction=st.floats(0, 1))
def test_running_out_at_any_operation_changes_nothing(fraction: float) -> None:
    model = Towers(0.4, nn.BatchNorm1d(5))
    accumulator = clipping(model, 4)
    torch.manual_seed(5)
    try:
        with Fails(at=1 + int(fraction * without_failure(4)[3])):
            step = accumulator.step(triples())
    except (torch.OutOfMemoryError, StepInterruptedError):  # Outside the window.
        return
    expected, loss, random, _ = without_failure(max(step.micro_batch_sizes))
    assert_same_parameters(model, expected)
    assert_exact(step.loss, loss)
    assert torch.equal(torch.get_rng_state(), random)


def in_batches(batch: Triple, size: int) -> Iterable[Triple]:
    return list(zip(*(tensor.split(size) for tensor in batch), strict=True))


def test_a_limit_that_forces_a_cut_gives_the_losses_of_the_undivided_batches() -> None:
    ours, whole = Towers(), Towers()
    data = triples(48)
    optimizer = functools.partial(torch.optim.SGD, lr=0.5)
    result = find_and_train(
        ours,
        in_batches(data, 8),
        16,
        loss=WholeBatch(info_nce),
        optimizer=optimizer,
        memory_limit="14KB",
        progress=False,
    )
    theirs = optimizer(whole.parameters())
    losses = [one_graph_step(whole, theirs, info_nce, b, (16,)) for b in in_batches(data, 16)]
    assert result.plan.accumulation_steps > 1
    assert_exact(list(result.losses), losses)
    assert_same_parameters(ours, whole)
