"""The epochs of a training: one optimizer step for each logical batch."""

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
    """Trains through the epochs: steps, events, evaluations, schedules and checkpoints.

    Args:
        runner: Takes the optimizer steps.
        progress: What the training has done before; the loop adds to it.
        desired: Examples in a full logical batch.
        max_steps: Training stops after so many optimizer steps in all; None for no such limit.
        observer: Receives an event for every step and every epoch.
        on_step: Called with the result of every step; None for nothing.
        evaluate: Returns the evaluation after an epoch of this number; None for no evaluation.
        checkpoints: Saves the training; None writes no checkpoint.
        metadata: What a checkpoint holds besides state dicts.
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
        self._counted = 0.0  # The time of perf_counter up to which seconds are counted.

    def run(self, epochs: Iterable[tuple[DataPosition, Iterator[BatchTree]]]) -> None:
        """Train through the epochs that are left.

        With checkpoints, Ctrl-C and SIGTERM stop the training after the step that runs, and after
        that step is saved.

        Args:
            epochs: For each epoch the position where it begins, and the logical batches from there
                on. The loop advances the position, and opens no epoch before its turn.
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
        for position, batches in epochs:
            if self._is_done():
                return
            self._counted = started = time.perf_counter()
            steps_before = self._progress.steps
            whole = self._epoch(position, batches)
            self._count_seconds()
            self._end_epoch(position, self._counted - started, steps_before, whole=whole)

    def _epoch(self, position: DataPosition, batches: Iterator[BatchTree]) -> bool:
        """Train through the rest of one epoch; return False if ``max_steps`` ended it."""
        for batch in self._timed(batches):
            step = self._runner.step(batch)
            position.next_batch()
            self._progress.count(step)
            plan = self._runner.plan(self._desired)
            self._observer(StepEnded(step=step, epoch=position.epoch, plan=plan))
            if self._on_step is not None:
                self._on_step(step)
            if self._stop.signal is not None:
                self._count_seconds()
                self._save(position)
                self._obey_signal()
            if self._is_done():
                return False
        return True

    def _timed(self, batches: Iterator[BatchTree]) -> Iterator[BatchTree]:
        """Yield the batches, and count the seconds that each one is waited for."""
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self._progress.add_loading_seconds(time.perf_counter() - began)
            if batch is None:
                return
            yield batch
            del batch

    def _end_epoch(
        self, position: DataPosition, seconds: float, steps_before: int, *, whole: bool
    ) -> None:
        """Evaluate, report, schedule and save after an epoch.

        An epoch that ``max_steps`` ended keeps its position: a later call may complete it.
        """
        progress = self._progress
        loss = progress.epoch_loss()
        evaluation = None
        if self._evaluate is not None:
            evaluation = self._evaluate(position.epoch)
            progress.add_evaluation(evaluation)
        examples = sum(progress.sizes[steps_before:])
        self._observer(
            EpochEnded(
                epoch=position.epoch,
                loss=loss,
                examples_per_second=examples / seconds if seconds else 0.0,
            )
        )
        if evaluation is not None:
            self._observer(Evaluated(evaluation=evaluation))
        if whole:
            self._runner.schedule.after_epoch(loss if evaluation is None else evaluation.loss)
            position.next_epoch()
            progress.begin_epoch()
        self._save(position)
        if self._stop.signal is not None:
            self._obey_signal()

    def _save(self, position: DataPosition) -> None:
        if self._checkpoints is not None:
            self._checkpoints.save(
                self._runner, self._progress.state_dict(), position.state_dict(), self._metadata
            )

    def _obey_signal(self) -> None:
        saved = self._checkpoints.path if self._checkpoints is not None else None
        self._stop.go(f"training stopped between two steps; the checkpoint is {saved}")

    def _count_seconds(self) -> None:
        now = time.perf_counter()
        self._progress.add_seconds(now - self._counted)
        self._counted = now

    def _is_done(self) -> bool:
        return self._max_steps is not None and self._progress.steps >= self._max_steps
