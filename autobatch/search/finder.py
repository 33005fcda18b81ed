"""Run a search trial by trial: try sizes, report trials to the observer, return the result."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Final

from autobatch.devices.base import MemoryDevice, outside_changed
from autobatch.devices.memory_notes import advice
from autobatch.devices.oom import verdict_of
from autobatch.errors import AutobatchError, DeviceLostError, DoesNotFitError, SearchTimeoutError
from autobatch.events import Observer, SearchEnded, SearchStarted, TrialEnded, TrialStarted
from autobatch.results.memory import Breakdown
from autobatch.results.search import LimitedBy, SearchResult, Trial
from autobatch.results.verdict import Verdict
from autobatch.search.bracketing import BracketingSearch, Outcome
from autobatch.search.options import SearchOptions
from autobatch.search.trial import TrialProgram, TrialRunner
from autobatch.units import count

_ROUNDING_BYTES: Final = 2 << 20  # A caching allocator reserves multiples of this.
_MOST_CHANGES: Final = 3  # Changes of other processes' memory that prolong the search.
_SLOWDOWN: Final = 4.0  # A size this many times slower per example than a smaller one is spilling.
_SLOWDOWN_SECONDS: Final = 1.0  # Shorter trials may be slow by chance.
_OTHER_LIMITS: Final[Mapping[Verdict | None, LimitedBy]] = {
    Verdict.TOO_LARGE: "kernel",
    Verdict.TOO_SLOW: "time",
    Verdict.FATAL: "crash",
}


@dataclass(slots=True, kw_only=True)
class BatchSizeFinder:
    """Searches the largest size at which a program runs on one device.

    Trials change the model; the caller restores it.

    Attributes:
        program: What a trial runs.
        device: The device that it runs on.
        limit_bytes: Returns the bytes that a trial may allocate now.
        breakdown: Returns where memory goes under a limit at a trial, which may have failed.
        observer: Receives an event for every trial.
        options: How to search.
        worst_case: Which examples the trials repeat, in words.
        history: Trials of another process. The search uses them without an event.
    """

    program: TrialProgram
    device: MemoryDevice
    limit_bytes: Callable[[], int]
    breakdown: Callable[[int, Trial], Breakdown]
    observer: Observer
    options: SearchOptions = field(default_factory=SearchOptions)
    worst_case: str = ""
    history: Sequence[Trial] = ()
    _trials: list[Trial] = field(default_factory=list, init=False)
    # Trials with a smaller index ran before the memory of other processes changed.
    _valid_from: int = field(default=0, init=False)

    def largest(
        self,
        candidates: Sequence[int],
        *,
        windows: Callable[[int], Sequence[int]],
        reason: LimitedBy,
        saved_bytes: Callable[[int], int] = lambda _: 0,
        ceiling_first: bool = False,
    ) -> SearchResult:
        """Return the largest candidate that ran inside the limit.

        Args:
            candidates: Sizes, ascending.
            windows: Returns the micro-batch sizes that a trial of a size runs, the largest first.
            reason: ``limited_by`` of the result if the ceiling fits.
            saved_bytes: Returns the bytes by which the window of a candidate may use less than the
                windows of smaller candidates.
            ceiling_first: Whether to try the ceiling first, because it may need less memory than
                smaller sizes.

        Raises:
            DoesNotFitError: If no candidate fits.
            SearchTimeoutError: If ``budget_seconds`` passed before the answer was known.
            DeviceLostError: If the device was lost.
        """
        ceiling = candidates[-1]
        began = time.monotonic() - sum(trial.seconds for trial in self.history)
        first, failed = self._make_optimizer_state([windows(size)[:2] for size in candidates[:2]])
        search = BracketingSearch(
            candidates,
            limit_bytes=self.limit_bytes(),
            slack_bytes=0 if self.device.is_exact else _ROUNDING_BYTES,
            confirm=self.options.confirm,
            undivided=ceiling if len(windows(ceiling)) == 1 else None,
            saved_bytes=saved_bytes,
            prior=self.options.first_guess,
        )
        if first is not None and self.device.is_exact:
            search.record_preliminary(first.size, first.phases)
        others = self.device.others()
        self.observer(
            SearchStarted(
                device=self.device.name,
                limit_bytes=search.limit_bytes,
                ceiling=ceiling,
                others=others,
            )
        )
        for trial in self.history:
            self._record(search, trial)
        known = {trial.size for trial in self.history}
        for trial in failed:  # A first step that does not fit is a failed trial.
            if trial.size not in known:
                self._report(search, trial)
        if ceiling_first and ceiling not in {trial.size for trial in self._trials}:
            self.observer(TrialStarted(size=ceiling))
            self._report(search, self._try(windows(ceiling), search))
        self._search(search, windows, began)
        if search.size == 0:
            error = DoesNotFitError(
                candidates[0],
                search.limit_bytes,
                self.breakdown(search.limit_bytes, self._last_memory_failure()),
                self._trials[-1].message,
            )
            for other in others:
                error.add_note(f"on the same device {other}")
            raise error
        found = replace(self._result(search, ceiling, reason), others=others)
        found = replace(found, notes=tuple(advice(self.device.torch_device, found)))
        self.observer(SearchEnded(search=found))
        return found

    def try_window(self, sizes: Sequence[int]) -> Trial:
        """Return the trial of one window with micro-batches of the given sizes."""
        self._make_optimizer_state([(size,) for size in range(1, min(2, sizes[0]) + 1)])
        with _device_loss_reported(0, sizes[0]):
            return self._runner(self.limit_bytes()).try_sizes(sizes, smaller_fits=False)

    def _search(
        self, search: BracketingSearch, windows: Callable[[int], Sequence[int]], began: float
    ) -> None:
        """Try the proposed sizes, and repeat trials whose outcome may be due to other processes."""
        before, changes = self.device.read(), 0
        budget = self.options.budget_seconds
        while True:
            size = search.next()
            if size is None:
                now = self.device.read()
                if changes < _MOST_CHANGES and outside_changed(before, now):
                    before, changes = now, changes + 1
                    search.change_limit(self.limit_bytes())
                    self._valid_from = len(self._trials)
                size = search.next() or self._size_to_repeat(search)
            if size is None:
                return
            if budget is not None and time.monotonic() - began > budget:
                raise SearchTimeoutError(search.size, budget)
            self.observer(TrialStarted(size=size))
            self._report(search, self._try(windows(size), search))

    def _size_to_repeat(self, search: BracketingSearch) -> int | None:
        """The size to try again, if any: first the failure above the answer, then the answer.

        On a GPU, another process may have caused a failure, so the failure must come twice. The
        answer runs once more after a failed trial. Both run again if other processes' memory has
        changed since their last trial.
        """
        if search.size == 0:
            return None
        trials, upper = self._trials, search.upper
        last = {trial.size: index for index, trial in enumerate(trials)}
        if upper.reason == "ran out" and upper.size is not None:
            index = last[upper.size]
            # A size that is too slow, or at which a process died, is not tried again.
            is_memory = trials[index].failure not in _OTHER_LIMITS
            again = not self.device.is_exact and not trials[index].repeated
            if is_memory and (again or index < self._valid_from):
                return upper.size
        index = last[search.size]
        failed_since = any(not trial.fits for trial in trials[index:])
        return search.size if failed_since or index < self._valid_from else None

    def _try(self, sizes: Sequence[int], search: BracketingSearch) -> Trial:
        runner, size = self._runner(search.limit_bytes), sizes[0]

        def run() -> Trial:
            return runner.try_sizes(
                sizes,
                smaller_fits=any(trial.fits for trial in self._trials),
                larger_ran_out=any(not trial.fits for trial in self._trials),
            )

        with _device_loss_reported(search.size, size):
            trial = run()
            if self._is_spilling(trial):
                again = run()
                trial = _failed_by_spilling(again) if self._is_spilling(again) else again
        return replace(trial, repeated=any(size == before.size for before in self._trials))

    def _is_spilling(self, trial: Trial) -> bool:
        """Return whether a trial is so slow that the driver must have moved its memory to the host.

        The trial is compared with smaller sizes only, because the fixed cost of a step per example
        falls as the size grows.
        """
        if self.device.is_exact or not trial.fits or trial.seconds < _SLOWDOWN_SECONDS:
            return False
        smaller = (before for before in self._trials if before.fits and before.size < trial.size)
        rates = [before.seconds / before.size for before in smaller]
        return bool(rates) and trial.seconds / trial.size > _SLOWDOWN * min(rates)

    def _report(self, search: BracketingSearch, trial: Trial) -> None:
        self.observer(TrialEnded(trial=trial))
        self._record(search, trial)

    def _record(self, search: BracketingSearch, trial: Trial) -> None:
        self._trials.append(trial)
        search.record(
            trial.size,
            Outcome(fits=trial.fits, phases=trial.phases, explained=trial.explained),
        )

    def _runner(self, limit_bytes: int) -> TrialRunner:
        timeout = self.options.timeout_seconds
        return TrialRunner(
            program=self.program,
            device=self.device,
            limit_bytes=limit_bytes,
            timeout_seconds=math.inf if timeout is None else timeout,
        )

    def _make_optimizer_state(
        self, smallest: Sequence[Sequence[int]]
    ) -> tuple[Trial | None, list[Trial]]:
        """Run a first step on few examples; return its trial, and the trials that failed before it.

        The first step creates the optimizer's state (Adam's moments). If the first trial created
        it, at its end, the state would not overlap the activations, and the peak of the trial would
        be a quarter too low. A first step also loads kernels and libraries, which take memory
        outside the allocator, and compiles, so it has no timeout. Two examples are tried before
        one, because BatchNorm may refuse one.
        """
        if not self.device.is_exact:
            self.device.release_cached()  # Earlier blocks must not affect the trials.
        failed: list[Trial] = []
        runner = replace(self._runner(self.limit_bytes()), timeout_seconds=math.inf)
        for sizes in reversed(smallest):
            with _device_loss_reported(0, sizes[0]), _first_step_noted(sizes[0]):
                trial = runner.try_sizes(sizes, smaller_fits=False, larger_ran_out=bool(failed))
            if trial.fits:
                return trial, failed
            failed.append(trial)
        return None, failed

    def _last_memory_failure(self) -> Trial:
        """The last failure, if possible one of memory: BatchNorm may refuse a single example."""
        by_memory = [trial for trial in self._trials if trial.failure is not Verdict.OTHER]
        return (by_memory or self._trials)[-1]

    def _result(self, search: BracketingSearch, ceiling: int, reason: LimitedBy) -> SearchResult:
        upper = search.upper
        limited_by = reason
        if upper.reason != "ceiling":
            failures = {trial.size: trial.failure for trial in self._trials}
            limited_by = _OTHER_LIMITS.get(failures.get(upper.size or 0), "memory")
        trials = self._trials
        chosen = next(t for t in reversed(trials) if t.fits and t.size == search.size)
        return SearchResult(
            size=search.size,
            trials=tuple(self._trials),
            ceiling=ceiling,
            limit_bytes=search.limit_bytes,
            limited_by=limited_by,
            upper=upper,
            worst_case=self.worst_case,
            breakdown=self.breakdown(search.limit_bytes, chosen),
        )


@contextmanager
def _device_loss_reported(size: int, tried: int) -> Iterator[None]:
    """Turn the error of a lost device into a DeviceLostError with the largest size that ran."""
    try:
        yield
    except Exception as error:
        if verdict_of(error) is not Verdict.FATAL:
            raise
        raise DeviceLostError(size, tried, str(error)) from error


def _failed_by_spilling(trial: Trial) -> Trial:
    return replace(
        trial,
        fits=False,
        failure=Verdict.OUT_OF_MEMORY,
        peak_bytes=None,
        reserved_bytes=None,
        phases=(),
        message=(
            f"ran twice, but each example took more than {_SLOWDOWN:g} times as long as at a "
            "smaller size: the driver seems to keep some of the memory on the host"
        ),
    )


@contextmanager
def _first_step_noted(size: int) -> Iterator[None]:
    """Note on an error of the model or the loss that it came from the first step of a search."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, AutobatchError):
            examples = count(size, "example")
            error.add_note(f"raised in the first step of the search, on {examples} of the data")
        raise
