"""Running statistics over a window that is cut: those of the whole batch, moved once."""

import functools

import pytest
import torch
from black_box import BlackBox
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import assert_exact, sgd, twin
from states import fingerprint
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from autobatch import Accumulator, StepResult
from autobatch.training.batch_norm import pooled_statistics


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
        if isinstance(module, nn.BatchNorm2d)
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
def test_a_layer_with_the_undivided_inputs_moves_as_for_the_undivided_batch(
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


def test_momentum_and_hooks_are_put_back_also_after_an_error() -> None:
    model = First()
    before = fingerprint(model)

    def fail() -> None:
        with pooled_statistics(model, 3):
            assert model.norm.momentum == 1.0
            raise KeyError("mine")

    with pytest.raises(KeyError):
        fail()
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
