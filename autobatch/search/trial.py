"""One trial: a rehearsed window at one size, its verdict and its measurement."""

import math
import time
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Final, Protocol

from autobatch.devices.base import MemoryDevice
from autobatch.devices.oom import MEMORY_VERDICTS, requested_bytes, verdict_of
from autobatch.results.search import Phase, Trial
from autobatch.results.verdict import Verdict

_MESSAGE_LENGTH: Final = 500
_NEAR: Final = 0.5  # A failure below this share of the limit is not explained by what was read.


class SizedRun(Protocol):
    """Training's own step, ready to be tried at any size."""

    def prepare(self, sizes: Sequence[int], mark: Callable[[], None]) -> Callable[[], None]:
        """Return a window of micro-batches and its optimizer step, not yet run.

        Args:
            sizes: Of the micro-batches.
            mark: To be called where one phase ends and the next begins.
        """

    def verify(self, size: int, peak_bytes: int) -> str:
        """Return what is wrong with a size whose window ran, or ``""``."""

    def clear(self) -> None:
        """Let go of what a window leaves: gradients."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRunner:
    """Where trials run.

    Attributes:
        rehearsal: What they run.
        device: Whose memory they use.
        limit_bytes: What they may allocate.
        timeout_seconds: What they may take.
    """

    rehearsal: SizedRun
    device: MemoryDevice
    limit_bytes: int
    timeout_seconds: float = math.inf

    def try_sizes(
        self, sizes: Sequence[int], *, smaller_fits: bool, larger_ran_out: bool = False
    ) -> Trial:
        """Rehearse a window once; an error that says nothing of the size passes through.

        Args:
            sizes: Of the micro-batches, the largest first: the size that is tried.
            smaller_fits: Whether a smaller size has run. Only then, and only if it fails twice,
                does an error that may be memory, or may be anything, count as memory.
            larger_ran_out: Whether a larger size ran out of memory. Only then does it count
                against the size if a single example is refused, as BatchNorm does.
        """
        counted = {*MEMORY_VERDICTS, Verdict.TOO_SLOW}
        if larger_ran_out and min(sizes) == 1:
            counted.add(Verdict.OTHER)
        again = counted | {Verdict.SUSPECT}
        trial = self._run(sizes, again if smaller_fits else counted)
        return self._run(sizes, again) if trial.failure is Verdict.SUSPECT else trial

    def _run(self, sizes: Sequence[int], counted: AbstractSet[Verdict]) -> Trial:
        """Rehearse once; a failure whose verdict does not count passes through."""
        failure: Verdict | None = None
        message, requested = "", 0
        record = _Record(self.device, self.timeout_seconds)
        try:
            self._rehearse(sizes, record)
        except _TooSlowError as error:
            failure, message = Verdict.TOO_SLOW, str(error)
        except Exception as error:
            failure = verdict_of(error)
            if failure not in counted:
                raise
            message, requested = str(error)[:_MESSAGE_LENGTH], requested_bytes(error)
        # Only here has the error let go of the failed window's tensors (its traceback holds every
        # frame), so only here does releasing the cache give them back.
        record.end_phase()
        self.rehearsal.clear()
        seconds = record.seconds()
        if failure is None and record.retries():
            failure, message = Verdict.OUT_OF_MEMORY, _retried(record.retries())
        if failure is None and (message := self._complaint(sizes[0], record.peak_bytes)):
            failure = Verdict.TOO_LARGE
        if failure is not None or not self.device.is_exact:
            self.device.release_cached()  # Nobody after it finds blocks of this one.
        reached = max(record.peak_bytes, record.last_bytes + requested)
        return Trial(
            size=sizes[0],
            fits=failure is None,
            failure=failure,
            peak_bytes=record.peak_bytes if failure is None else None,
            reserved_bytes=record.reserved_bytes if failure is None else None,
            seconds=seconds,
            message=message,
            phases=tuple(record.phases) if failure is None else (),
            explained=failure is None or reached >= _NEAR * self.limit_bytes,
            needed_bytes=0 if failure is None else reached,
        )

    def _complaint(self, size: int, peak_bytes: int) -> str:
        with self.device.limited_to(self.limit_bytes):
            return self.rehearsal.verify(size, peak_bytes)

    def _rehearse(self, sizes: Sequence[int], record: "_Record") -> None:
        """Run the window under the limit; its batch, which may count as well, ends with this."""
        limited = self.device.limited_to(self.limit_bytes)
        with limited if self.device.counts_host else nullcontext():
            window = self.rehearsal.prepare(sizes, record.mark)
            with nullcontext() if self.device.counts_host else limited:
                window()
                self.device.synchronize()
                record.check_time()


class _TooSlowError(Exception):
    """A trial has taken longer than it may."""


class _Record:
    """What is read in a trial, phase by phase; it begins now."""

    def __init__(self, device: MemoryDevice, timeout_seconds: float) -> None:
        self._device = device
        self._timeout_seconds = timeout_seconds
        self._began = time.perf_counter()
        self.phases: list[Phase] = []
        self.reserved_bytes: int | None = None
        device.reset_peak()
        reading = device.read()
        self.last_bytes = reading.allocated_bytes
        self._retries_before = self._retries = reading.retries

    @property
    def peak_bytes(self) -> int:
        """The most bytes allocated at once so far."""
        return max(phase.peak_bytes for phase in self.phases)

    def mark(self) -> None:
        """Begin the next phase.

        Raises:
            _TooSlowError: If it is too late for one.
        """
        self.end_phase()
        self.check_time()
        self._device.reset_peak()

    def end_phase(self) -> None:
        """Read what the phase that ends has used."""
        reading = self._device.read()
        self.phases.append(Phase(floor_bytes=self.last_bytes, peak_bytes=reading.peak_bytes))
        self.last_bytes = reading.allocated_bytes
        self._retries = reading.retries
        if reading.peak_reserved_bytes is not None:
            self.reserved_bytes = max(self.reserved_bytes or 0, reading.peak_reserved_bytes)

    def retries(self) -> int:
        """Return how often the allocator had to give its cache back to make room."""
        return self._retries - self._retries_before

    def seconds(self) -> float:
        """Return how long it has taken."""
        return time.perf_counter() - self._began

    def check_time(self) -> None:
        """Refuse to take longer than the timeout."""
        if self.seconds() > self._timeout_seconds:
            raise _TooSlowError(
                f"took longer than timeout_seconds={self._timeout_seconds:g} allows: "
                f"{self.seconds():.1f} s so far"
            )


def _retried(times: int) -> str:
    return (
        f"ran, but only because the allocator gave its cache back {times} times to make room: "
        "every step of training would wait for that"
    )
