"""A search, trial by trial: what is tried, what is told, what comes out."""

from collections.abc import Callable, Mapping, Sequence

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
        limit_bytes: What it may allocate.
        breakdown_bytes: Names what the step needs whatever the batch; asked if nothing fits.
        observer: Is told of every trial.
    """

    def __init__(
        self,
        *,
        rehearsal: Rehearsal,
        device: MemoryDevice,
        limit_bytes: int,
        breakdown_bytes: Callable[[], Mapping[str, int]],
        observer: Observer,
    ) -> None:
        self._stage = Stage(rehearsal=rehearsal, device=device, limit_bytes=limit_bytes)
        self._breakdown_bytes = breakdown_bytes
        self._observer = observer
        self._trials: list[Trial] = []

    def largest(
        self,
        candidates: Sequence[int],
        *,
        micro_batches: Callable[[int], int],
        reason: LimitedBy,
    ) -> SearchResult:
        """Return the largest candidate that ran inside the limit.

        Args:
            candidates: Ascending.
            micro_batches: How many a trial of a size runs.
            reason: What the ceiling is made of: the wish, or the data.

        Raises:
            DoesNotFitError: If none did.
        """
        stage = self._stage
        self._observer(
            SearchStarted(
                device=stage.device.name, limit_bytes=stage.limit_bytes, ceiling=candidates[-1]
            )
        )
        self._make_optimizer_state(candidates[-1])
        size = largest_fitting(
            candidates,
            lambda size: self._attempt(size, micro_batches(size)),
            limit_bytes=stage.limit_bytes,
        )
        if size == 0:
            raise DoesNotFitError(
                candidates[0], stage.limit_bytes, self._breakdown_bytes(), self._trials[-1].message
            )
        found = self._result(size, candidates[-1], reason)
        self._observer(SearchEnded(search=found))
        return found

    def rehearse(self, size: int, *, micro_batches: int) -> Trial:
        """Return the trial of one size."""
        self._make_optimizer_state(size)
        trial, _ = self._stage.try_size(size, micro_batches, smaller_fits=False)
        return trial

    def _attempt(self, size: int, micro_batches: int) -> Outcome:
        self._observer(TrialStarted(size=size))
        smaller_fits = any(trial.fits for trial in self._trials)
        trial, outcome = self._stage.try_size(size, micro_batches, smaller_fits=smaller_fits)
        self._trials.append(trial)
        self._observer(TrialEnded(trial=trial))
        return outcome

    def _make_optimizer_state(self, ceiling: int) -> None:
        """Take one unmeasured step on few examples.

        Born after the only window of a trial, Adam's state would never overlap activations, and
        the peak would be a quarter too low. Two examples first: BatchNorm may refuse one.
        """
        for size in (2, 1):
            if size <= ceiling:
                trial, _ = self._stage.try_size(size, 1, smaller_fits=False)
                if trial.fits:
                    return

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
