"""Where a training begins: at the first logical batch, or where its last checkpoint stopped."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from autobatch.data.tree import BatchTree, size_of
from autobatch.events import Observer, Resumed
from autobatch.results.search import SearchResult, Upper
from autobatch.training.checkpointing.manager import CheckpointManager, Fields
from autobatch.training.checkpointing.resume_diff import changed, overruled, settings_of
from autobatch.training.epochs import Epochs
from autobatch.training.progress import DataPosition, Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingStart:
    """Where a training begins.

    Attributes:
        window: Examples in a full logical batch: what is desired, or all the data.
        epochs: The data from there on; its first logical batch has been read.
        progress: What has been done before.
        saved: The checkpoint, or None where training begins anew.
        differences: What of the checkpoint is otherwise than the call says, in words.
    """

    window: int
    epochs: Epochs
    progress: Progress
    saved: Fields | None = None
    differences: tuple[str, ...] = ()

    @property
    def first(self) -> BatchTree | None:
        """The logical batch that training begins with; None where nothing is left to train on."""
        return self.epochs.first

    @property
    def search(self) -> SearchResult | None:
        """What the search found before the checkpoint, without its trials."""
        if self.saved is None:
            return None
        plain: Mapping[str, Any] = self.saved["metadata"]["search"]
        return SearchResult(**{**plain, "upper": Upper(**plain["upper"]), "trials": ()})


def plain_search(found: SearchResult) -> dict[str, object]:
    """Return what a checkpoint keeps of a search: everything but the trials."""
    return {
        "size": found.size,
        "ceiling": found.ceiling,
        "limit_bytes": found.limit_bytes,
        "limited_by": found.limited_by,
        "upper": asdict(found.upper),
    }


def begin(epochs: Epochs) -> TrainingStart:
    """Read the first logical batch.

    Raises:
        ValueError: If there is nothing to train on.
    """
    first = epochs.open()
    if first is None:
        raise ValueError(_nothing(epochs))
    return TrainingStart(window=size_of(first), epochs=epochs, progress=Progress())


def resume(
    saved: Fields,
    checkpoints: CheckpointManager,
    epochs: Epochs,
    *,
    given: Mapping[str, object],
    max_steps: int | None,
    observer: Observer,
) -> TrainingStart:
    """Restore a checkpoint in place, and read the logical batch that follows.

    Args:
        saved: The checkpoint.
        checkpoints: Restores it.
        epochs: The data, from its beginning.
        given: What steps depend on and no state holds, by name.
        max_steps: The most optimizer steps, or None.
        observer: Receives an event.

    Raises:
        CheckpointError: If training cannot go on from the checkpoint.
    """
    optimizer, scheduler = checkpoints.step.optimizer, checkpoints.schedule.scheduler
    before = settings_of(optimizer, scheduler)
    checkpoints.restore(saved)
    differences = (
        *overruled(before, settings_of(optimizer, scheduler)),
        *changed(saved["metadata"].get("given", {}), given),
    )
    progress = Progress.from_state_dict(saved["progress"])
    epochs.place = DataPosition(**saved["place"])
    observer(
        Resumed(
            checkpoint=str(checkpoints.path),
            steps=progress.steps,
            epoch=min(epochs.place.epoch, epochs.last),
            differences=differences,
        )
    )
    if is_done(epochs, progress, max_steps):
        checkpoints.restore_random(saved["random"])
    else:
        epochs.open(saved["random"], checkpoints.restore_random)
    return TrainingStart(
        window=int(saved["metadata"]["window"]),
        epochs=epochs,
        progress=progress,
        saved=saved,
        differences=differences,
    )


def is_done(epochs: Epochs, progress: Progress, max_steps: int | None) -> bool:
    """Return whether no step is left to take."""
    enough = max_steps is not None and progress.steps >= max_steps
    return enough or epochs.place.epoch > epochs.last


def _nothing(epochs: Epochs) -> str:
    if epochs.drop_last and epochs.source.examples:
        return (
            "with drop_last=True nothing is left to train on: data holds "
            f"{epochs.source.examples} examples, desired is {epochs.desired}"
        )
    return "data is empty: it holds no example" + " to fill a batch" * epochs.drop_last
