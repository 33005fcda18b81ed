"""The micro-batch size: smaller when memory runs out, larger again after a while."""

from collections.abc import Mapping
from typing import Final

PATIENCE: Final = 16  # Windows without a failure before a larger size is tried again,

LONGEST_PATIENCE: Final = 1024  # and at most so many.

_KEPT: Final = ("size", "_wished", "_largest", "_quiet", "_patience", "_grown_from")


class MicroBatchSize:
    """The largest micro-batch: smaller when memory runs out, and larger again after a while.

    The first failure in a window adds one micro-batch to it, the next two, then four: the step is
    small where memory is just short, and a size far too large still comes down in a few replays.
    After some windows without a failure one micro-batch fewer is tried, up to what was wished. If
    that fails, twice as many windows pass before the next attempt.

    Attributes:
        size: In use; None is the whole batch, until memory runs out.
    """

    def __init__(self, wished: int | None) -> None:
        self.size = wished
        self._wished = wished
        self._largest = 0  # Logical batch so far: a short last one says nothing of the others.
        self._quiet = 0  # Windows since the last failure or attempt.
        self._patience = PATIENCE
        self._grown_from: int | None = None

    def for_window(self, examples: int) -> int:
        """Return the size for a window of so many examples, which now begins."""
        self._largest = max(self._largest, examples)
        if self.size is not None and self._quiet >= self._patience and examples >= self._largest:
            self._grow(examples)
        return min(self.size or examples, examples)

    def ran(self) -> None:
        """Say that a window ran."""
        if self._grown_from is not None or self._is_smaller():
            self._quiet += 1
        if self._quiet >= self._patience:  # What was tried has held for long enough.
            self._grown_from = None

    def failed(self, examples: int, size: int, failures: int) -> int:
        """Say that memory ran out; return the size to try next.

        Args:
            examples: In the logical batch.
            size: The largest micro-batch of the window that failed.
            failures: In this window, this one counted.
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
        """Return what ``load_state_dict`` takes: plain numbers."""
        return {name: vars(self)[name] for name in _KEPT}

    def load_state_dict(self, state: Mapping[str, int | None]) -> None:
        """Go on from there."""
        vars(self).update({name: state[name] for name in _KEPT})

    def _is_smaller(self) -> bool:
        return self.size is not None and self.size < (self._wished or self._largest)

    def _grow(self, examples: int) -> None:
        self._quiet = 0
        wished = min(self._wished or self._largest, examples)
        assert self.size is not None
        if self.size < wished:
            steps = -(-examples // self.size)
            self._grown_from = self.size
            self.size = min(-(-examples // max(steps - 1, 1)), wished)


def smaller_size(examples: int, size: int, failures: int) -> int:
    """Return the size to try after ``size`` did not fit: a smaller one, or 1 again after 1.

    Args:
        examples: In the logical batch.
        size: The micro-batch size that failed.
        failures: In this window, this one counted.
    """
    steps = -(-examples // size) + (1 << (failures - 1))
    return max(1, min(size - 1, -(-examples // steps)))
