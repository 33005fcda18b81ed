"""A mean over rows that are no examples: ``forward=`` may return one row for each token."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import assert_exact, assert_same_parameters, sgd
from torch import Tensor, nn

from autobatch import Accumulator, InexactStepError, find_and_train

Batch = dict[str, Tensor]


def tokens(lengths: Sequence[int], width: int = 6, seed: int = 0) -> Batch:
    """Examples with different numbers of tokens, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    examples = len(lengths)
    return {
        "x": torch.randn(examples, width, 5, generator=generator, dtype=torch.float64),
        "y": torch.randint(0, 3, (examples, width), generator=generator),
        "mask": torch.arange(width) < torch.tensor(lengths)[:, None],
    }


def masked(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The rows are the valid tokens, as for masked words or tags."""
    return model(batch["x"])[batch["mask"]], batch["y"][batch["mask"]]


def whole(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    return model(batch["x"]), batch["y"]


def mean(outputs: Tensor, targets: Tensor) -> Tensor:
    """A user's loss: autobatch does not know what the mean is over."""
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def sum_and_terms(outputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    return mean(outputs, targets) * targets.numel(), targets.numel()


def model_of(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(5, 3).double()


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=2, max_size=9),
    micro_batch=st.integers(1, 9),
    seed=st.integers(0, 2**16),
)
def test_a_mean_over_rows_that_forward_returns_is_weighted_by_rows(
    lengths: list[int], micro_batch: int, seed: int
) -> None:
    ours, undivided, batch = model_of(seed), model_of(seed), tokens(lengths, seed=seed)
    accumulator = Accumulator(ours, sgd(ours), mean, forward=masked, micro_batch=micro_batch)
    step = accumulator.step(batch)
    loss = mean(*masked(undivided, batch))
    loss.backward()
    sgd(undivided).step()
    assert_exact([step.loss], [loss.item()])
    assert_same_parameters(ours, undivided)
    assert step.terms == sum(lengths)
    assert step.examples == len(lengths)


def test_weighted_by_examples_it_would_be_another_step() -> None:
    """Control: a mean over examples has another value here."""
    batch, model = tokens([1, 1, 6, 6]), model_of()
    parts = [{name: t[rows] for name, t in batch.items()} for rows in (slice(2), slice(2, 4))]
    by_examples = sum(mean(*masked(model, part)).item() for part in parts) / 2
    assert abs(by_examples - mean(*masked(model, batch)).item()) > 1e-2


def test_an_evaluation_weights_by_rows_too() -> None:
    batch, model = tokens([1, 2, 6, 6, 6, 5, 2, 1]), model_of()
    result = find_and_train(
        model, [tokens([2, 2])], 2, loss=mean, forward=masked, epochs=1, device="cpu",
        eval_data=[{n: t[:3] for n, t in batch.items()}, {n: t[3:] for n, t in batch.items()}],
        progress=False,
    )  # fmt: skip
    assert_exact([result.evaluations[0].loss], [mean(*masked(model, batch)).item()])


def ragged() -> list[Batch]:
    """Batches that cannot be joined: each is as wide as its longest example."""
    return [tokens([width] * 4, width=width, seed=width) for width in (3, 9)]


def train(batches: list[Batch], loss: Any, forward: Any, desired: int = 8) -> nn.Module:
    model = model_of()
    find_and_train(
        model, batches, desired, loss=loss, forward=forward, optimizer=sgd(model), device="cpu",
        progress=False,
    )  # fmt: skip
    return model


def test_a_mean_over_rows_of_several_widths_is_refused() -> None:
    with pytest.raises(InexactStepError, match=r"differ in shape .* return \(sum, terms\)"):
        train(ragged(), mean, whole)


def test_rows_of_another_width_are_refused_in_a_later_batch() -> None:
    alike = [tokens([3] * 4, width=3, seed=n) for n in range(10)]
    with pytest.raises(InexactStepError, match="differ in shape"):
        train([*alike, *ragged()], mean, whole)


@pytest.mark.parametrize(("loss", "forward"), [(sum_and_terms, whole), (mean, masked)])
def test_a_loss_with_known_terms_takes_all_widths(loss: Any, forward: Any) -> None:
    ours, undivided = train(ragged(), loss, forward), model_of()
    outputs = torch.cat([undivided(batch["x"]).flatten(0, 1) for batch in ragged()])
    F.cross_entropy(outputs, torch.cat([batch["y"].flatten() for batch in ragged()])).backward()
    sgd(undivided).step()
    assert_same_parameters(ours, undivided)


def test_context_rows_that_cannot_be_identified_are_refused() -> None:
    """BatchNorm needs two examples, so a single one runs with a context example."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(30), nn.Linear(30, 18)).double()

    def forward(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        return model(batch["x"]).unflatten(1, (6, 3))[batch["mask"]], batch["y"][batch["mask"]]

    accumulator = Accumulator(model, sgd(model), mean, forward=forward, micro_batch=2)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InexactStepError, match="returned 5 rows for these 2 examples"):
        accumulator.step(tokens([3, 3, 3, 2, 3]))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("absent", [(), None, []])
def test_a_loss_may_need_no_targets(absent: Any) -> None:
    ours, undivided, x = model_of(), model_of(), tokens([6] * 12)["x"]

    def energy(outputs: Tensor, _: object) -> Tensor:
        return outputs.square().mean()

    def forward(model: nn.Module, batch: tuple[Tensor]) -> tuple[Tensor, Any]:
        return model(batch[0]), absent

    step = Accumulator(ours, sgd(ours), energy, forward=forward, micro_batch=5).step((x,))
    loss = energy(undivided(x), None)
    loss.backward()
    sgd(undivided).step()
    assert_exact([step.loss], [loss.item()])
    assert_same_parameters(ours, undivided)


class Packed(nn.Module):
    """Pads its outputs to the longest example of the batch that it receives."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(5, 3).double()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        longest = int(mask.sum(1).max())
        scores: Tensor = self.inner(x[:, :longest]) * mask[:, :longest, None]
        return scores


def trimmed(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    outputs = model(batch["x"], batch["mask"])
    return outputs, batch["x"][:, : outputs.shape[1], :3]


def packed(lengths: Sequence[int], loss: nn.Module) -> None:
    model = Packed()
    Accumulator(model, sgd(model), loss, forward=trimmed, micro_batch=2).step(tokens(lengths))


def test_a_mean_over_elements_of_several_widths_is_refused() -> None:
    with pytest.raises(InexactStepError, match=r"\[6, 3\] and \[2, 3\] an example"):
        packed([6, 1, 2, 2], nn.MSELoss())
    packed([6, 1, 6, 2], nn.MSELoss())
    packed([6, 1, 2, 2], nn.MSELoss(reduction="sum"))


def test_classes_of_several_widths_are_exact_where_padding_is_ignored() -> None:
    def classes(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        outputs = model(batch["x"], batch["mask"])
        targets = batch["y"].masked_fill(~batch["mask"], -100)[:, : outputs.shape[1]]
        return outputs.transpose(1, 2), targets

    ours, undivided, batch = Packed(), Packed(), tokens([6, 1, 2, 2])
    accumulator = Accumulator(
        ours, sgd(ours), nn.CrossEntropyLoss(), forward=classes, micro_batch=2
    )
    step = accumulator.step(batch)
    loss = F.cross_entropy(*classes(undivided, batch))
    loss.backward()
    sgd(undivided).step()
    assert_exact([step.loss], [loss.item()])
    assert_same_parameters(ours, undivided)
