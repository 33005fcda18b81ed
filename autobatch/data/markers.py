"""What is put around values to say how a batch is cut."""

from dataclasses import dataclass
from typing import Final, final


@final
@dataclass(frozen=True, slots=True, eq=False)
class Shared:
    """A tensor, or any nest, that belongs to the batch as a whole, whatever its length.

    It goes undivided to every micro-batch, and says nothing of the number of examples. Batches that
    are joined must hold equal ones. For what is not one row an example, as a graph's edges::

        return features, targets, autobatch.Shared(adjacency)

    Attributes:
        value: What is shared.
    """

    value: object


@final
class Examples(list[object]):
    """A list that holds one item an example, of any shapes: images and boxes of a detector."""

    __slots__ = ()


@final
@dataclass(frozen=True, slots=True, eq=False)
class RaggedBatch:
    """A logical batch that is kept as several, for they cannot be joined.

    Such is text that was padded to the length of each of the loader's batches.

    Attributes:
        pieces: Each is a batch; their examples follow one another.
    """

    pieces: tuple[object, ...]


MARKS: Final = (Shared, Examples, RaggedBatch)
