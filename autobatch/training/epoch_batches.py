"""The logical batches of each epoch, from any position in the data on."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from torch.utils.data import DataLoader

from autobatch.data.rebatch import logical_batches
from autobatch.data.source import Source
from autobatch.data.tree import BatchTree, is_same
from autobatch.errors import CheckpointError
from autobatch.training.progress import DataPosition

RandomState = dict[str, object]
SetRandomState = Callable[[RandomState], object]


def keeps_workers(batches: object) -> bool:
    """Return True for a DataLoader whose workers persist from epoch to epoch."""
    return (
        isinstance(batches, DataLoader) and batches.num_workers > 0 and batches.persistent_workers
    )


@dataclass(slots=True, kw_only=True)
class Epochs:
    """Opens one epoch after another; the first one may be half done.

    Attributes:
        source: The data.
        desired: Examples in a full logical batch.
        drop_last: True if a short last logical batch is skipped.
        last: The number of the last epoch, counted from 1.
        position: The position in the data. It advances with the training.
        random_state: Returns the state of all random generators, which is stored with the position;
            None if no checkpoint is written.
    """

    source: Source
    desired: int
    drop_last: bool
    last: int
    position: DataPosition
    random_state: Callable[[], RandomState] | None = None
    _first: BatchTree | None = field(default=None, init=False)
    _stream: Iterator[BatchTree] | None = field(default=None, init=False)

    def open(
        self,
        stopped: RandomState | None = None,
        set_random_state: SetRandomState = lambda _: None,
    ) -> BatchTree | None:
        """Read the logical batch at the position; return None if the epoch has no more.

        Args:
            stopped: The state of all random generators when training stopped; None for a training
                that begins.
            set_random_state: Sets the state of all random generators.

        Raises:
            CheckpointError: If the data holds fewer batches than training has already seen.
        """
        reads = self.position.reads
        if stopped is not None:
            self._start_workers()
            set_random_state(self.position.random or stopped)
        self._stream = self._open_epoch(reads, set_random_state)
        for batches_read in range(self.position.windows):
            if next(self._stream, None) is None:
                raise CheckpointError(
                    f"{self.position.windows} logical batches of epoch {self.position.epoch} were "
                    f"done, and the data holds {batches_read}: this is not the data of that "
                    "training; pass the same data, or choose another directory"
                )
        if stopped is not None and self.position.windows:
            set_random_state(stopped)
        self._first = next(self._stream, None)
        return self._first

    @property
    def first(self) -> BatchTree | None:
        """The logical batch that ``open`` read; None once training has taken it."""
        return self._first

    @property
    def steps(self) -> int | None:
        """The optimizer steps of all epochs together; None if the data has no length."""
        examples = self.source.examples
        if examples is None:
            return None
        full = examples // self.desired
        return self.last * (full if self.drop_last else -(-examples // self.desired))

    def __iter__(self) -> Iterator[tuple[DataPosition, Iterator[BatchTree]]]:
        """Yield for each epoch the position and the logical batches that are left."""
        while self.position.epoch <= self.last:
            yield self.position, self._batches()

    def _batches(self) -> Iterator[BatchTree]:
        stream, self._stream = self._stream or self._open_epoch(), None
        first, self._first = self._first, None
        if first is not None:
            yield first
            del first
        yield from stream

    def _start_workers(self) -> None:
        """Start persistent workers, as the first epoch did.

        Starting the workers draws a random number, which later epochs do not draw.
        """
        loader = self.source.batches
        if self.position.epoch > 1 and keeps_workers(loader):
            iter(loader)

    def _open_epoch(
        self,
        reads: Mapping[int, RandomState] | None = None,
        set_random_state: SetRandomState = lambda _: None,
    ) -> Iterator[BatchTree]:
        if self.random_state is None:
            return logical_batches(self.source.epoch(), self.desired, drop_last=self.drop_last)
        self.position.begin_epoch(self.random_state())
        batches = logical_batches(self.source.epoch(), self.desired, drop_last=self.drop_last)
        return self._recorded(batches, self.random_state, reads or {}, set_random_state)

    def _recorded(
        self,
        batches: Iterator[BatchTree],
        random_state: Callable[[], RandomState],
        reads: Mapping[int, RandomState],
        set_random_state: SetRandomState,
    ) -> Iterator[BatchTree]:
        """Yield the batches, and record the random states of those whose reading draws numbers.

        A resumed training reads the batches that are done without taking their steps, so the
        generators are set to the recorded state before each of these batches.

        Args:
            batches: The logical batches of a whole epoch.
            random_state: Returns the state of all random generators.
            reads: The recorded states, by the batch's number in the epoch, counted from 0.
            set_random_state: Sets the state of all random generators.
        """
        for number in itertools.count():
            before = random_state()
            if number in reads:
                set_random_state({**before, **reads[number]})
                before = random_state()
            batch = next(batches, None)
            if batch is None:
                return
            after = random_state()
            drawn = {name: was for name, was in before.items() if not is_same(was, after[name])}
            if drawn:
                self.position.reads[number] = drawn
            yield batch
            del batch  # Before the next one is read.
