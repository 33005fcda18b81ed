"""The logical batches of each epoch, from wherever a training stands."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from autobatch.batches.nest import Nest
from autobatch.batches.regroup import Source, logical_batches
from autobatch.errors import CheckpointError
from autobatch.training.progress import Place

Random = dict[str, object]


@dataclass(slots=True, kw_only=True)
class Epochs:
    """Opens epochs, each in its turn; the first may be one that is half done.

    Attributes:
        source: The data.
        desired: Examples in a full logical batch.
        drop_last: Whether a short last one is left out.
        last: The last epoch.
        place: Where training stands; it moves along.
        note: Returns where all random generators are, to be kept with the place; None where no
            checkpoint is written.
    """

    source: Source
    desired: int
    drop_last: bool
    last: int
    place: Place
    note: Callable[[], Random] | None = None
    _first: Nest | None = field(default=None, init=False)
    _stream: Iterator[Nest] | None = field(default=None, init=False)

    def open(self, go_on: Callable[[], None] = lambda: None) -> Nest | None:
        """Read the next logical batch, which training begins with; None if the epoch has none.

        Args:
            go_on: Sets all random generators to where they were when training stopped; called
                when the batches that it had seen have been passed over.

        Raises:
            CheckpointError: If the data holds fewer batches than training has seen.
        """
        self._stream = self._begun()
        for window in range(self.place.windows):
            if next(self._stream, None) is None:
                raise CheckpointError(
                    f"{self.place.windows} logical batches of epoch {self.place.epoch} were done, "
                    f"and the data holds {window}: it is not the data of that training"
                )
        go_on()
        self._first = next(self._stream, None)
        return self._first

    def __iter__(self) -> Iterator[tuple[Place, Iterator[Nest]]]:
        """Yield the place and the logical batches that are left, epoch by epoch."""
        while self.place.epoch <= self.last:
            yield self.place, self._batches()

    def _batches(self) -> Iterator[Nest]:
        stream, self._stream = self._stream or self._begun(), None
        first, self._first = self._first, None
        if first is not None:
            yield first
            del first
        yield from stream

    def _begun(self) -> Iterator[Nest]:
        if self.note is not None and not self.place.windows:
            self.place.random = self.note()
        return logical_batches(self.source.epoch(), self.desired, drop_last=self.drop_last)
