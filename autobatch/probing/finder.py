"""A search, trial by trial: what is tried, what is told, what comes out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from autobatch.devices.base import MemoryDevice
from autobatch.errors import DoesNotFitError
from autobatch.events import Observer, SearchEnded, SearchStarted, TrialEnded, TrialStarted
from autobatch.probing.search import Outcome, largest_fitting
from autobatch.probing.trial import Rehearsal, Stage
from autobatch.results import LimitedBy, SearchResult, Trial, Upper, Verdict


class Finder:
    """Rehearses sizes on one device. The rehearsal disturbs the model; the caller puts it back.

    Args:
        rehearsal: Training's own step.
        device: Where it runs.
        limit_bytes: Reads what it may allocate now.
        breakdown_bytes: Names what the step needs whatever the batch; asked if nothing fits.
        observer: Is told of every trial.
    """

    def __init__(
        self,
        *,
        rehearsal: Rehearsal,
        device: MemoryDevice,
        limit_bytes: Callable[[], int],
        breakdown_bytes: Callable[[], Mapping[str, int]],
        observer: Observer,
    ) -> None:
        self._limit_bytes = limit_bytes
        self._stage = Stage(rehearsal=rehearsal, device=device, limit_bytes=limit_bytes())
        self._breakdown_bytes = breakdown_bytes
        self._observer = observer
        self._trials: list[Trial] = []

    def largest(
        self,
        candidates: Sequence[int],
        *,
        windows: Callable[[int], Sequence[int]],
        reason: LimitedBy,
    ) -> SearchResult:
        """Return the largest candidate that ran inside the limit.

        Args:
            candidates: Ascending.
            windows: The micro-batches that a trial of a size runs, the largest first.
            reason: What the ceiling is made of: the wish, or the data.

        Raises:
            DoesNotFitError: If none did.
        """
        self._make_optimizer_state(candidates[-1])
        stage = self._stage
        self._observer(
            SearchStarted(
                device=stage.device.name, limit_bytes=stage.limit_bytes, ceiling=candidates[-1]
            )
        )
        size = largest_fitting(
            candidates,
            lambda size: self._attempt(windows(size)),
            limit_bytes=stage.limit_bytes,
        )
        if size == 0:
            raise DoesNotFitError(
                candidates[0], stage.limit_bytes, self._breakdown_bytes(), self._trials[-1].message
            )
        found = self._result(size, candidates[-1], reason)
        self._observer(SearchEnded(search=found))
        return found

    def rehearse(self, sizes: Sequence[int]) -> Trial:
        """Return the trial of one window."""
        self._make_optimizer_state(sizes[0])
        trial, _ = self._stage.try_sizes(sizes, smaller_fits=False)
        return trial

    def _attempt(self, sizes: Sequence[int]) -> Outcome:
        self._observer(TrialStarted(size=sizes[0]))
        trial, outcome = self._stage.try_sizes(
            sizes,
            smaller_fits=any(trial.fits for trial in self._trials),
            larger_ran_out=any(not trial.fits for trial in self._trials),
        )
        self._trials.append(trial)
        self._observer(TrialEnded(trial=trial))
        return outcome

    def _make_optimizer_state(self, ceiling: int) -> None:
        """Take one unmeasured step on few examples, then read the limit once more.

        Born after the only window of a trial, Adam's state would never overlap activations, and
        the peak would be a quarter too low. A first step also loads kernels and libraries, which
        a GPU holds outside the allocator. Two examples first: BatchNorm may refuse one.
        """
        ran_out = False
        for size in (2, 1):
            if size <= ceiling:
                trial, _ = self._stage.try_sizes(
                    (size,), smaller_fits=False, larger_ran_out=ran_out
                )
                if trial.fits:
                    break
                ran_out = True
        self._stage = replace(self._stage, limit_bytes=self._limit_bytes())

    def _result(self, size: int, ceiling: int, reason: LimitedBy) -> SearchResult:
        stage, failed = self._stage, [trial for trial in self._trials if not trial.fits]
        upper, limited_by = Upper(reason="ceiling"), reason
        if failed:
            first = min(failed, key=lambda trial: trial.size)
            upper = Upper(reason="ran out", size=first.size)
            limited_by = "kernel" if first.failure is Verdict.TOO_LARGE else "memory"
        return SearchResult(
            size=size,
            trials=tuple(self._trials),
            ceiling=ceiling,
            limit_bytes=stage.limit_bytes,
            limited_by=limited_by,
            upper=upper,
        )
