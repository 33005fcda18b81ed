"""A whole training, from its arguments to its result: everything but the search."""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from autobatch.advice import torn
from autobatch.batches.nest import Nest, size_of
from autobatch.batches.prefetch import crowded
from autobatch.batches.regroup import Data, Source, open_source
from autobatch.devices.host import host_memory
from autobatch.events import Observer, Resumed, TrainingStarted
from autobatch.job import Job
from autobatch.plan import BatchPlan
from autobatch.randomness import Restore, random_state
from autobatch.results import SearchResult, StepResult, TrainingResult, Upper
from autobatch.state.snapshot import attributes_of, training_mode
from autobatch.training.batch_norm import normalises_by_batch
from autobatch.training.checkpoint import CheckpointStore
from autobatch.training.custom import Custom
from autobatch.training.differences import changed, overruled, settings_of
from autobatch.training.driver import Driver
from autobatch.training.epochs import Epochs, keeps_workers
from autobatch.training.evaluation import Evaluator, Inference, Metric
from autobatch.training.keeper import Fields, Keeper
from autobatch.training.loop import Loop
from autobatch.training.notes import notes
from autobatch.training.objective import Objective
from autobatch.training.options import NonFinite
from autobatch.training.progress import Place, Progress
from autobatch.training.replay import MicroBatchSize
from autobatch.training.schedule import Schedule, resolve_schedule
from autobatch.training.window import Recipe

_WORKERS: Final = (
    "the loader's workers persist: what they draw from random generators of their own goes on "
    "differently after a checkpoint; with persistent_workers=False it does not"
)

FindForInference = Callable[[Inference, Sequence[int]], int]


@dataclass(slots=True, kw_only=True)
class Course:
    """A training that has been asked for, and where it stands.

    Attributes:
        job: The step and the data.
        schedule: The learning rate's.
        desired: Examples in a logical batch, as asked for.
        max_steps: The most optimizer steps, or None.
        nonfinite: What happens to a step that is not finite.
        evaluator: Evaluates after each epoch, or None.
        on_step: Is told of every step's result.
        keeper: Of the checkpoints, or None.
        epochs: The data, from where training stands.
        progress: What has been done.
        undo: Takes back what a scheduler's factory has done to the optimizer.
        saved: The checkpoint that training goes on from, or None.
        differences: What of it is otherwise than was asked for now.
    """

    job: Job
    schedule: Schedule
    desired: int
    max_steps: int | None
    nonfinite: NonFinite
    evaluator: Evaluator | None
    on_step: Callable[[StepResult], object] | None
    keeper: Keeper | None
    epochs: Epochs
    progress: Progress
    undo: Restore
    saved: Fields | None = None
    differences: tuple[str, ...] = ()

    @classmethod
    def resolve(
        cls,
        job: Job,
        *,
        schedule: tuple[object, object],
        desired: int,
        epochs: int,
        max_steps: int | None,
        drop_last: bool,
        nonfinite: NonFinite,
        eval_data: Data | None,
        metrics: Mapping[str, Metric] | None,
        checkpoint_dir: str | os.PathLike[str] | None,
        on_step: Callable[[StepResult], object] | None,
    ) -> "Course":
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
        evaluator = _evaluator(job.recipe, eval_data, metrics, desired)
        keeper = None
        if checkpoint_dir is not None:
            keeper = Keeper(
                store=CheckpointStore(checkpoint_dir),
                sources=[job.source.owner, job.recipe.model],
                desired=desired,
                loss_module=job.loss_module,
            )
        undo = attributes_of(job.recipe.optimizer)
        try:
            resolved = resolve_schedule(schedule[0], job.recipe.optimizer, schedule[1])
        except BaseException:
            undo()
            raise
        return cls(
            job=job,
            undo=undo,
            schedule=resolved,
            desired=desired,
            max_steps=max_steps,
            nonfinite=nonfinite,
            evaluator=evaluator,
            on_step=on_step,
            keeper=keeper,
            epochs=Epochs(
                source=job.source,
                desired=desired,
                drop_last=drop_last,
                last=epochs,
                place=Place(),
                note=None if keeper is None else keeper.random_state,
            ),
            progress=Progress(),
        )

    def open(self, observer: Observer) -> Nest | None:
        """Go on from the last checkpoint, if there is one, and read the next logical batch.

        Returns:
            None where the epoch that was begun holds no more.

        Raises:
            CheckpointError: If there is one that cannot be trained on from.
            ValueError: If there is nothing to train on.
        """
        first = self._open(observer)
        if first is not None:
            told = crowded(self.job.source.batches, first, host_memory()[1])
            if told:
                warnings.warn(told, stacklevel=4)  # Where find_and_train was called.
        return first

    def _open(self, observer: Observer) -> Nest | None:
        keeper, epochs = self.keeper, self.epochs
        saved = None if keeper is None else keeper.latest()
        self._try_evaluation()
        if saved is None or keeper is None:
            first = epochs.open()
            if first is None:
                raise ValueError(_nothing(epochs))
            return first
        optimizer, scheduler = self.job.recipe.optimizer, self.schedule.scheduler
        given = settings_of(optimizer, scheduler)
        keeper.put_back(saved, self.job.recipe, self.schedule)
        self.saved = saved
        self.differences = (
            *overruled(given, settings_of(optimizer, scheduler)),
            *changed(saved["facts"].get("given", {}), self._given()),
        )
        self.progress = Progress.from_state_dict(saved["progress"])
        epochs.place = Place(**saved["place"])
        observer(
            Resumed(
                checkpoint=str(keeper.path),
                steps=self.progress.steps,
                epoch=min(epochs.place.epoch, epochs.last),
                differences=self.differences,
            )
        )
        if self.is_done():
            keeper.put_random_back(saved["random"])
            return None
        return epochs.open(saved["random"], keeper.put_random_back)

    def _given(self) -> dict[str, object]:
        """What steps depend on and no state keeps."""
        update = self.job.recipe.update
        return {
            "precision": self.job.options.precision,
            "clip_grad_norm": update.clip_grad_norm,
            "clip_grad_value": update.clip_grad_value,
            "the number of examples in data": self.job.source.examples,
        }

    def _try_evaluation(self) -> None:
        """Evaluate two examples: what is wrong with that is better known now than in an hour."""
        if self.evaluator is not None:
            with self.job.undisturbed():
                self.evaluator.try_out()

    def is_done(self) -> bool:
        """Whether no step is left to take."""
        enough = self.max_steps is not None and self.progress.steps >= self.max_steps
        return enough or self.epochs.place.epoch > self.epochs.last

    def window(self, first: Nest | None) -> int:
        """Return how many examples a full logical batch has: what is desired, or all the data."""
        if self.saved is not None:
            return int(self.saved["facts"]["window"])
        assert first is not None, "a training begins with a batch"
        return size_of(first)

    @contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """Take back what a scheduler and the first batch have done if an error ends what is inside.

        A checkpoint that was put back stays.
        """
        put_random_back = random_state([self.job.source.owner, self.job.recipe.model])
        try:
            yield
        except BaseException:
            put_random_back()
            if self.saved is None:
                self.undo()
            raise

    def train(
        self,
        found: SearchResult,
        window: int,
        observer: Observer,
        find: FindForInference,
        multiple_of: int = 1,
    ) -> TrainingResult:
        """Train with the size that was found.

        Args:
            found: The search.
            window: Examples in a full logical batch.
            observer: Is told of every step and epoch.
            find: Returns the largest size that inference really ran at.
            multiple_of: What micro-batches are multiples of.
        """
        job = self.job
        job.move()
        driver = self._driver(found, window, observer)
        driver.multiple_of = multiple_of
        if self.evaluator is not None:
            self.evaluator.find, self.evaluator.limited = find, driver.limited
        plan = driver.plan(window)
        observer(TrainingStarted(plan=plan, steps=self.steps_to_come(), epochs=self.epochs.last))
        job.device.reset_peak()
        with training_mode(job.recipe.model):
            normalises = normalises_by_batch(job.recipe.model.modules())
            Loop(
                driver,
                self.progress,
                desired=window,
                max_steps=self.max_steps,
                observer=observer,
                on_step=self.on_step,
                evaluate=self.evaluator,
                keeper=self.keeper,
            ).run(self.epochs)
        ended = driver.plan(window)
        told = notes(
            plan,
            ended,
            self.progress,
            asked=self.desired,
            normalises=normalises,
            recipe=job.recipe,
            moved=sorted(driver.moved_buffers),
            agreed=driver.agreed,
            found=found,
        )
        reading = job.device.read()
        pieces = torn(reading.peak_bytes, reading.peak_reserved_bytes, "training")
        return self._result(found, ended, (*told, *pieces))

    def done_before(self) -> TrainingResult:
        """Return the result of a training that its checkpoint has finished."""
        assert self.saved is not None, "only a checkpoint can have finished"
        found = _search_from(self.saved["facts"]["search"])
        plan = BatchPlan(desired=self.window(None), tolerable=self.saved["facts"]["tolerable"])
        return self._result(found, plan, ("nothing was left to do: the checkpoint is complete",))

    def _result(
        self, found: SearchResult, plan: BatchPlan, told: tuple[str, ...]
    ) -> TrainingResult:
        progress, place = self.progress, self.epochs.place
        progress.read()
        resumed: tuple[str, ...] = ()
        if self.saved is not None and self.keeper is not None:
            steps = int(self.saved["driver"]["steps"])
            resumed = (f"went on from a checkpoint in {self.keeper.store.directory}, step {steps}",)
            resumed += self.differences
            if keeps_workers(self.job.source.batches) and self.saved["place"]["epoch"] > 1:
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
            notes=(*resumed, *told),
        )

    def _driver(self, found: SearchResult, window: int, observer: Observer) -> Driver:
        job = self.job
        driver = Driver(
            recipe=job.recipe,
            size=MicroBatchSize(found.fastest),
            nonfinite=self.nonfinite,
            schedule=self.schedule,
            limit_bytes=found.limit_bytes if job.trains_limited else None,
            observer=observer,
            replay=job.options.replay,
            ran_out=job.options.ran_out,
        )
        facts: dict[str, object] = {
            "window": window,
            "tolerable": found.fastest,
            "device": job.device.name,
            "given": self._given(),
            "search": _plain(found),
        }
        if self.saved is not None:
            before = self.saved["facts"]
            driver.load_counts(self.saved["driver"])
            same_device = before["device"] == job.device.name
            if same_device and before["tolerable"] <= found.size:
                facts["tolerable"] = before["tolerable"]  # The same pieces round the same way.
            else:
                driver.size = MicroBatchSize(found.fastest)
        if self.keeper is not None:
            self.keeper.facts = facts
        return driver

    def steps_to_come(self) -> int | None:
        """Return how many optimizer steps are left; None where the data does not say."""
        examples, epochs = self.job.source.examples, self.epochs
        ends = [] if self.max_steps is None else [self.max_steps]
        if examples is not None:
            desired = self.desired
            in_epoch = examples // desired if epochs.drop_last else -(-examples // desired)
            ends.append(epochs.last * in_epoch)
        return max(0, min(ends) - self.progress.steps) if ends else None


def _evaluator(
    recipe: Recipe, data: Data | None, metrics: Mapping[str, Metric] | None, desired: int
) -> Evaluator | None:
    _check_metrics(metrics, recipe.objective)
    if data is not None:
        source = _evaluated(data, desired)
        # What it learns of a loss must not reach training: evaluated or not, that is the same.
        recipe = replace(recipe, objective=recipe.objective.apart())
        return Evaluator(recipe=recipe, source=source, desired=desired, metrics=metrics)
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
    if metrics is None:
        return
    if isinstance(objective, Custom):
        raise ValueError(
            "metrics are given outputs and targets, which batch_loss keeps to itself; pass loss "
            "and forward instead"
        )
    if not isinstance(metrics, Mapping) or not all(map(callable, metrics.values())):
        raise TypeError(
            f"metrics must be a mapping from names to callables (outputs, targets), got {metrics!r}"
        )


def _nothing(epochs: Epochs) -> str:
    if epochs.drop_last and epochs.source.examples:
        return (
            "with drop_last=True nothing is left to train on: data holds "
            f"{epochs.source.examples} examples, desired is {epochs.desired}"
        )
    return "data is empty: it holds no example" + " to fill a batch" * epochs.drop_last


def _plain(found: SearchResult) -> dict[str, object]:
    """What of a search a checkpoint keeps: all but the trials."""
    return {
        "size": found.size,
        "ceiling": found.ceiling,
        "limit_bytes": found.limit_bytes,
        "limited_by": found.limited_by,
        "upper": asdict(found.upper),
    }


def _search_from(plain: Mapping[str, Any]) -> SearchResult:
    return SearchResult(**{**plain, "upper": Upper(**plain["upper"]), "trials": ()})
