"""Run one trial: a window of micro-batches at one size, with its memory and its verdict."""

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
_NEAR: Final = 0.5  # Readings explain a failure only above this share of the limit.


class TrialProgram(Protocol):
    """Code that a trial runs at any size: a training step, an inference or a user's function."""

    def prepare(self, sizes: Sequence[int], mark: Callable[[], None]) -> Callable[[], None]:
        """Return a function that runs a window: its micro-batches, then the optimizer step.

        Args:
            sizes: Examples in each micro-batch.
            mark: The window calls this where one phase of its memory ends and the next begins.
        """

    def verify(self, size: int, peak_bytes: int) -> str:
        """Return why a size whose window ran is still not usable; ``""`` if it is."""

    def clear(self) -> None:
        """Delete what a window leaves behind, such as gradients."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRunner:
    """Runs trials of one program on one device, under one limit.

    Attributes:
        program: What the trials run.
        device: The device whose memory is limited and read.
        limit_bytes: The bytes that a trial may allocate.
        timeout_seconds: The longest time of a trial; the time is checked between phases.
    """

    program: TrialProgram
    device: MemoryDevice
    limit_bytes: int
    timeout_seconds: float = math.inf

    def try_sizes(
        self, sizes: Sequence[int], *, smaller_fits: bool, larger_ran_out: bool = False
    ) -> Trial:
        """Run a window and return its trial; errors unrelated to the size pass through.

        Args:
            sizes: Examples in each micro-batch, the largest first; the first is the tried size.
            smaller_fits: Whether a smaller size has run. If so, an error of verdict ``SUSPECT``
                counts as a failure of the size when it comes twice; otherwise it passes through.
            larger_ran_out: Whether a larger size ran out of memory. If so, any error of a window
                with a single example counts as a failure of the size: BatchNorm refuses one
                example.
        """
        counted = {*MEMORY_VERDICTS, Verdict.TOO_SLOW}
        if larger_ran_out and min(sizes) == 1:
            counted.add(Verdict.OTHER)
        again = counted | {Verdict.SUSPECT}
        trial = self._attempt(sizes, again if smaller_fits else counted)
        return self._attempt(sizes, again) if trial.failure is Verdict.SUSPECT else trial

    def _attempt(self, sizes: Sequence[int], counted: AbstractSet[Verdict]) -> Trial:
        """Run the window once; errors whose verdict is not in ``counted`` pass through."""
        failure: Verdict | None = None
        message, requested = "", 0
        record = _MemoryRecord(self.device, self.timeout_seconds)
        try:
            self._run_window(sizes, record)
        except _TooSlowError as error:
            failure, message = Verdict.TOO_SLOW, str(error)
        except Exception as error:
            failure = verdict_of(error)
            if failure not in counted:
                raise
            message, requested = str(error)[:_MESSAGE_LENGTH], requested_bytes(error)
        # The traceback of the error holds the tensors of the failed window until the except block
        # ends, so the cache is released only after it.
        record.end_phase()
        self.program.clear()
        seconds = record.seconds()
        if failure is None and record.retries():
            failure, message = Verdict.OUT_OF_MEMORY, _cache_released(record.retries())
        if failure is None and (message := self._kernel_error(sizes[0], record.peak_bytes)):
            failure = Verdict.TOO_LARGE
        if failure is not None or not self.device.is_exact:
            self.device.release_cached()  # The next trial must reuse no cached block.
        reached = max(record.peak_bytes, record.allocated_bytes + requested)
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

    def _kernel_error(self, size: int, peak_bytes: int) -> str:
        with self.device.limited_to(self.limit_bytes):
            return self.program.verify(size, peak_bytes)

    def _run_window(self, sizes: Sequence[int], record: "_MemoryRecord") -> None:
        """Run the window under the limit; where host memory is limited, its batch counts too."""
        limited = self.device.limited_to(self.limit_bytes)
        with limited if self.device.counts_host else nullcontext():
            window = self.program.prepare(sizes, record.mark)
            with nullcontext() if self.device.counts_host else limited:
                window()
                self.device.synchronize()
                record.check_time()


class _TooSlowError(Exception):
    """A trial took longer than its timeout."""


class _MemoryRecord:
    """The memory of a trial that starts now, read phase by phase."""

    def __init__(self, device: MemoryDevice, timeout_seconds: float) -> None:
        self._device = device
        self._timeout_seconds = timeout_seconds
        self._began = time.perf_counter()
        self.phases: list[Phase] = []
        self.reserved_bytes: int | None = None
        device.reset_peak()
        reading = device.read()
        self.allocated_bytes = reading.allocated_bytes
        self._retries_before = self._retries = reading.retries

    @property
    def peak_bytes(self) -> int:
        """The highest peak of the phases so far."""
        return max(phase.peak_bytes for phase in self.phases)

    def mark(self) -> None:
        """Begin the next phase.

        Raises:
            _TooSlowError: If the trial has taken longer than its timeout.
        """
        self.end_phase()
        self.check_time()
        self._device.reset_peak()

    def end_phase(self) -> None:
        """End the phase, and record its peak."""
        reading = self._device.read()
        self.phases.append(Phase(floor_bytes=self.allocated_bytes, peak_bytes=reading.peak_bytes))
        self.allocated_bytes = reading.allocated_bytes
        self._retries = reading.retries
        if reading.peak_reserved_bytes is not None:
            self.reserved_bytes = max(self.reserved_bytes or 0, reading.peak_reserved_bytes)

    def retries(self) -> int:
        """Return how often the allocator had to release its cache to find room."""
        return self._retries - self._retries_before

    def seconds(self) -> float:
        """Return the seconds since the trial started."""
        return time.perf_counter() - self._began

    def check_time(self) -> None:
        """Raise if the trial has taken longer than its timeout."""
        if self.seconds() > self._timeout_seconds:
            raise _TooSlowError(
                f"took longer than timeout_seconds={self._timeout_seconds:g} allows: "
                f"{self.seconds():.1f} s so far"
            )


def _cache_released(times: int) -> str:
    return (
        f"ran, but only after the allocator released its cache {times} times to find room: "
        "every step of training would wait for that"
    )
