"""The arguments of a training, checked before anything is trained."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from autobatch.data.source import Data
from autobatch.results.training import StepResult
from autobatch.state.rng import Restore, random_state
from autobatch.state.snapshot import attributes_of
from autobatch.training.checkpointing.manager import CheckpointManager
from autobatch.training.checkpointing.store import CheckpointStore
from autobatch.training.engine.lr_schedule import Schedule, resolve_schedule
from autobatch.training.evaluation.evaluation_data import EvaluationData
from autobatch.training.evaluation.metrics import Metric
from autobatch.training.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRequest:
    """The arguments of a training, checked.

    Attributes:
        workload: The step, the data and the memory budget.
        schedule: The learning-rate schedule.
        desired: Examples in a logical batch, as the user wants it.
        epochs: How many times the data is read.
        max_steps: The most optimizer steps; None for all.
        drop_last: True if a short last logical batch of an epoch is skipped.
        evaluation: What is evaluated after each epoch; None for nothing.
        on_step: Called with the result of every step; None for nothing.
        checkpoints: Saves and restores the training; None if no checkpoint is written.
        restore_optimizer: Restores the attributes of the optimizer that a scheduler's factory sets.
    """

    workload: Workload
    schedule: Schedule
    desired: int
    epochs: int
    max_steps: int | None
    drop_last: bool
    evaluation: EvaluationData | None
    on_step: Callable[[StepResult], object] | None
    checkpoints: CheckpointManager | None
    restore_optimizer: Restore

    @classmethod
    def resolve(
        cls,
        workload: Workload,
        *,
        schedule: tuple[object, object],
        desired: int,
        epochs: int,
        max_steps: int | None,
        drop_last: bool,
        eval_data: Data | None,
        metrics: Mapping[str, Metric] | None,
        checkpoint_dir: str | os.PathLike[str] | None,
        on_step: Callable[[StepResult], object] | None,
    ) -> "TrainingRequest":
        """Check every argument. Nothing changes, except that a scheduler's factory is called.

        Args:
            workload: The step, the data and the memory budget.
            schedule: The scheduler or its factory, and ``scheduler_interval``.
            desired: As for ``find_and_train``, like all arguments that follow.
            epochs: At least 1.
            max_steps: At least 1, or None.
            drop_last: True skips a short last logical batch.
            eval_data: Data for an evaluation after each epoch, or None.
            metrics: Metric functions by name, or None.
            checkpoint_dir: A folder, or None.
            on_step: A callable, or None.

        Raises:
            TypeError, ValueError: An argument is wrong; the message shows its value and the way
                out.
        """
        if workload.source.one_pass and epochs > 1:
            raise ValueError(
                f"epochs={epochs} needs data that can be read again, got a one-pass iterable; pass "
                "a DataLoader, a Dataset, tensors or a list of batches, or epochs=1"
            )
        if on_step is not None and not callable(on_step):
            raise TypeError(f"on_step must be callable, got {on_step!r}")
        step = workload.step
        evaluation = EvaluationData.resolve(
            eval_data, metrics, desired=desired, objective=step.objective
        )
        store = None if checkpoint_dir is None else CheckpointStore(checkpoint_dir)
        restore_optimizer = attributes_of(step.optimizer)
        try:
            resolved = resolve_schedule(schedule[0], step.optimizer, schedule[1])
        except BaseException:
            restore_optimizer()
            raise
        checkpoints = None
        if store is not None:
            checkpoints = CheckpointManager(
                store=store,
                step=step,
                schedule=resolved,
                loss_module=workload.loss_module,
                sources=[workload.source.owner, step.model],
                desired=desired,
            )
        return cls(
            workload=workload,
            schedule=resolved,
            desired=desired,
            epochs=epochs,
            max_steps=max_steps,
            drop_last=drop_last,
            evaluation=evaluation,
            on_step=on_step,
            checkpoints=checkpoints,
            restore_optimizer=restore_optimizer,
        )

    @property
    def config(self) -> dict[str, object]:
        """The settings that steps depend on and that no state dict holds, by name."""
        update = self.workload.step.optimizer_step
        return {
            "precision": self.workload.options.precision,
            "clip_grad_norm": update.clip_grad_norm,
            "clip_grad_value": update.clip_grad_value,
            "the number of examples in data": self.workload.source.examples,
        }

    @contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """Restore the optimizer and the random generators if an error ends the block.

        What a checkpoint has restored stays.
        """
        restore_random = random_state([self.workload.source.owner, self.workload.step.model])
        try:
            yield
        except BaseException:
            restore_random()
            if self.checkpoints is None or not self.checkpoints.restored:
                self.restore_optimizer()
            raise

    def try_evaluation(self) -> None:
        """Evaluate two examples, so that an error shows before hours of training."""
        if self.evaluation is not None:
            evaluator = self.evaluation.evaluator(self.workload.step)
            with self.workload.undisturbed():
                evaluator.try_out()
