"""The micro-batch size: smaller when memory runs out, larger again after a while."""

from collections.abc import Mapping
from typing import Final

PATIENCE: Final = 16  # Windows without a failure, after which a larger size is tried again.
LONGEST_PATIENCE: Final = 1024  # PATIENCE doubles after each failed attempt, up to this.

_STATE: Final = ("size", "_requested", "_largest", "_quiet", "_patience", "_grown_from")


class MicroBatchSize:
    """The largest micro-batch: smaller when memory runs out, and larger again after a while.

    A window is the micro-batches between two optimizer steps. The first failure in a window adds
    one micro-batch to it, the second two, the third four: the size shrinks a little if memory is
    just too small, and a size far too large still comes down within a few retries. After some
    windows without a failure a size with one micro-batch fewer is tried, up to the requested size.
    If that fails, twice as many windows pass before the next attempt.

    Args:
        requested: Examples in the largest micro-batch; None is the whole logical batch.

    Attributes:
        size: The size in use; None is the whole logical batch, until memory runs out.
    """

    def __init__(self, requested: int | None) -> None:
        self.size = requested
        self._requested = requested
        self._largest = 0  # The largest logical batch so far; the last of an epoch may be short.
        self._quiet = 0  # Windows since the last failure, or since a larger size was tried.
        self._patience = PATIENCE
        self._grown_from: int | None = None

    def for_window(self, examples: int) -> int:
        """Return the size for the next window, which has this many examples."""
        self._largest = max(self._largest, examples)
        if self.size is not None and self._quiet >= self._patience and examples >= self._largest:
            self._grow(examples)
        return min(self.size or examples, examples)

    def succeeded(self) -> None:
        """Record that a window ran without a failure."""
        if self._grown_from is not None or self._is_smaller():
            self._quiet += 1
        if self._quiet >= self._patience:  # The larger size has lasted long enough.
            self._grown_from = None

    def failed(self, examples: int, size: int, failures: int) -> int:
        """Record that memory ran out, and return the size to try next.

        Args:
            examples: Examples in the logical batch.
            size: Examples in the largest micro-batch of the failed attempt.
            failures: Failures in this window, with this one.
        """
        self._quiet = 0
        smaller = smaller_size(examples, size, failures)
        if self._grown_from is not None and size > self._grown_from:
            self._patience = min(2 * self._patience, LONGEST_PATIENCE)
            smaller = self.size = self._grown_from
            self._grown_from = None
        elif examples >= min(self.size or self._largest, self._largest):
            self.size = smaller
        return smaller

    def state_dict(self) -> dict[str, int | None]:
        """Return the state as plain numbers."""
        return {name: vars(self)[name] for name in _STATE}

    def load_state_dict(self, state: Mapping[str, int | None]) -> None:
        """Continue from what ``state_dict`` returned."""
        vars(self).update({name: state[name] for name in _STATE})

    def _is_smaller(self) -> bool:
        return self.size is not None and self.size < (self._requested or self._largest)

    def _grow(self, examples: int) -> None:
        self._quiet = 0
        largest = min(self._requested or self._largest, examples)
        assert self.size is not None
        if self.size < largest:
            steps = -(-examples // self.size)
            self._grown_from = self.size
            self.size = min(-(-examples // max(steps - 1, 1)), largest)


def smaller_size(examples: int, size: int, failures: int) -> int:
    """Return the size to try after ``size`` did not fit: a smaller one, or 1 again after 1.

    Args:
        examples: Examples in the logical batch.
        size: The micro-batch size that failed.
        failures: Failures in this window, with this one.
    """
    steps = -(-examples // size) + (1 << (failures - 1))
    return max(1, min(size - 1, -(-examples // steps)))
