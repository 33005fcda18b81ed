"""One trial: a rehearsed window at one size, its verdict and its measurement."""

import time
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Final, Protocol

from autobatch.devices.base import MemoryDevice
from autobatch.devices.failures import verdict_of
from autobatch.probing.search import Outcome, Phase
from autobatch.results import Trial, Verdict

_MESSAGE_LENGTH: Final = 500
_NEAR: Final = 0.5  # A failure below this share of the limit is not explained by what was read.


class Rehearsal(Protocol):
    """Training's own step, ready to be tried at any size."""

    def prepare(self, sizes: Sequence[int]) -> Callable[[], None]:
        """Return a window of micro-batches and its optimizer step, not yet run."""

    def clear(self) -> None:
        """Let go of what a window leaves: gradients."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Where trials run.

    Attributes:
        rehearsal: What they run.
        device: Whose memory they use.
        limit_bytes: What they may allocate.
    """

    rehearsal: Rehearsal
    device: MemoryDevice
    limit_bytes: int

    def try_sizes(
        self, sizes: Sequence[int], *, smaller_fits: bool, larger_ran_out: bool = False
    ) -> tuple[Trial, Outcome]:
        """Rehearse a window once; an error that says nothing of the size passes through.

        Args:
            sizes: Of the micro-batches, the largest first: the size that is tried.
            smaller_fits: Whether a smaller size has run. Only then, and only if it fails twice,
                does an error that may be memory, or may be anything, count as memory.
            larger_ran_out: Whether a larger size ran out of memory. Only then does it count
                against the size if a single example is refused, as BatchNorm does.
        """
        counted = {Verdict.OUT_OF_MEMORY, Verdict.TOO_LARGE}
        if larger_ran_out and min(sizes) == 1:
            counted.add(Verdict.OTHER)
        again = counted | {Verdict.SUSPECT}
        trial, outcome = self._run(sizes, again if smaller_fits else counted)
        if trial.failure is Verdict.SUSPECT:
            return self._run(sizes, again)
        return trial, outcome

    def _run(self, sizes: Sequence[int], counted: AbstractSet[Verdict]) -> tuple[Trial, Outcome]:
        """Rehearse once; a failure whose verdict does not count passes through."""
        started = time.perf_counter()
        failure: Verdict | None = None
        message = ""
        floor_bytes = 0
        try:
            self.device.reset_peak()
            floor_bytes = self.device.read().allocated_bytes
            self._rehearse(sizes)
        except Exception as error:
            failure = verdict_of(error)
            if failure not in counted:
                raise
            message = str(error)[:_MESSAGE_LENGTH]
        # Only here has the error let go of the failed window's tensors (its traceback holds every
        # frame), so only here does releasing the cache give them back.
        reading = self.device.read()
        self.rehearsal.clear()
        if failure is not None:
            self.device.release_cached()
        trial = Trial(
            size=sizes[0],
            fits=failure is None,
            failure=failure,
            peak_bytes=reading.peak_bytes if failure is None else None,
            reserved_bytes=reading.peak_reserved_bytes if failure is None else None,
            seconds=time.perf_counter() - started,
            message=message,
        )
        return trial, self._outcome(trial, floor_bytes, reading.peak_bytes)

    def _rehearse(self, sizes: Sequence[int]) -> None:
        """Run the window under the limit; its batch, which may count as well, ends with this."""
        limited = self.device.limited_to(self.limit_bytes)
        with limited if self.device.counts_host else nullcontext():
            window = self.rehearsal.prepare(sizes)
            with nullcontext() if self.device.counts_host else limited:
                window()
                self.device.synchronize()

    def _outcome(self, trial: Trial, floor_bytes: int, peak_bytes: int) -> Outcome:
        if trial.fits:
            phase = Phase(floor_bytes=floor_bytes, peak_bytes=peak_bytes)
            return Outcome(fits=True, phases=(phase,))
        return Outcome(fits=False, explained=peak_bytes >= _NEAR * self.limit_bytes)
