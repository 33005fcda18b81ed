"""The logical batches of each epoch, from wherever a training stands."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from torch.utils.data import DataLoader

from autobatch.data.rebatch import logical_batches
from autobatch.data.source import Source
from autobatch.data.tree import BatchTree, is_same
from autobatch.errors import CheckpointError
from autobatch.training.progress import DataPosition

Random = dict[str, object]
PutBack = Callable[[Random], object]


def keeps_workers(batches: object) -> bool:
    """Whether these are of a DataLoader whose workers live on from epoch to epoch."""
    return (
        isinstance(batches, DataLoader) and batches.num_workers > 0 and batches.persistent_workers
    )


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
    place: DataPosition
    note: Callable[[], Random] | None = None
    _first: BatchTree | None = field(default=None, init=False)
    _stream: Iterator[BatchTree] | None = field(default=None, init=False)

    def open(
        self, stopped: Random | None = None, put_back: PutBack = lambda _: None
    ) -> BatchTree | None:
        """Read the next logical batch, which training begins with; None if the epoch has none.

        Args:
            stopped: Where all random generators were when training stopped; None if it begins.
            put_back: Sets them to where they were.

        Raises:
            CheckpointError: If the data holds fewer batches than training has seen.
        """
        reads = self.place.reads
        if stopped is not None:
            self._start_workers()
            put_back(self.place.random or stopped)
        self._stream = self._begun(reads, put_back)
        for window in range(self.place.windows):
            if next(self._stream, None) is None:
                raise CheckpointError(
                    f"{self.place.windows} logical batches of epoch {self.place.epoch} were done, "
                    f"and the data holds {window}: it is not the data of that training"
                )
        if stopped is not None and self.place.windows:
            put_back(stopped)
        self._first = next(self._stream, None)
        return self._first

    @property
    def first(self) -> BatchTree | None:
        """The logical batch that ``open`` has read, until training takes it."""
        return self._first

    def __iter__(self) -> Iterator[tuple[DataPosition, Iterator[BatchTree]]]:
        """Yield the place and the logical batches that are left, epoch by epoch."""
        while self.place.epoch <= self.last:
            yield self.place, self._batches()

    def _batches(self) -> Iterator[BatchTree]:
        stream, self._stream = self._stream or self._begun(), None
        first, self._first = self._first, None
        if first is not None:
            yield first
            del first
        yield from stream

    def _start_workers(self) -> None:
        """Start workers that persist, as the first epoch did.

        Starting them draws a random number, which no later epoch draws.
        """
        loader = self.source.batches
        if self.place.epoch > 1 and keeps_workers(loader):
            iter(loader)

    def _begun(
        self, reads: Mapping[int, Random] | None = None, put_back: PutBack = lambda _: None
    ) -> Iterator[BatchTree]:
        if self.note is None:
            return logical_batches(self.source.epoch(), self.desired, drop_last=self.drop_last)
        self.place.random, self.place.reads = self.note(), {}
        batches = logical_batches(self.source.epoch(), self.desired, drop_last=self.drop_last)
        return self._noted(batches, self.note, reads or {}, put_back)

    def _noted(
        self,
        batches: Iterator[BatchTree],
        note: Callable[[], Random],
        reads: Mapping[int, Random],
        put_back: PutBack,
    ) -> Iterator[BatchTree]:
        """Yield the batches, and note what those that draw random numbers when read begin with.

        Who reads them again draws nothing in between, as steps did.

        Args:
            batches: Of a whole epoch.
            note: Returns where all random generators are.
            reads: What was noted when they were first read, by number.
            put_back: Sets the generators.
        """
        for window in itertools.count():
            before = note()
            if window in reads:
                put_back({**before, **reads[window]})
                before = note()
            batch = next(batches, None)
            if batch is None:
                return
            after = note()
            drawn = {name: was for name, was in before.items() if not is_same(was, after[name])}
            if drawn:
                self.place.reads[window] = drawn
            yield batch
            del batch  # Before the next one is read.
