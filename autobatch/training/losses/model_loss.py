"""The sum behind a loss that the model itself returns, a mean whose terms only the model knows.

The terms are found by trial. A way to count them is right if the losses of two examples alone,
weighted by their terms, give the loss of both together. Signatures and class names do not matter.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from autobatch.data.micro_batches import pieces_of
from autobatch.data.tree import BatchTree, describe, size_of, take, tensors
from autobatch.errors import InexactStepError
from autobatch.training.losses.pair_probe import DoublingSchedule, alone_and_together
from autobatch.training.losses.term_counting import (
    COUNTERS,
    IGNORED_LABEL,
    VALID_LABELS,
    TermCounter,
    candidates,
    count_marked,
    give_same_weights,
    is_valid,
    labels_key,
    labels_of,
    names_with_uneven_zeros,
)
from autobatch.training.losses.tolerance import Tolerance
from autobatch.training.model_state.evaluation_mode import undisturbed

# For the loss of two examples. A wrong count differs by more: a label is counted or it is not.
LOSS_TOLERANCE: Final = Tolerance(float64=1e-9, float32=1e-4, float16=1e-2, bfloat16=3e-2)

_USE_BATCH_LOSS: Final = "pass batch_loss=(model, batch) -> (sum, terms)"


def model_loss_of(outputs: object) -> Tensor | None:
    """Return the scalar floating tensor under ``.loss`` or ``["loss"]``; None if there is none."""
    loss = getattr(outputs, "loss", None)
    if loss is None and isinstance(outputs, Mapping):
        loss = outputs.get("loss")
    if isinstance(loss, Tensor) and not loss.ndim and loss.is_floating_point():
        return loss
    return None


def call_with_labels(model: nn.Module, batch: BatchTree) -> object:
    """Return the model's outputs for a batch that includes labels.

    Raises:
        TypeError: If the batch is no mapping from the names of its arguments.
    """
    if isinstance(batch, Mapping):
        return model(**batch)
    raise TypeError(
        "a model that returns its own loss takes a mapping with the names of its arguments, got "
        f"{describe(batch)}; {_USE_BATCH_LOSS}"
    )


@dataclass(slots=True)
class ModelLoss:
    """Turns the model's own loss, a mean, into a sum and its terms.

    Call ``prepare`` first for every logical batch that is cut: it may change what is counted.

    Attributes:
        training: Whether the model returns its loss in training mode only.
    """

    training: bool = False
    _refuted: list[TermCounter] = field(default_factory=list, init=False)
    _schedule: DoublingSchedule = field(default_factory=DoublingSchedule, init=False)
    _uneven: set[str] = field(default_factory=set, init=False)  # In batches that were checked.

    def state_dict(self) -> dict[str, object]:
        """Return what was found out about the loss, as plain values."""
        return {
            "training": self.training,
            "refuted": [counter.name for counter in self._refuted],
            "schedule": self._schedule.state_dict(),
            "uneven": sorted(self._uneven),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what ``state_dict`` returned."""
        self.training = bool(state["training"])
        self._refuted = [COUNTERS[name] for name in state["refuted"]]
        self._schedule.load_state_dict(state["schedule"])
        self._uneven = set(state["uneven"])

    def prepare(
        self, model: nn.Module, batch: BatchTree, move: Callable[[BatchTree], BatchTree]
    ) -> None:
        """Find out what the model's mean counts, as far as it matters for this logical batch.

        A trial runs the model on two examples, in evaluation mode and without gradients; afterwards
        everything is as before. No trial is needed where all possible counters give each example
        the same weight. Trials are made all the same in the logical batches 1, 2, 4, 8 and so on,
        and in the first one in which examples differ in their number of zeros: the model may take
        its mean over a mask that it makes from them.

        Args:
            model: In any mode.
            batch: The logical batch, on the host.
            move: Returns a copy of a batch on the model's device.

        Raises:
            InexactStepError: If no counter explains the losses of two examples, or several do and
                give the examples of this batch different weights.
        """
        self._schedule.seen += 1
        possible = self._possible(batch)
        if VALID_LABELS in possible and not VALID_LABELS.terms(batch).any():
            return  # A batch without a valid label is skipped.
        equal_weights = give_same_weights(possible, batch)
        uneven = names_with_uneven_zeros(batch)
        is_known = equal_weights and not self._schedule.is_due and uneven <= self._uneven
        if size_of(batch) < 2 or is_known:
            return
        self._uneven |= uneven
        pieces = pieces_of(batch)
        with undisturbed(model, training=self.training):
            pairs = (pair for piece in pieces for pair in _most_different(possible, piece))
            for pair in itertools.islice(pairs, 1):
                self._schedule.passed += self._try(model, pair, move)
            for pair in (pair for piece in pieces for pair in _pairs_with_one_label(piece)):
                if give_same_weights(self._possible(batch), batch):
                    return
                self._try(model, pair, move)
        self._refuse_undecided(batch)

    def denominator(self, batch: BatchTree) -> float:
        """Return the terms of a batch; 0 if no label is valid. This waits for the device."""
        return float(self._possible(batch)[0].terms(batch).sum())

    def summed(self, outputs: object, batch: BatchTree) -> tuple[Tensor, None]:
        """Return the loss of a micro-batch times its terms.

        Without a valid label the model's mean is nan, and the result is a zero without a graph.

        Args:
            outputs: The model's outputs for the micro-batch.
            batch: The micro-batch, on the host if the count must not wait for the device.

        Raises:
            TypeError: If there is no scalar loss among the outputs.
        """
        loss = _widened(_required_loss(outputs))
        terms = self.denominator(batch)
        return (loss * terms if terms else torch.zeros_like(loss)), None

    def _possible(self, batch: BatchTree) -> list[TermCounter]:
        """Return the counters that no trial has refuted."""
        left = [counter for counter in candidates(batch) if counter not in self._refuted]
        if not left:
            raise InexactStepError(
                "the model's own loss is no mean over examples, as an earlier batch showed, and "
                f"this batch has no labels to count; {_USE_BATCH_LOSS}"
            )
        return left

    def _refuse_undecided(self, batch: BatchTree) -> None:
        possible = self._possible(batch)
        if not give_same_weights(possible, batch):
            names = " or ".join(counter.name for counter in possible)
            raise InexactStepError(
                f"the model's own loss is a mean over {names}: these examples differ in them, and "
                f"no trial with two examples shows which one is right; {_USE_BATCH_LOSS}"
            )

    def _try(
        self, model: nn.Module, pair: BatchTree, move: Callable[[BatchTree], BatchTree]
    ) -> bool:
        """Refute the counters that do not explain the losses of a pair.

        Returns:
            False if any counter explains the losses, because all three are equal.
        """
        first, second, both = (_loss(model, move(batch)) for batch in alone_and_together(pair))
        losses = _PairLosses(float(first), float(second), float(both), _tolerance(model, both))
        possible = self._possible(pair)
        wrong = [c for c in possible if not losses.is_mean_by(c.terms(pair).tolist())]
        if len(wrong) == len(possible):
            repeated = float(_loss(model, move(pair)))
            raise InexactStepError(losses.refusal(possible, repeated))
        self._refuted += wrong
        return not losses.are_equal


@dataclass(frozen=True, slots=True)
class _PairLosses:
    """The model's loss for two examples, each alone and both together."""

    first: float
    second: float
    both: float
    tolerance: float

    @property
    def are_equal(self) -> bool:
        """Whether the losses are equal, so that any weights would explain them."""
        return self._are_close(self.first, self.both) and self._are_close(self.second, self.both)

    def is_mean_by(self, terms: Sequence[float]) -> bool:
        """Whether the loss of both is the mean of the two, weighted by their terms."""
        alone = list(zip((self.first, self.second), terms, strict=True))
        if any(not count and loss and not math.isnan(loss) for loss, count in alone):
            return False  # Without terms the sum is 0 and the mean is nan, never another number.
        if not any(terms):
            return True
        mean = sum(loss * count for loss, count in alone if count) / sum(terms)
        return self._are_close(mean, self.both)

    def refusal(self, tried: Sequence[TermCounter], repeated: float) -> str:
        """Return the text of an error: the losses, and what the user can do.

        Args:
            tried: The counters that do not explain the losses.
            repeated: The loss of both examples in a second call.
        """
        seen = (
            f"the model's own loss cannot be split: it is {self.first:.9g} and {self.second:.9g} "
            f"for two examples alone, and {self.both:.9g} for both together, which is no mean over "
            + " or ".join(counter.name for counter in tried)
        )
        if not self._are_close(repeated, self.both):
            return (
                f"{seen}; called again on both it is {repeated:.9g}, so it draws random numbers in "
                f"evaluation mode too; if a split is right all the same, {_USE_BATCH_LOSS}"
            )
        if self._are_close(self.first + self.second, self.both):
            return f"{seen}; it looks like a sum over examples: {_USE_BATCH_LOSS}"
        return (
            f"{seen}; {_USE_BATCH_LOSS} if it is a mean over something else. A loss that compares "
            "examples with one another is not exact in parts: choose a desired batch that fits as "
            "one micro-batch"
        )

    def _are_close(self, one: float, other: float) -> bool:
        if math.isnan(one) or math.isnan(other):
            return math.isnan(one) and math.isnan(other)
        finite = [abs(v) for v in (self.first, self.second, self.both) if math.isfinite(v)]
        return math.isclose(one, other, rel_tol=0, abs_tol=self.tolerance * max(finite, default=0))


def _most_different(possible: Sequence[TermCounter], batch: BatchTree) -> Iterator[BatchTree]:
    """Yield the two examples that differ most in their terms, of those that have terms."""
    counts = torch.stack([counter.terms(batch) for counter in possible]).cpu()
    least = counts.amin(0)
    if least.count_nonzero() < 2:
        least = counts.amax(0)
    # Padding is zero in some tensor (an attention mask, say), whatever the labels are.
    integers = [
        t for t in tensors(batch) if t.shape[:1] == least.shape and not t.is_floating_point()
    ]
    nonzero = torch.stack(
        [torch.zeros_like(least), *(count_marked(t.cpu() != 0) for t in integers)]
    ).sum(0)
    order = sorted(zip(least.tolist(), nonzero.tolist(), range(len(least)), strict=True))
    with_terms = [row for terms, _, row in order if terms]
    if len(with_terms) > 1:
        yield take(batch, [with_terms[0], with_terms[-1]])


def _pairs_with_one_label(batch: BatchTree) -> Iterator[BatchTree]:
    """Yield pairs in which one label is valid, so that counters differ by a half or more.

    Only a batch with ignored labels has such pairs: another model may not know that label.
    """
    labels = labels_of(batch)
    if labels is None or labels.is_floating_point():
        return
    valid = is_valid(labels)
    late = valid.clone()
    if labels.ndim > 1:
        late[..., 0] = False
    early = valid & ~late
    if valid.all() or not late.any():
        return
    row, one_late = _only_label(labels, late)
    if early.any():  # Labels that are shifted by one have no such term.
        other, one_early = _only_label(labels, early)
        yield _with_labels(batch, [other, row], [one_early, one_late])
    nothing = torch.full_like(one_late, IGNORED_LABEL)
    yield _with_labels(batch, [row, row], [nothing, one_late])


def _only_label(labels: Tensor, where: Tensor) -> tuple[int, Tensor]:
    """Return a row and its labels ``(1, ...)``, all ignored but one that ``where`` marks."""
    row, *position = where.nonzero()[-1].tolist()
    single = torch.full_like(labels[:1], IGNORED_LABEL)
    single[(0, *position)] = labels[(row, *position)]
    return row, single


def _with_labels(batch: BatchTree, rows: Sequence[int], labels: Sequence[Tensor]) -> BatchTree:
    pair = take(batch, rows)
    assert isinstance(pair, Mapping), "only a mapping has labels"
    return {**pair, labels_key(pair): torch.cat(list(labels))}


def _loss(model: nn.Module, batch: BatchTree) -> Tensor:
    return _required_loss(call_with_labels(model, batch))


def _required_loss(outputs: object) -> Tensor:
    loss = model_loss_of(outputs)
    if loss is None:
        raise TypeError(
            f"the model returned no scalar loss, got {describe(outputs)}; pass labels in every "
            f"batch, or {_USE_BATCH_LOSS}"
        )
    return loss


def _tolerance(model: nn.Module, loss: Tensor) -> float:
    """Return that of the coarsest type: outputs in 16 bits may give a loss in float32."""
    types = {loss.dtype, *(p.dtype for p in model.parameters() if p.is_floating_point())}
    if torch.is_autocast_enabled(loss.device.type):
        types.add(torch.get_autocast_dtype(loss.device.type))
    return LOSS_TOLERANCE.of(*types)


def _widened(loss: Tensor) -> Tensor:
    """Return a loss of 16 bits in float32: its sum could overflow, or would be rounded again."""
    return loss.float() if loss.dtype in (torch.float16, torch.bfloat16) else loss
