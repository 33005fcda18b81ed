"""Priors: guesses of the tolerable batch that exist before the search."""

import bisect
import operator
from dataclasses import dataclass
from typing import Any, Protocol


class HasTolerable(Protocol):
    """An object that predicts a tolerable batch, such as a ``Prediction``.

    The object may also have an attribute ``prior`` with a ``Prior``, which holds more detail.
    """

    @property
    def tolerable(self) -> int:
        """The predicted tolerable batch in examples; 0 if not even one is expected to fit."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Prior:
    """A first guess of the answer, which one small trial corrects.

    It holds plain numbers only, so that the options of an isolated search can be sent to its
    process.

    Attributes:
        tolerable: The guess, in examples, before any correction.
        limit_bytes: The limit for which ``tolerable`` was predicted, if ``peaks`` are known.
        peaks: Pairs of a size and its predicted peak in bytes, by ascending size. With fewer than
            two pairs, ``tolerable`` is not corrected.

    Raises:
        ValueError: If a number is out of range.
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
        """Return the largest size expected to fit, corrected by a size that ran; or 0.

        Two corrections are made. The difference between the read peak and the predicted peak (such
        as a workspace of cuDNN) is added to the peak of every size. The room for tensors is scaled
        by the ratio of the two limits: the prediction left some of its limit to fragmentation.

        Args:
            size: A size that ran.
            peak_bytes: The peak of that size; 0 if memory was not read.
            limit_bytes: The bytes that a step may allocate.
        """
        if len(self.peaks) < 2 or not peak_bytes:
            return self.tolerable
        unpredicted = peak_bytes - self._peak(size)
        room = self._peak(self.tolerable) * limit_bytes // self.limit_bytes - unpredicted
        return bisect.bisect_right(range(1, self.peaks[-1][0] + 1), room, key=self._peak)

    def _peak(self, size: int) -> int:
        """Return the predicted peak of a size, interpolated between its neighbours."""
        place = bisect.bisect_left(self.peaks, size, 1, len(self.peaks) - 1, key=lambda p: p[0])
        (early, low), (late, high) = self.peaks[place - 1 : place + 1]
        return low + (high - low) * (size - early) // (late - early)


def as_prior(given: object) -> Prior | None:
    """Return the user's argument ``prior`` as a ``Prior``.

    Raises:
        TypeError, ValueError: If the argument holds no size, with the argument.
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
