"""Epochs of logical batches, one optimizer step each."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping

from autobatch.data.tree import BatchTree
from autobatch.errors import StepInterruptedError
from autobatch.events import EpochEnded, Evaluated, Observer, StepEnded
from autobatch.results.training import Evaluation, StepResult
from autobatch.signals import GracefulStop, deferred_signals
from autobatch.training.checkpointing.manager import CheckpointManager
from autobatch.training.engine.step_runner import StepRunner
from autobatch.training.progress import DataPosition, Progress


class FitLoop:
    """Trains, and reports, evaluates, schedules and saves at the right moments.

    Args:
        runner: Takes the steps.
        progress: What has been done before; it is added to.
        desired: Examples in a full logical batch.
        max_steps: Stop after so many optimizer steps in all; None goes on to the end.
        observer: Is told of every step and epoch.
        on_step: Is told of every step's result.
        evaluate: Evaluates after an epoch.
        checkpoints: Saves the training.
        metadata: What a checkpoint holds besides states.
    """

    def __init__(
        self,
        runner: StepRunner,
        progress: Progress,
        *,
        desired: int,
        max_steps: int | None,
        observer: Observer,
        on_step: Callable[[StepResult], object] | None = None,
        evaluate: Callable[[int], Evaluation] | None = None,
        checkpoints: CheckpointManager | None = None,
        metadata: Mapping[str, object] | None = None,
    ) -> None:
        self._runner = runner
        self._progress = progress
        self._desired = desired
        self._max_steps = max_steps
        self._observer = observer
        self._on_step = on_step
        self._evaluate = evaluate
        self._checkpoints = checkpoints
        self._metadata = metadata or {}
        self._stop = GracefulStop()
        self._counted = 0.0  # Up to this moment, as perf_counter shows it, seconds are counted.

    def run(self, epochs: Iterable[tuple[DataPosition, Iterator[BatchTree]]]) -> None:
        """Step through the epochs that are left.

        Args:
            epochs: The place where each begins, which is moved along, and the logical batches from
                there. None is opened before its turn.
        """
        if self._checkpoints is None:
            self._epochs(epochs)
            return
        with deferred_signals() as self._stop:
            try:
                self._epochs(epochs)
            except StepInterruptedError as error:
                path = self._checkpoints.path
                raise StepInterruptedError(
                    error.message, None if path is None else str(path)
                ) from error

    def _epochs(self, epochs: Iterable[tuple[DataPosition, Iterator[BatchTree]]]) -> None:
        for place, batches in epochs:
            if self._is_done():
                return
            self._counted = started = time.perf_counter()
            steps_before = self._progress.steps
            whole = self._epoch(place, batches)
            self._count_seconds()
            self._end_epoch(place, self._counted - started, steps_before, whole=whole)

    def _epoch(self, place: DataPosition, batches: Iterator[BatchTree]) -> bool:
        """Step through the rest of one epoch; return whether it came to its end."""
        for batch in self._waited_for(batches):
            step = self._runner.step(batch)
            place.windows += 1
            self._progress.count(step)
            plan = self._runner.plan(self._desired)
            self._observer(StepEnded(step=step, epoch=place.epoch, plan=plan))
            if self._on_step is not None:
                self._on_step(step)
            if self._stop.signal is not None:
                self._count_seconds()
                self._save(place)
                self._obey_signal()
            if self._is_done():
                return False
        return True

    def _waited_for(self, batches: Iterator[BatchTree]) -> Iterator[BatchTree]:
        """The batches; how long each was waited for is counted."""
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self._progress.loading_seconds += time.perf_counter() - began
            if batch is None:
                return
            yield batch
            del batch

    def _end_epoch(
        self, place: DataPosition, seconds: float, steps_before: int, *, whole: bool
    ) -> None:
        """Evaluate, tell, schedule and save. An epoch that max_steps ended may go on later."""
        progress = self._progress
        loss = progress.epoch_loss()
        evaluation = None
        if self._evaluate is not None:
            evaluation = self._evaluate(place.epoch)
            progress.add_evaluation(evaluation)
        examples = sum(progress.sizes[steps_before:])
        self._observer(
            EpochEnded(
                epoch=place.epoch,
                loss=loss,
                examples_per_second=examples / seconds if seconds else 0.0,
            )
        )
        if evaluation is not None:
            self._observer(Evaluated(evaluation=evaluation))
        if whole:
            self._runner.schedule.after_epoch(loss if evaluation is None else evaluation.loss)
            place.next_epoch()
            progress.epoch_begins = progress.steps
        self._save(place)
        if self._stop.signal is not None:
            self._obey_signal()

    def _save(self, place: DataPosition) -> None:
        if self._checkpoints is not None:
            self._checkpoints.save(
                self._runner, self._progress.state_dict(), place.state_dict(), self._metadata
            )

    def _obey_signal(self) -> None:
        saved = self._checkpoints.path if self._checkpoints is not None else None
        self._stop.go(f"stopped between two steps; saved to {saved}")

    def _count_seconds(self) -> None:
        now = time.perf_counter()
        self._progress.seconds += now - self._counted
        self._counted = now

    def _is_done(self) -> bool:
        return self._max_steps is not None and self._progress.steps >= self._max_steps
