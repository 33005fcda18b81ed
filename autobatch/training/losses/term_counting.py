"""Ways to count the terms of a mean that a model returns as its own loss."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from autobatch.data.micro_batches import pieces_of
from autobatch.data.tree import BatchTree, size_of
from autobatch.devices.factory import in_widest
from autobatch.training.losses.forward import TARGET_KEYS

IGNORED_LABEL: Final = -100
"""The label that torch and transformers leave out of a mean."""


@dataclass(frozen=True, slots=True)
class TermCounter:
    """One way to count the terms of a mean.

    Attributes:
        name: What is counted, for messages.
        of_labels: Takes labels ``(examples, ...)``, returns the terms of each example.
    """

    name: str
    of_labels: Callable[[Tensor], Tensor]

    def terms(self, batch: BatchTree) -> Tensor:
        """Return the terms of each example of a batch, ``(examples,)``, in float64."""
        found = [(labels_of(piece), size_of(piece)) for piece in pieces_of(batch)]
        return torch.cat(
            [self.of_labels(torch.empty(n) if rows is None else rows) for rows, n in found]
        )


def candidates(batch: BatchTree) -> tuple[TermCounter, ...]:
    """Return what the model's mean over a batch may count, the likeliest first."""
    labels = labels_of(pieces_of(batch)[0])
    if labels is None:
        return (EXAMPLES,)
    if labels.is_floating_point():
        return (ELEMENTS,)
    return (VALID_LABELS, SHIFTED_LABELS, EXAMPLES) if labels.ndim > 1 else (VALID_LABELS, EXAMPLES)


def give_same_weights(counters: Sequence[TermCounter], batch: BatchTree) -> bool:
    """Return True if every counter gives each example the same weight in the mean."""
    if len(counters) == 1:
        return True
    counts = torch.stack([counter.terms(batch) for counter in counters])
    weights = counts / counts.sum(1, keepdim=True).clamp(min=1)
    return bool((weights - weights[0]).abs().max() <= 1e-12)


def names_with_uneven_zeros(batch: BatchTree) -> set[str]:
    """Return the names of the integer tensors in which examples have different numbers of zeros."""
    return {
        str(name)
        for piece in pieces_of(batch)
        if isinstance(piece, Mapping)
        for name, value in piece.items()
        if isinstance(value, Tensor) and value.ndim > 1 and not value.is_floating_point()
        if len(set(value.reshape(len(value), -1).count_nonzero(1).tolist())) > 1
    }


def labels_key(batch: Mapping[str, BatchTree]) -> str | None:
    """Return the key under which a batch has labels, one row an example; None without labels."""
    found = ((key, batch.get(key)) for key in TARGET_KEYS)
    return next((key for key, value in found if isinstance(value, Tensor) and value.ndim), None)


def labels_of(batch: BatchTree) -> Tensor | None:
    """Return the labels of a batch, one row an example; None without labels."""
    key = labels_key(batch) if isinstance(batch, Mapping) else None
    labels = batch[key] if isinstance(batch, Mapping) and key is not None else None
    return labels if isinstance(labels, Tensor) else None


def is_valid(labels: Tensor) -> Tensor:
    """Return which labels are terms of a mean over valid labels, as a tensor of the same shape."""
    return labels.long() != IGNORED_LABEL  # As a byte, -100 would be equal to 156.


def count_marked(marks: Tensor) -> Tensor:
    """Return the number of marks in each row, ``(examples,)``; marks may have one dimension."""
    return in_widest(marks.reshape(len(marks), -1).sum(1))


VALID_LABELS: Final = TermCounter("valid labels", lambda labels: count_marked(is_valid(labels)))
"""Counts the labels that are not ignored."""

SHIFTED_LABELS: Final = TermCounter(
    "shifted valid labels", lambda labels: count_marked(is_valid(labels)[..., 1:])
)
"""Counts valid labels without the first, as a causal language model does."""

EXAMPLES: Final = TermCounter("examples", lambda labels: in_widest(labels.new_ones(len(labels))))
"""Counts 1 for each example."""

ELEMENTS: Final = TermCounter(
    "elements", lambda labels: count_marked(torch.ones_like(labels, dtype=torch.bool))
)
"""Counts the numbers in floating labels."""

COUNTERS: Final = {
    counter.name: counter for counter in (VALID_LABELS, SHIFTED_LABELS, EXAMPLES, ELEMENTS)
}
"""All counters by name."""
