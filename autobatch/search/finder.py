"""A search, trial by trial: what is tried, what is told, what comes out."""

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
from autobatch.search.trial import SizedRun, TrialRunner
from autobatch.units import count

_ROUNDING_BYTES: Final = 2 << 20  # A caching allocator's segments are multiples of this.
_MOST_MOVES: Final = 3  # Of others' memory; after so many the search ends with what it has.
_COLLAPSE: Final = 4.0  # So many times slower an example than at another size is no accident.
_COLLAPSE_SECONDS: Final = 1.0  # Shorter trials may be slow by chance.
_OTHER_LIMITS: Final[Mapping[Verdict | None, LimitedBy]] = {
    Verdict.TOO_LARGE: "kernel",
    Verdict.TOO_SLOW: "time",
    Verdict.FATAL: "crash",
}


@dataclass(slots=True, kw_only=True)
class BatchSizeFinder:
    """Rehearses sizes on one device. The rehearsal disturbs the model; the caller puts it back.

    Attributes:
        rehearsal: Training's own step.
        device: Where it runs.
        limit_bytes: Reads what it may allocate now.
        breakdown: Says where memory goes under a limit at a trial, fitting or not.
        observer: Is told of every trial.
        options: How to search.
        worst_case: What trials repeat, in words.
        history: Trials that were made elsewhere: known, and not told again.
    """

    rehearsal: SizedRun
    device: MemoryDevice
    limit_bytes: Callable[[], int]
    breakdown: Callable[[int, Trial], Breakdown]
    observer: Observer
    options: SearchOptions = field(default_factory=SearchOptions)
    worst_case: str = ""
    history: Sequence[Trial] = ()
    _trials: list[Trial] = field(default_factory=list, init=False)
    _valid_from: int = field(default=0, init=False)  # Trials before were made in other memory.

    def largest(
        self,
        candidates: Sequence[int],
        *,
        windows: Callable[[int], Sequence[int]],
        reason: LimitedBy,
        spared_bytes: Callable[[int], int] = lambda _: 0,
        ceiling_first: bool = False,
    ) -> SearchResult:
        """Return the largest candidate that ran inside the limit.

        Args:
            candidates: Ascending.
            windows: The micro-batches that a trial of a size runs, the largest first.
            reason: What the ceiling is made of: the wish, or the data.
            spared_bytes: What a candidate's window may do without, though smaller ones' hold it.
            ceiling_first: Whether the ceiling may need less than smaller sizes, and is tried first.

        Raises:
            DoesNotFitError: If none did.
            SearchTimeoutError: If the time was over before the answer was known.
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
            spared_bytes=spared_bytes,
            prior=self.options.first_guess,
        )
        if first is not None and self.device.is_exact:
            search.glimpse(first.size, first.phases)
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
            self._take(search, trial)
        known = {trial.size for trial in self.history}
        for trial in failed:  # What does not fit once does not fit twice.
            if trial.size not in known:
                self._learn(search, trial)
        if ceiling_first and ceiling not in {trial.size for trial in self._trials}:
            self.observer(TrialStarted(size=ceiling))
            self._learn(search, self._attempt(windows(ceiling), search))
        self._search(search, windows, began)
        if search.size == 0:
            error = DoesNotFitError(
                candidates[0],
                search.limit_bytes,
                self.breakdown(search.limit_bytes, self._shortage()),
                self._trials[-1].message,
            )
            for other in others:
                error.add_note(f"on the same device {other}")
            raise error
        found = replace(self._result(search, ceiling, reason), others=others)
        found = replace(found, notes=tuple(advice(self.device.torch_device, found)))
        self.observer(SearchEnded(search=found))
        return found

    def rehearse(self, sizes: Sequence[int]) -> Trial:
        """Return the trial of one window."""
        self._make_optimizer_state([(size,) for size in range(1, min(2, sizes[0]) + 1)])
        with _told_if_lost(0, sizes[0]):
            return self._stage(self.limit_bytes()).try_sizes(sizes, smaller_fits=False)

    def _search(
        self, search: BracketingSearch, windows: Callable[[int], Sequence[int]], began: float
    ) -> None:
        """Try what the search asks for, and again what must not rest on one trial."""
        before, moves = self.device.read(), 0
        budget = self.options.budget_seconds
        while True:
            size = search.next()
            if size is None:
                now = self.device.read()
                if moves < _MOST_MOVES and outside_changed(before, now):
                    before, moves = now, moves + 1
                    search.relimit(self.limit_bytes())
                    self._valid_from = len(self._trials)
                size = search.next() or self._doubtful(search)
            if size is None:
                return
            if budget is not None and time.monotonic() - began > budget:
                raise SearchTimeoutError(search.size, budget)
            self.observer(TrialStarted(size=size))
            self._learn(search, self._attempt(windows(size), search))

    def _doubtful(self, search: BracketingSearch) -> int | None:
        """What is to be tried again: the failure that ends the search, then the size found.

        A failure may be another's: on a real device it counts if it comes twice. After one, the
        size that is returned runs once more. So does whatever ran before others' memory moved.
        """
        if search.size == 0:
            return None
        trials, upper = self._trials, search.upper
        last = {trial.size: place for place, trial in enumerate(trials)}
        if upper.reason == "ran out" and upper.size is not None:
            place = last[upper.size]
            # A size that has cost a process is not tried again.
            is_memory = trials[place].failure not in _OTHER_LIMITS
            again = not self.device.is_exact and not trials[place].repeated
            if is_memory and (again or place < self._valid_from):
                return upper.size
        place = last[search.size]
        failed_since = any(not trial.fits for trial in trials[place:])
        return search.size if failed_since or place < self._valid_from else None

    def _attempt(self, sizes: Sequence[int], search: BracketingSearch) -> Trial:
        stage, size = self._stage(search.limit_bytes), sizes[0]

        def run() -> Trial:
            return stage.try_sizes(
                sizes,
                smaller_fits=any(trial.fits for trial in self._trials),
                larger_ran_out=any(not trial.fits for trial in self._trials),
            )

        with _told_if_lost(search.size, size):
            trial = run()
            if self._has_collapsed(trial):
                again = run()
                trial = _spilt(again) if self._has_collapsed(again) else again
        return replace(trial, repeated=any(size == before.size for before in self._trials))

    def _has_collapsed(self, trial: Trial) -> bool:
        """Whether a size is so slow that its memory must lie elsewhere: in the host's, say.

        Only smaller sizes tell: what a step takes whatever its size weighs less on a larger one.
        """
        if self.device.is_exact or not trial.fits or trial.seconds < _COLLAPSE_SECONDS:
            return False
        smaller = (before for before in self._trials if before.fits and before.size < trial.size)
        rates = [before.seconds / before.size for before in smaller]
        return bool(rates) and trial.seconds / trial.size > _COLLAPSE * min(rates)

    def _learn(self, search: BracketingSearch, trial: Trial) -> None:
        self.observer(TrialEnded(trial=trial))
        self._take(search, trial)

    def _take(self, search: BracketingSearch, trial: Trial) -> None:
        self._trials.append(trial)
        search.learn(
            trial.size,
            Outcome(fits=trial.fits, phases=trial.phases, explained=trial.explained),
        )

    def _stage(self, limit_bytes: int) -> TrialRunner:
        timeout = self.options.timeout_seconds
        return TrialRunner(
            rehearsal=self.rehearsal,
            device=self.device,
            limit_bytes=limit_bytes,
            timeout_seconds=math.inf if timeout is None else timeout,
        )

    def _make_optimizer_state(
        self, smallest: Sequence[Sequence[int]]
    ) -> tuple[Trial | None, list[Trial]]:
        """Take one uncounted step on few examples; return it, and those that failed before it.

        Born after the only window of a trial, Adam's state would never overlap activations, and
        the peak would be a quarter too low. A first step also loads kernels and libraries, which
        a GPU holds outside the allocator, and compiles: so no timeout holds for it. Two examples
        first: BatchNorm may refuse one.
        """
        if not self.device.is_exact:
            self.device.release_cached()  # Blocks of whatever ran before are in no trial's way.
        failed: list[Trial] = []
        stage = replace(self._stage(self.limit_bytes()), timeout_seconds=math.inf)
        for sizes in reversed(smallest):
            with _told_if_lost(0, sizes[0]), _told_where(sizes[0]):
                trial = stage.try_sizes(sizes, smaller_fits=False, larger_ran_out=bool(failed))
            if trial.fits:
                return trial, failed
            failed.append(trial)
        return None, failed

    def _shortage(self) -> Trial:
        """The last failure that says what is missing: BatchNorm may refuse a single example."""
        told = [trial for trial in self._trials if trial.failure is not Verdict.OTHER]
        return (told or self._trials)[-1]

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
def _told_if_lost(size: int, tried: int) -> Iterator[None]:
    """Turn an error that says that the device is lost into one that says what had run."""
    try:
        yield
    except Exception as error:
        if verdict_of(error) is not Verdict.FATAL:
            raise
        raise DeviceLostError(size, tried, str(error)) from error


def _spilt(trial: Trial) -> Trial:
    return replace(
        trial,
        fits=False,
        failure=Verdict.OUT_OF_MEMORY,
        peak_bytes=None,
        reserved_bytes=None,
        phases=(),
        message=(
            f"ran, but each example took more than {_COLLAPSE:g} times as long as at a smaller "
            "size, twice: the driver seems to keep some of it in the host's memory"
        ),
    )


@contextmanager
def _told_where(size: int) -> Iterator[None]:
    """Say of an error of the model's or the loss's own that it came of a rehearsal."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, AutobatchError):
            examples = count(size, "example")
            error.add_note(f"seen in the search's first step, on {examples} of the data")
        raise
