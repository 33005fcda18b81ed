"""One trial: a rehearsed window at one size, its verdict and its measurement."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from autobatch.devices.base import MemoryDevice
from autobatch.devices.failures import verdict_of
from autobatch.probing.search import Outcome, Phase
from autobatch.results import Trial, Verdict

_MESSAGE_LENGTH: Final = 500
_NOT_THE_SIZE: Final = (Verdict.OTHER, Verdict.FATAL)
_NEAR: Final = 0.5  # A failure below this share of the limit is not explained by what was read.


class Rehearsal(Protocol):
    """Training's own step, ready to be tried at any size."""

    def prepare(self, size: int, micro_batches: int) -> Callable[[], None]:
        """Return a window of that many micro-batches and its optimizer step, not yet run."""

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

    def try_size(
        self, size: int, micro_batches: int, *, smaller_fits: bool
    ) -> tuple[Trial, Outcome]:
        """Rehearse ``size`` once; an error that says nothing of the size passes through.

        Args:
            size: Examples in each micro-batch.
            micro_batches: Micro-batches in the window.
            smaller_fits: Whether a smaller size has run. Only then, and only if it fails twice,
                does an error that may be memory, or may be anything, count as memory.
        """
        trial, outcome = self._run(size, micro_batches, suspect_is_failure=smaller_fits)
        if trial.failure is Verdict.SUSPECT:
            trial, outcome = self._run(size, micro_batches, suspect_is_failure=True)
        return trial, outcome

    def _run(
        self, size: int, micro_batches: int, *, suspect_is_failure: bool
    ) -> tuple[Trial, Outcome]:
        started = time.perf_counter()
        failure: Verdict | None = None
        message = ""
        floor_bytes = 0
        try:
            window = self.rehearsal.prepare(size, micro_batches)
            self.device.reset_peak()
            floor_bytes = self.device.read().allocated_bytes
            with self.device.limited_to(self.limit_bytes):
                window()
                self.device.synchronize()
        except Exception as error:
            failure = verdict_of(error)
            if failure in _NOT_THE_SIZE or (failure is Verdict.SUSPECT and not suspect_is_failure):
                raise
            message = str(error)[:_MESSAGE_LENGTH]
        # Only here has the error let go of the failed window's tensors (its traceback holds every
        # frame), so only here does releasing the cache give them back.
        reading = self.device.read()
        self.rehearsal.clear()
        if failure is not None:
            self.device.release_cached()
        trial = Trial(
            size=size,
            fits=failure is None,
            failure=failure,
            peak_bytes=reading.peak_bytes if failure is None else None,
            reserved_bytes=reading.peak_reserved_bytes if failure is None else None,
            seconds=time.perf_counter() - started,
            message=message,
        )
        return trial, self._outcome(trial, floor_bytes, reading.peak_bytes)

    def _outcome(self, trial: Trial, floor_bytes: int, peak_bytes: int) -> Outcome:
        if trial.fits:
            phase = Phase(floor_bytes=floor_bytes, peak_bytes=peak_bytes)
            return Outcome(fits=True, phases=(phase,))
        return Outcome(fits=False, explained=peak_bytes >= _NEAR * self.limit_bytes)
