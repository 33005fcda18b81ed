"""Ways to count the terms of a model's own mean."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from autobatch.data.micro_batches import pieces_of
from autobatch.data.tree import BatchTree, size_of
from autobatch.devices.factory import in_widest

_LABELS: Final = ("labels", "target")

_HIDDEN: Final = -100  # The label that torch and transformers leave out of a mean.


@dataclass(frozen=True, slots=True)
class TermCounter:
    """One way to count the terms of a mean.

    Attributes:
        name: For people.
        of_labels: Takes labels ``(examples, ...)``, returns the terms of each example.
    """

    name: str
    of_labels: Callable[[Tensor], Tensor]

    def terms(self, batch: BatchTree) -> Tensor:
        """Return the terms of each example of a batch, ``(examples,)``, in float64."""
        found = [(_labels(piece), size_of(piece)) for piece in pieces_of(batch)]
        return torch.cat(
            [self.of_labels(torch.empty(n) if rows is None else rows) for rows, n in found]
        )


def candidates(batch: BatchTree) -> tuple[TermCounter, ...]:
    """Return what the model's mean over a batch may count, the likeliest first."""
    labels = _labels(pieces_of(batch)[0])
    if labels is None:
        return (_EXAMPLES,)
    if labels.is_floating_point():
        return (_ELEMENTS,)
    return (_VALID, _SHIFTED, _EXAMPLES) if labels.ndim > 1 else (_VALID, _EXAMPLES)


def _same_weights(possible: Sequence[TermCounter], batch: BatchTree) -> bool:
    """Whether every way to count gives each example the same share of the whole."""
    if len(possible) == 1:
        return True
    counts = torch.stack([counting.terms(batch) for counting in possible])
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    return bool((shares - shares[0]).abs().max() <= 1e-12)


def _uneven(batch: BatchTree) -> set[str]:
    """The names under which examples differ in how many of their integers are zero."""
    return {
        str(name)
        for piece in pieces_of(batch)
        if isinstance(piece, Mapping)
        for name, value in piece.items()
        if isinstance(value, Tensor) and value.ndim > 1 and not value.is_floating_point()
        if len(set(value.reshape(len(value), -1).count_nonzero(1).tolist())) > 1
    }


def _labels_key(batch: Mapping[str, BatchTree]) -> str | None:
    """Where the batch has labels, one row an example."""
    found = ((key, batch.get(key)) for key in _LABELS)
    return next((key for key, value in found if isinstance(value, Tensor) and value.ndim), None)


def _labels(batch: BatchTree) -> Tensor | None:
    key = _labels_key(batch) if isinstance(batch, Mapping) else None
    labels = batch[key] if isinstance(batch, Mapping) and key is not None else None
    return labels if isinstance(labels, Tensor) else None


def _is_valid(labels: Tensor) -> Tensor:
    return labels.long() != _HIDDEN  # A byte of 156 would count as -100.


def _count(marks: Tensor) -> Tensor:
    """What is marked in each row; one that has no more dimensions is its only mark."""
    return in_widest(marks.reshape(len(marks), -1).sum(1))


_VALID: Final = TermCounter("valid labels", lambda labels: _count(_is_valid(labels)))

_SHIFTED: Final = TermCounter(
    "shifted valid labels", lambda labels: _count(_is_valid(labels)[..., 1:])
)

_EXAMPLES: Final = TermCounter("examples", lambda labels: in_widest(labels.new_ones(len(labels))))

_ELEMENTS: Final = TermCounter(
    "elements", lambda labels: _count(torch.ones_like(labels, dtype=torch.bool))
)

_ALL: Final = (_VALID, _SHIFTED, _EXAMPLES, _ELEMENTS)
