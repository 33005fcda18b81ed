"""Any loss, split, number of epochs and point of failure give the result of the plain loop."""

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import assert_exact, assert_same_parameters, token_model, undivided_steps
from test_oom_retry import Fails
from torch import Tensor, nn

from autobatch import Accumulator

WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=torch.float64)
Windows = list[tuple[Tensor, Tensor]]


def windows(examples: int, desired: int, seed: int) -> Windows:
    """An epoch of ragged text; every example has a valid target, and some windows are short."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 7, (examples, 4), generator=generator)
    y = torch.randint(0, 4, (examples, 4), generator=generator)
    lengths = torch.randint(1, 5, (examples, 1), generator=generator)
    y[torch.arange(4) >= lengths] = -100
    return list(zip(x.split(desired), y.split(desired), strict=True))


def a_pair(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return F.cross_entropy(outputs, targets, reduction="sum"), (targets != -100).sum()


LOSSES: dict[str, tuple[Callable[..., object], nn.Module]] = {
    "mean": (nn.CrossEntropyLoss(), nn.CrossEntropyLoss()),
    "sum": (nn.CrossEntropyLoss(reduction="sum"), nn.CrossEntropyLoss(reduction="sum")),
    "weighted": (nn.CrossEntropyLoss(WEIGHTS), nn.CrossEntropyLoss(WEIGHTS)),
    "smoothed": (
        functools.partial(F.cross_entropy, label_smoothing=0.1),
        nn.CrossEntropyLoss(label_smoothing=0.1),
    ),
    "its own terms": (a_pair, nn.CrossEntropyLoss()),
}
ADAM = functools.partial(torch.optim.Adam, lr=0.01)


@pytest.mark.parametrize("loss", LOSSES)
@settings(deadline=None, max_examples=12)
@given(
    desired=st.integers(1, 17),
    micro_batch=st.integers(1, 17),
    examples=st.integers(1, 30),
    epochs=st.integers(1, 3),
    failure=st.integers(0, 400),
    seed=st.integers(0, 99),
)
def test_any_training_is_the_plain_one(
    loss: str, desired: int, micro_batch: int, examples: int, epochs: int, failure: int, seed: int
) -> None:
    given_loss, reference = LOSSES[loss]
    ours, whole = token_model(), token_model()
    batches = [
        batch for epoch in range(epochs) for batch in windows(examples, desired, seed + epoch)
    ]
    accumulator = Accumulator(ours, ADAM(ours.parameters()), given_loss, micro_batch=micro_batch)
    losses = []
    for index, batch in enumerate(batches):
        # Once, at any operation of any window, outside of the optimizer's own step.
        fails = Fails(failure) if failure and index == seed % len(batches) else Fails()
        step_hook = accumulator._runner.optimizer_step.optimizer.register_step_pre_hook(
            lambda *_, fails=fails: setattr(fails, "enabled", False)
        )
        try:
            with fails:
                losses.append(accumulator.step(batch).loss)
        except torch.OutOfMemoryError:  # Where terms are counted, on the host: nothing has changed.
            losses.append(accumulator.step(batch).loss)
        step_hook.remove()
    assert_exact(losses, undivided_steps(whole, ADAM(whole.parameters()), reference, batches))
    assert_same_parameters(ours, whole)
    assert accumulator.steps == len(batches)


def test_the_mean_of_means_is_another_training() -> None:
    ours, whole = token_model(), token_model()
    batches = windows(20, 10, 0)
    optimizer = ADAM(ours.parameters())
    for x, y in batches:
        optimizer.zero_grad()
        for a, b in zip(x.split(4), y.split(4), strict=True):
            (F.cross_entropy(ours(a), b) / 3).backward()
        optimizer.step()
    undivided_steps(whole, ADAM(whole.parameters()), nn.CrossEntropyLoss(), batches)
    with pytest.raises(AssertionError, match="not close"):
        assert_same_parameters(ours, whole)
