"""Where a training begins: at the first logical batch, or where its last checkpoint stopped."""

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from autobatch.data.tree import BatchTree, size_of
from autobatch.data.worker_memory import worker_memory_warning
from autobatch.devices.host_memory import host_memory
from autobatch.events import Observer, Resumed
from autobatch.results.search import SearchResult, Upper
from autobatch.training.checkpointing.manager import CheckpointFields, CheckpointManager
from autobatch.training.checkpointing.resume_diff import changed, overruled, settings_of
from autobatch.training.epoch_batches import Epochs
from autobatch.training.progress import DataPosition, Progress
from autobatch.training.request import TrainingRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingStart:
    """Where a training begins.

    Attributes:
        logical_batch_size: Examples in a full logical batch: the desired number, or all examples of
            the data if there are fewer.
        epochs: The epochs that are left. Their first logical batch is already read.
        progress: What the training did before the checkpoint; the training adds to it.
        max_steps: The most optimizer steps, with those before the checkpoint; None for all.
        saved: The checkpoint; None where training begins anew.
        differences: One sentence for each setting in which the checkpoint differs from this call.
    """

    logical_batch_size: int
    epochs: Epochs
    progress: Progress
    max_steps: int | None
    saved: CheckpointFields | None = None
    differences: tuple[str, ...] = ()

    @property
    def first(self) -> BatchTree | None:
        """The logical batch that training begins with; None if there is none."""
        return self.epochs.first

    @property
    def is_done(self) -> bool:
        """True if no step is left to take."""
        return _is_done(self.epochs, self.progress, self.max_steps)

    @property
    def steps_left(self) -> int | None:
        """The optimizer steps that are left; None if the data has no length."""
        ends = [] if self.max_steps is None else [self.max_steps]
        if (steps := self.epochs.steps) is not None:
            ends.append(steps)
        return max(0, min(ends) - self.progress.steps) if ends else None

    @property
    def search(self) -> SearchResult | None:
        """The search result that the checkpoint holds, without trials; None without checkpoint."""
        if self.saved is None:
            return None
        plain: Mapping[str, Any] = self.saved["metadata"]["search"]
        return SearchResult(**{**plain, "upper": Upper(**plain["upper"]), "trials": ()})


def begin_or_resume(request: TrainingRequest, observer: Observer) -> TrainingStart:
    """Restore the last checkpoint if there is one, and read the next logical batch.

    Args:
        request: The arguments.
        observer: Receives ``Resumed`` if a checkpoint is restored.

    Raises:
        CheckpointError: Training cannot continue from the checkpoint.
        ValueError: There is nothing to train on.
    """
    checkpoints = request.checkpoints
    saved = None if checkpoints is None else checkpoints.latest()
    request.try_evaluation()
    if saved is None or checkpoints is None:
        start = _begin(request)
    else:
        start = _resume(request, checkpoints, saved, observer)
    if start.first is not None:
        warning = worker_memory_warning(
            request.workload.source.batches, start.first, host_memory()[1]
        )
        if warning:
            warnings.warn(warning, stacklevel=4)  # The line that calls find_and_train.
    return start


def plain_search(found: SearchResult) -> dict[str, object]:
    """Return what a checkpoint holds of a search: everything except the trials."""
    return {
        "size": found.size,
        "ceiling": found.ceiling,
        "limit_bytes": found.limit_bytes,
        "limited_by": found.limited_by,
        "upper": asdict(found.upper),
    }


def _begin(request: TrainingRequest) -> TrainingStart:
    epochs = _epochs(request, DataPosition())
    first = epochs.open()
    if first is None:
        raise ValueError(_nothing_to_train_on(epochs))
    return TrainingStart(
        logical_batch_size=size_of(first),
        epochs=epochs,
        progress=Progress(),
        max_steps=request.max_steps,
    )


def _resume(
    request: TrainingRequest,
    checkpoints: CheckpointManager,
    saved: CheckpointFields,
    observer: Observer,
) -> TrainingStart:
    """Restore a checkpoint in place, and read the logical batch that follows."""
    optimizer, scheduler = request.workload.step.optimizer, request.schedule.scheduler
    before = settings_of(optimizer, scheduler)
    checkpoints.restore(saved)
    differences = (
        *overruled(before, settings_of(optimizer, scheduler)),
        *changed(saved["metadata"].get("given", {}), request.config),
    )
    progress = Progress.from_state_dict(saved["progress"])
    epochs = _epochs(request, DataPosition(**saved["place"]))
    observer(
        Resumed(
            checkpoint=str(checkpoints.path),
            steps=progress.steps,
            epoch=min(epochs.position.epoch, epochs.last),
            differences=differences,
        )
    )
    if _is_done(epochs, progress, request.max_steps):
        checkpoints.restore_random(saved["random"])
    else:
        epochs.open(saved["random"], checkpoints.restore_random)
    return TrainingStart(
        logical_batch_size=int(saved["metadata"]["window"]),
        epochs=epochs,
        progress=progress,
        max_steps=request.max_steps,
        saved=saved,
        differences=differences,
    )


def _epochs(request: TrainingRequest, position: DataPosition) -> Epochs:
    return Epochs(
        source=request.workload.source,
        desired=request.desired,
        drop_last=request.drop_last,
        last=request.epochs,
        position=position,
        random_state=None if request.checkpoints is None else request.checkpoints.random_state,
    )


def _is_done(epochs: Epochs, progress: Progress, max_steps: int | None) -> bool:
    enough = max_steps is not None and progress.steps >= max_steps
    return enough or epochs.position.epoch > epochs.last


def _nothing_to_train_on(epochs: Epochs) -> str:
    if epochs.drop_last and epochs.source.examples:
        return (
            "with drop_last=True nothing is left to train on: data holds "
            f"{epochs.source.examples} examples, desired is {epochs.desired}; lower desired, or "
            "pass drop_last=False"
        )
    return "data is empty: it holds no example" + " to fill a batch" * epochs.drop_last
