"""A whole training, from its arguments to its result: everything but the search."""

import functools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Final

from autobatch.data.rebatch import Data, Source, open_source
from autobatch.data.worker_memory import crowded
from autobatch.devices.host_memory import host_memory
from autobatch.devices.memory_notes import fragmented
from autobatch.events import Observer, TrainingStarted
from autobatch.results.plan import BatchPlan
from autobatch.results.search import SearchResult
from autobatch.results.training import StepResult, TrainingResult
from autobatch.state.rng import Restore, random_state
from autobatch.state.snapshot import attributes_of, training_mode
from autobatch.training.batchnorm.modes import normalises_by_batch
from autobatch.training.checkpointing.manager import CheckpointManager
from autobatch.training.checkpointing.store import CheckpointStore
from autobatch.training.engine.lr_schedule import Schedule, resolve_schedule
from autobatch.training.engine.step_runner import StepRunner
from autobatch.training.epochs import Epochs, keeps_workers
from autobatch.training.evaluation.evaluator import Evaluator, FindSize
from autobatch.training.evaluation.metrics import Metric
from autobatch.training.fit_loop import FitLoop
from autobatch.training.losses.objective import Objective
from autobatch.training.notes import notes
from autobatch.training.progress import DataPosition
from autobatch.training.start import TrainingStart, begin, is_done, plain_search, resume
from autobatch.training.workload import Workload

_WORKERS: Final = (
    "the loader's workers persist: what they draw from random generators of their own goes on "
    "differently after a checkpoint; with persistent_workers=False it does not"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationData:
    """What is evaluated after each epoch.

    Attributes:
        source: The data.
        metrics: By name; None is the accuracy.
    """

    source: Source
    metrics: Mapping[str, Metric] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """The arguments of a training, checked. Nothing has been trained.

    Attributes:
        job: The step and the data.
        schedule: The learning rate's.
        desired: Examples in a logical batch, as the user wants it.
        epochs: How often the data is seen.
        max_steps: The most optimizer steps, or None.
        drop_last: Whether a short last logical batch is left out.
        evaluation: What is evaluated after each epoch, or None.
        on_step: Called with every step's result.
        checkpoints: Saves and restores the training, or None.
        undo: Takes back what a scheduler's factory has done to the optimizer.
    """

    job: Workload
    schedule: Schedule
    desired: int
    epochs: int
    max_steps: int | None
    drop_last: bool
    evaluation: EvaluationData | None
    on_step: Callable[[StepResult], object] | None
    checkpoints: CheckpointManager | None
    undo: Restore

    @classmethod
    def resolve(
        cls,
        job: Workload,
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
    ) -> "Training":
        """Check every argument. Only a scheduler's factory touches anything: the optimizer.

        Raises:
            TypeError, ValueError: With the value that came and the way out.
        """
        if job.source.one_pass and epochs > 1:
            raise ValueError(
                f"epochs={epochs} needs data that can be read again, got a one-pass one"
            )
        if on_step is not None and not callable(on_step):
            raise TypeError(f"on_step must be callable, got {on_step!r}")
        evaluation = _evaluation(job.step.objective, eval_data, metrics, desired)
        store = None if checkpoint_dir is None else CheckpointStore(checkpoint_dir)
        undo = attributes_of(job.step.optimizer)
        try:
            resolved = resolve_schedule(schedule[0], job.step.optimizer, schedule[1])
        except BaseException:
            undo()
            raise
        checkpoints = None
        if store is not None:
            checkpoints = CheckpointManager(
                store=store,
                step=job.step,
                schedule=resolved,
                loss_module=job.loss_module,
                sources=[job.source.owner, job.step.model],
                desired=desired,
            )
        return cls(
            job=job,
            undo=undo,
            schedule=resolved,
            desired=desired,
            epochs=epochs,
            max_steps=max_steps,
            drop_last=drop_last,
            evaluation=evaluation,
            on_step=on_step,
            checkpoints=checkpoints,
        )

    def start(self, observer: Observer) -> TrainingStart:
        """Restore the last checkpoint, if there is one, and read the next logical batch.

        Raises:
            CheckpointError: If training cannot go on from the checkpoint.
            ValueError: If there is nothing to train on.
        """
        saved = None if self.checkpoints is None else self.checkpoints.latest()
        self._try_evaluation()
        epochs = Epochs(
            source=self.job.source,
            desired=self.desired,
            drop_last=self.drop_last,
            last=self.epochs,
            place=DataPosition(),
            note=None if self.checkpoints is None else self.checkpoints.random_state,
        )
        if saved is None or self.checkpoints is None:
            start = begin(epochs)
        else:
            start = resume(
                saved,
                self.checkpoints,
                epochs,
                given=self.given,
                max_steps=self.max_steps,
                observer=observer,
            )
        if start.first is not None:
            warning = crowded(self.job.source.batches, start.first, host_memory()[1])
            if warning:
                warnings.warn(warning, stacklevel=4)  # Where find_and_train was called.
        return start

    @contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """Take back what a scheduler and the first batch have done if an error ends what is inside.

        A checkpoint that was restored stays.
        """
        put_random_back = random_state([self.job.source.owner, self.job.step.model])
        try:
            yield
        except BaseException:
            put_random_back()
            if self.checkpoints is None or not self.checkpoints.restored:
                self.undo()
            raise

    def is_done(self, start: TrainingStart) -> bool:
        """Return whether no step is left to take."""
        return is_done(start.epochs, start.progress, self.max_steps)

    def steps_left(self, start: TrainingStart) -> int | None:
        """Return how many optimizer steps are left; None where the data does not say."""
        examples, desired = self.job.source.examples, self.desired
        ends = [] if self.max_steps is None else [self.max_steps]
        if examples is not None:
            in_epoch = examples // desired if self.drop_last else -(-examples // desired)
            ends.append(self.epochs * in_epoch)
        return max(0, min(ends) - start.progress.steps) if ends else None

    @property
    def given(self) -> dict[str, object]:
        """What steps depend on and no state holds, by name."""
        update = self.job.step.optimizer_step
        return {
            "precision": self.job.options.precision,
            "clip_grad_norm": update.clip_grad_norm,
            "clip_grad_value": update.clip_grad_value,
            "the number of examples in data": self.job.source.examples,
        }

    def evaluator(
        self,
        find: FindSize = lambda _, sizes: sizes[-1],
        limited: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> Evaluator | None:
        """Return what evaluates after each epoch, or None.

        What an evaluation finds out about the loss must not reach training: with and without
        evaluation, training is the same.

        Args:
            find: Returns the largest size that inference really ran at.
            limited: Returns the context in which memory may be used.
        """
        if self.evaluation is None:
            return None
        step = self.job.step
        return Evaluator(
            gradient=step.gradient_pass,
            objective=step.objective.for_evaluation(),
            source=self.evaluation.source,
            desired=self.desired,
            metrics=self.evaluation.metrics,
            find=find,
            limited=limited,
        )

    def _try_evaluation(self) -> None:
        """Evaluate two examples: what is wrong with that is better known now than in an hour."""
        evaluator = self.evaluator()
        if evaluator is not None:
            with self.job.undisturbed():
                evaluator.try_out()


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainer:
    """Trains from a start to the end, with the size that a search has found.

    Attributes:
        training: The arguments.
        start: Where training begins.
        found: The search.
        observer: Receives an event for every step and epoch.
        find_inference_size: Returns the largest size that inference really ran at.
        multiple_of: Micro-batches are multiples of this.
    """

    training: Training
    start: TrainingStart
    found: SearchResult
    observer: Observer
    find_inference_size: FindSize
    multiple_of: int = 1

    def fit(self) -> TrainingResult:
        """Train, and return what was done."""
        training, job, start = self.training, self.training.job, self.start
        job.move()
        runner = self._runner()
        planned = runner.plan(start.window)
        steps = training.steps_left(start)
        self.observer(TrainingStarted(plan=planned, steps=steps, epochs=training.epochs))
        job.device.reset_peak()
        with training_mode(job.step.model):
            normalizes = normalises_by_batch(job.step.model.modules())
            FitLoop(
                runner,
                start.progress,
                desired=start.window,
                max_steps=training.max_steps,
                observer=self.observer,
                on_step=training.on_step,
                evaluate=training.evaluator(self.find_inference_size, runner.gradient.limited),
                checkpoints=training.checkpoints,
                metadata=self._metadata(),
            ).run(start.epochs)
        ended = runner.plan(start.window)
        found_out = notes(
            planned,
            ended,
            start.progress,
            asked=training.desired,
            objective=job.step.objective,
            batch_norm=job.step.gradient_pass.batch_norm if normalizes else None,
            mutated=sorted(runner.gradient.mutated),
            found=self.found,
        )
        reading, place = job.device.read(), job.device.torch_device
        pieces = fragmented(place, reading.peak_bytes, reading.peak_reserved_bytes, "training")
        return result_of(training, start, self.found, ended, (*found_out, *pieces))

    def _runner(self) -> StepRunner:
        """What takes the steps, with the counts of the checkpoint."""
        job, saved = self.training.job, self.start.saved
        limit_bytes = self.found.limit_bytes if job.trains_limited else None
        limited: Callable[[], AbstractContextManager[None]] = nullcontext
        if limit_bytes is not None:
            limited = functools.partial(job.device.limited_to, limit_bytes)
        make = functools.partial(
            job.options.step_runner,
            job.step,
            schedule=self.training.schedule,
            limited=limited,
            limit_bytes=limit_bytes,
            observer=self.observer,
            multiple_of=self.multiple_of,
        )
        runner = make(self.found.fastest)
        if saved is not None:
            state = dict(saved["runner"])
            if not self._keeps_size():
                state["size"] = runner.gradient.micro_batch_size.state_dict()
            runner.load_state_dict(state)
        return runner

    def _keeps_size(self) -> bool:
        """Whether the checkpoint's micro-batches fit here: the same parts round the same way."""
        if self.start.saved is None:
            return False
        before = self.start.saved["metadata"]
        same_device = before["device"] == self.training.job.device.name
        return bool(same_device and before["tolerable"] <= self.found.size)

    def _metadata(self) -> dict[str, object]:
        """What a checkpoint holds besides states."""
        tolerable = self.found.fastest
        if self.start.saved is not None and self._keeps_size():
            tolerable = self.start.saved["metadata"]["tolerable"]
        return {
            "window": self.start.window,
            "tolerable": tolerable,
            "device": self.training.job.device.name,
            "given": self.training.given,
            "search": plain_search(self.found),
        }


def finished_before(training: Training, start: TrainingStart) -> TrainingResult:
    """Return the result of a training that its checkpoint has finished."""
    assert start.saved is not None, "only a checkpoint can have finished"
    assert start.search is not None, "a checkpoint holds its search"
    plan = BatchPlan(desired=start.window, tolerable=start.saved["metadata"]["tolerable"])
    told = ("nothing was left to do: the checkpoint is complete",)
    return result_of(training, start, start.search, plan, told)


def result_of(
    training: Training,
    start: TrainingStart,
    found: SearchResult,
    plan: BatchPlan,
    found_out: tuple[str, ...],
) -> TrainingResult:
    """Return the result of a training.

    Args:
        training: The arguments.
        start: Where it began; its progress has gone on.
        found: The search.
        plan: How a logical batch was cut at the end.
        found_out: Notes on what was not exact.
    """
    progress, place = start.progress, start.epochs.place
    progress.read()
    resumed: tuple[str, ...] = ()
    if start.saved is not None and training.checkpoints is not None:
        steps, directory = int(start.saved["runner"]["steps"]), training.checkpoints.store.directory
        resumed = (f"went on from a checkpoint in {directory}, step {steps}", *start.differences)
        if keeps_workers(training.job.source.batches) and start.saved["place"]["epoch"] > 1:
            resumed += (_WORKERS,)
    return TrainingResult(
        plan=plan,
        search=found,
        losses=tuple(progress.losses),
        epochs=place.epoch if place.windows else place.epoch - 1,
        examples=progress.examples,
        seconds=progress.seconds,
        loading_seconds=progress.loading_seconds,
        replays=progress.replays,
        evaluations=tuple(progress.evaluations),
        notes=(*resumed, *found_out),
    )


def _evaluation(
    objective: Objective, data: Data | None, metrics: Mapping[str, Metric] | None, desired: int
) -> EvaluationData | None:
    if metrics is not None:
        _check_metrics(metrics, objective)
    if data is not None:
        return EvaluationData(source=_evaluated(data, desired), metrics=metrics)
    if metrics is not None:
        raise ValueError("metrics are measured on eval_data: pass that as well")
    return None


def _evaluated(data: Data, desired: int) -> Source:
    try:
        source = open_source(data, batch_size=desired)
    except (TypeError, ValueError) as error:
        raise type(error)(f"eval_data: {error}") from None
    if source.one_pass:
        raise TypeError(
            "eval_data is read after every epoch, got a one-pass iterable; pass a DataLoader, a "
            "Dataset, tensors or a list of batches"
        )
    return source


def _check_metrics(metrics: object, objective: Objective) -> None:
    if not objective.shows_outputs:
        raise ValueError(
            "metrics are given outputs and targets, which batch_loss keeps to itself; pass loss "
            "and forward instead"
        )
    if not isinstance(metrics, Mapping) or not all(map(callable, metrics.values())):
        raise TypeError(
            f"metrics must be a mapping from names to callables (outputs, targets), got {metrics!r}"
        )
