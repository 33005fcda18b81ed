"""Wrappers around values of a batch that say how the batch is cut."""

from dataclasses import dataclass
from typing import Final, final


@final
@dataclass(frozen=True, slots=True, eq=False)
class Shared:
    """A value that belongs to the batch as a whole, such as the edges of a graph.

    Every micro-batch receives the value undivided. The value does not count towards the number of
    examples. Batches can be joined only if their shared values are equal.

    Return it from the collate function::

        features, targets, adjacency = torch.ones(8, 3), torch.zeros(8), torch.ones(5, 5)
        batch = (features, targets, autobatch.Shared(adjacency))

    Attributes:
        value: A tensor, or any nesting of containers and tensors; of any length.
    """

    value: object


@final
class Examples(list[object]):
    """A list with one item per example, of any shapes: the images or boxes of a detector."""

    __slots__ = ()


@final
@dataclass(frozen=True, slots=True, eq=False)
class RaggedBatch:
    """A logical batch kept as several batches whose shapes differ, so that they cannot be joined.

    Example: text that the loader pads to the longest text of each of its batches.

    Attributes:
        pieces: The batches, in the order of their examples.
    """

    pieces: tuple[object, ...]


MARKERS: Final = (Shared, Examples, RaggedBatch)
