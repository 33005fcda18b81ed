"""The sum behind a loss that the model itself returns: a mean over what only the model knows.

What it is a mean over is found by trying: the law has to hold between two examples alone and both
together. Neither signatures nor names of classes are asked.
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
from autobatch.training.losses.pair_probe import DoublingSchedule
from autobatch.training.losses.term_counting import (
    _ALL,
    _HIDDEN,
    _VALID,
    TermCounter,
    _count,
    _is_valid,
    _labels,
    _labels_key,
    _same_weights,
    _uneven,
    candidates,
)
from autobatch.training.model_state.evaluation_mode import undisturbed

_WAY_OUT: Final = "pass batch_loss=(model, batch) -> (sum, terms)"
# How far two values may be apart, as a fraction of the larger. The law differs by more: a label
# is counted or it is not.
_TOLERANCES: Final = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2}
_COARSEST_TOLERANCE: Final = 3e-2


def model_loss_of(outputs: object) -> Tensor | None:
    """Return the scalar floating tensor under ``.loss`` or ``["loss"]``; None if there is none."""
    loss = getattr(outputs, "loss", None)
    if loss is None and isinstance(outputs, Mapping):
        loss = outputs.get("loss")
    if isinstance(loss, Tensor) and not loss.ndim and loss.is_floating_point():
        return loss
    return None


def call_with_labels(model: nn.Module, batch: BatchTree) -> object:
    """Return what the model makes of a batch, labels among it.

    Raises:
        TypeError: If the batch is no mapping from the names of its arguments.
    """
    if isinstance(batch, Mapping):
        return model(**batch)
    raise TypeError(
        "a model that returns its own loss takes a mapping with the names of its arguments, got "
        f"{describe(batch)}; {_WAY_OUT}"
    )


@dataclass(slots=True)
class ModelLoss:
    """The model's own loss as a sum, once it is known what it is a mean over.

    ``settle`` comes first in every window that is cut: it may change what the others count.

    Attributes:
        training: Whether the model returns it in training mode alone.
    """

    training: bool = False
    _refuted: list[TermCounter] = field(default_factory=list, init=False)
    _schedule: DoublingSchedule = field(default_factory=DoublingSchedule, init=False)
    _uneven: set[str] = field(default_factory=set, init=False)  # What examples have differed in.

    def state_dict(self) -> dict[str, object]:
        """Return what was learnt, as plain values."""
        return {
            "training": self.training,
            "refuted": [counting.name for counting in self._refuted],
            "schedule": self._schedule.state_dict(),
            "uneven": sorted(self._uneven),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Know it again."""
        known = {counting.name: counting for counting in _ALL}
        self.training = bool(state["training"])
        self._refuted = [known[name] for name in state["refuted"]]
        self._schedule.load_state_dict(state["schedule"])
        self._uneven = set(state["uneven"])

    def settle(
        self, model: nn.Module, batch_on_host: BatchTree, moved: Callable[[BatchTree], BatchTree]
    ) -> None:
        """Find out what the model's mean counts, as far as it matters for this logical batch.

        Free, a few counts apart, where all that it may be gives each example the same weight; but
        in the first window, the 2nd, the 4th, the 8th and so on the law is tried all the same, and
        in the first in which examples differ in how much of them is zero: the model may have a mask
        of its own, and take the mean over that. A trial runs the model on at most two examples, in
        evaluation mode and without gradient; it leaves no trace.

        Args:
            model: In any mode.
            batch_on_host: The logical batch.
            moved: Returns a copy of a nest on the model's device.

        Raises:
            InexactStepError: If no mean over what autobatch can count keeps the law, or more than
                one does and they differ for this batch.
        """
        self._schedule.seen += 1
        possible = self._possible(batch_on_host)
        if _VALID in possible and not _VALID.terms(batch_on_host).any():
            return  # Nothing to learn from: it is skipped.
        agree = _same_weights(possible, batch_on_host)
        uneven = _uneven(batch_on_host)
        is_known = agree and not self._schedule.is_due and uneven <= self._uneven
        if size_of(batch_on_host) < 2 or is_known:
            return
        self._uneven |= uneven
        pieces = pieces_of(batch_on_host)
        with undisturbed(model, training=self.training):
            pairs = (pair for piece in pieces for pair in _pairs(possible, piece))
            for pair in itertools.islice(pairs, 1):
                self._schedule.passed += self._try(model, pair, moved)
            for probe in (probe for piece in pieces for probe in _probes(piece)):
                if _same_weights(self._possible(batch_on_host), batch_on_host):
                    return
                self._try(model, probe, moved)
        self._refuse_undecided(batch_on_host)

    def denominator(self, batch: BatchTree) -> float:
        """Return the terms of a batch; 0 if none is valid. On a device this waits for it."""
        return float(self._possible(batch)[0].terms(batch).sum())

    def summed(self, outputs: object, batch: BatchTree) -> tuple[Tensor, None]:
        """Return a micro-batch's loss times its terms.

        Without a valid term that is a zero without graph: the model's mean is nan.

        Args:
            outputs: What the model returned for it.
            batch: The micro-batch, on the host if nothing shall wait for the device.

        Raises:
            TypeError: If there is no scalar loss among the outputs.
        """
        loss = _widened(_required(outputs))
        terms = self.denominator(batch)
        return (loss * terms if terms else torch.zeros_like(loss)), None

    def _possible(self, batch: BatchTree) -> list[TermCounter]:
        left = [counting for counting in candidates(batch) if counting not in self._refuted]
        if not left:
            raise InexactStepError(
                "the model's own loss was seen not to be a mean over examples, and this batch has "
                f"no labels to count; {_WAY_OUT}"
            )
        return left

    def _refuse_undecided(self, batch: BatchTree) -> None:
        possible = self._possible(batch)
        if not _same_weights(possible, batch):
            names = " or ".join(counting.name for counting in possible)
            raise InexactStepError(
                f"the model's own loss is a mean over {names}: these examples cannot tell, but "
                f"differ in them; {_WAY_OUT}"
            )

    def _try(
        self, model: nn.Module, pair: BatchTree, moved: Callable[[BatchTree], BatchTree]
    ) -> bool:
        """Refute what breaks the law on two examples; return whether they could tell."""
        parts = [take(pair, [0]), take(pair, [1])]
        one, other, both = (_loss(model, moved(batch)) for batch in (*parts, pair))
        reading = _Reading(float(one), float(other), float(both), _tolerance(model, both))
        possible = self._possible(pair)
        broken = [c for c in possible if not reading.keeps_the_law(c.terms(pair).tolist())]
        if len(broken) == len(possible):
            again = float(_loss(model, moved(pair)))
            raise InexactStepError(reading.refusal(possible, again))
        self._refuted += broken
        return not reading.says_nothing


@dataclass(frozen=True, slots=True)
class _Reading:
    """The model's loss for two examples, each alone, and for both together."""

    one: float
    other: float
    both: float
    tolerance: float

    @property
    def says_nothing(self) -> bool:
        """Whether any weights would do."""
        return self._equal(self.one, self.both) and self._equal(self.other, self.both)

    def keeps_the_law(self, terms: Sequence[float]) -> bool:
        """Whether both together are the mean of the two, weighted by their terms."""
        alone = list(zip((self.one, self.other), terms, strict=True))
        if any(not count and loss and not math.isnan(loss) for loss, count in alone):
            return False  # Of no terms the sum is 0 and the mean nan, never another number.
        if not any(terms):
            return True
        mean = sum(loss * count for loss, count in alone if count) / sum(terms)
        return self._equal(mean, self.both)

    def refusal(self, tried: Sequence[TermCounter], again: float) -> str:
        """What was seen, and the way out."""
        seen = (
            f"the model's own loss cannot be split: it is {self.one:.9g} and {self.other:.9g} for "
            f"two examples alone, and {self.both:.9g} for both together, which is no mean over "
            + " or ".join(counting.name for counting in tried)
        )
        if not self._equal(again, self.both):
            return (
                f"{seen}; called again on both it is {again:.9g}, so it draws random numbers in "
                f"evaluation mode too: if it is to be split all the same, {_WAY_OUT}"
            )
        if self._equal(self.one + self.other, self.both):
            return f"{seen}; it looks like a sum over examples: {_WAY_OUT}"
        return (
            f"{seen}; {_WAY_OUT} if it is a mean over something else. A loss that compares "
            "examples with one another is not exact in parts: choose a desired batch that fits as "
            "one micro-batch"
        )

    def _equal(self, one: float, other: float) -> bool:
        if math.isnan(one) or math.isnan(other):
            return math.isnan(one) and math.isnan(other)
        known = [abs(v) for v in (self.one, self.other, self.both) if math.isfinite(v)]
        return math.isclose(one, other, rel_tol=0, abs_tol=self.tolerance * max(known, default=0))


def _pairs(possible: Sequence[TermCounter], batch: BatchTree) -> Iterator[BatchTree]:
    """The two examples that differ most in what they hold, of those that have terms."""
    counts = torch.stack([counting.terms(batch) for counting in possible]).cpu()
    least = counts.amin(0)
    if least.count_nonzero() < 2:
        least = counts.amax(0)
    # Padding is zero in one tensor or another, a mask of attention say, whatever the labels say.
    whole = [t for t in tensors(batch) if t.shape[:1] == least.shape and not t.is_floating_point()]
    held = torch.stack([torch.zeros_like(least), *(_count(t.cpu() != 0) for t in whole)]).sum(0)
    order = sorted(zip(least.tolist(), held.tolist(), range(len(least)), strict=True))
    telling = [row for terms, _, row in order if terms]
    if len(telling) > 1:
        yield take(batch, [telling[0], telling[-1]])


def _probes(batch: BatchTree) -> Iterator[BatchTree]:
    """Pairs with all labels hidden but one, so that ways to count differ by the half or more.

    Only where the batch has hidden labels of its own: another model may not know what they are.
    """
    labels = _labels(batch)
    if labels is None or labels.is_floating_point():
        return
    valid = _is_valid(labels)
    late = valid.clone()
    if labels.ndim > 1:
        late[..., 0] = False
    first = valid & ~late
    if valid.all() or not late.any():
        return
    row, one_late = _lone(labels, late)
    if first.any():  # Shifted, it is no term.
        other, one_first = _lone(labels, first)
        yield _with_labels(batch, [other, row], [one_first, one_late])
    nothing = torch.full_like(one_late, _HIDDEN)
    yield _with_labels(batch, [row, row], [nothing, one_late])


def _lone(labels: Tensor, where: Tensor) -> tuple[int, Tensor]:
    """A row, and its labels ``(1, ...)`` with all hidden but one of those that ``where`` marks."""
    row, *place = where.nonzero()[-1].tolist()
    alone = torch.full_like(labels[:1], _HIDDEN)
    alone[(0, *place)] = labels[(row, *place)]
    return row, alone


def _with_labels(batch: BatchTree, rows: Sequence[int], labels: Sequence[Tensor]) -> BatchTree:
    pair = take(batch, rows)
    assert isinstance(pair, Mapping), "only a mapping has labels"
    return {**pair, _labels_key(pair): torch.cat(list(labels))}


def _loss(model: nn.Module, batch: BatchTree) -> Tensor:
    return _required(call_with_labels(model, batch))


def _required(outputs: object) -> Tensor:
    loss = model_loss_of(outputs)
    if loss is None:
        raise TypeError(
            f"the model returned no scalar loss, got {describe(outputs)}; pass labels in every "
            f"batch, or {_WAY_OUT}"
        )
    return loss


def _tolerance(model: nn.Module, loss: Tensor) -> float:
    """That of the coarsest type in the model: a loss in float32 may come of outputs in 16 bits."""
    types = {loss.dtype, *(p.dtype for p in model.parameters() if p.is_floating_point())}
    if torch.is_autocast_enabled(loss.device.type):
        types.add(torch.get_autocast_dtype(loss.device.type))
    return max(_TOLERANCES.get(dtype, _COARSEST_TOLERANCE) for dtype in types)


def _widened(loss: Tensor) -> Tensor:
    """In float32 where it has 16 bits: times its terms it would overflow, or be rounded again."""
    return loss.float() if loss.dtype in (torch.float16, torch.bfloat16) else loss
