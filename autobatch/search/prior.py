"""What is known of a tolerable batch before it is searched for."""

import bisect
import operator
from dataclasses import dataclass
from typing import Any, Protocol


class HasTolerable(Protocol):
    """What knows a tolerable batch before it is searched for, as a prediction does.

    It may have a ``prior`` too: a ``Prior`` that says more.
    """

    @property
    def tolerable(self) -> int:
        """Examples; 0 where not even one is expected to fit."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Prior:
    """A first guess of the answer, which one small trial corrects.

    Plain numbers: an isolated search is sent its options, and a prediction holds a model.

    Attributes:
        tolerable: The guess as it is, in examples.
        limit_bytes: Under which limit, where ``peaks`` are known.
        peaks: Sizes, ascending, and the bytes that each is expected to allocate at its peak; fewer
            than two say nothing.

    Raises:
        ValueError: If a number cannot be.
    """

    tolerable: int
    limit_bytes: int = 1
    peaks: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        sizes = [size for size, _ in self.peaks]
        if self.tolerable < 0 or self.limit_bytes < 1 or sizes != sorted(set(sizes)):
            raise ValueError(
                "a prior must be at least 0, under a limit of at least a byte, with peaks of "
                f"ascending sizes, got {self.tolerable}, {self.limit_bytes}, {self.peaks}"
            )

    def corrected(self, size: int, peak_bytes: int, limit_bytes: int) -> int:
        """Return the guess, now that a size has run: the largest size expected to fit, or 0.

        What cannot be seen beforehand (a workspace of cuDNN, what else the process holds) has
        raised that size's peak over what was expected, and is taken to raise every other's as much.
        What the device really leaves (its context, other processes) is the limit of the search; of
        it tensors get the share that was expected, for the allocator splits up the rest.

        Args:
            size: That ran.
            peak_bytes: What it allocated at its peak; 0 where nothing was read.
            limit_bytes: What a step may allocate.
        """
        if len(self.peaks) < 2 or not peak_bytes:
            return self.tolerable
        unseen = peak_bytes - self._peak(size)
        room = self._peak(self.tolerable) * limit_bytes // self.limit_bytes - unseen
        return bisect.bisect_right(range(1, self.peaks[-1][0] + 1), room, key=self._peak)

    def _peak(self, size: int) -> int:
        """Return what a size is expected to allocate, on the line between its neighbours."""
        place = bisect.bisect_left(self.peaks, size, 1, len(self.peaks) - 1, key=lambda p: p[0])
        (early, low), (late, high) = self.peaks[place - 1 : place + 1]
        return low + (high - low) * (size - early) // (late - early)


def as_prior(given: object) -> Prior | None:
    """Return what a user has given as a prior.

    Raises:
        TypeError, ValueError: If it says no size, with the value that came.
    """
    if given is None or isinstance(given, Prior):
        return given
    known = getattr(given, "prior", None)
    if isinstance(known, Prior):
        return known
    guess: Any = getattr(given, "tolerable", given)
    refusal = TypeError(f"prior must be an integer, a Prediction or None, got {given!r}")
    if isinstance(guess, bool):
        raise refusal
    try:
        size = operator.index(guess)
    except TypeError:
        raise refusal from None
    if size < 0:
        raise ValueError(f"prior must be at least 0, got {size}")
    return Prior(tolerable=size)
