"""The result of a training, made from its start, its progress and its notes."""

from typing import Final

from autobatch.results.plan import BatchPlan
from autobatch.results.search import SearchResult
from autobatch.results.training import TrainingResult
from autobatch.training.epoch_batches import keeps_workers
from autobatch.training.request import TrainingRequest
from autobatch.training.resume import TrainingStart

_PERSISTENT_WORKERS: Final = (
    "the loader's workers persist: after a checkpoint, their own random generators do not continue "
    "as they would have without the interruption; with persistent_workers=False they do"
)


def training_result(
    request: TrainingRequest,
    start: TrainingStart,
    found: SearchResult,
    plan: BatchPlan,
    notes: tuple[str, ...],
) -> TrainingResult:
    """Return the result of a training.

    Args:
        request: The arguments.
        start: Where training began; its progress now counts all steps.
        found: The search.
        plan: How a logical batch was cut at the end.
        notes: Sentences on what was not exact.
    """
    progress, position = start.progress, start.epochs.position
    progress.read()
    return TrainingResult(
        plan=plan,
        search=found,
        losses=tuple(progress.losses),
        epochs=position.epoch if position.windows else position.epoch - 1,
        examples=progress.examples,
        seconds=progress.seconds,
        loading_seconds=progress.loading_seconds,
        replays=progress.replays,
        evaluations=tuple(progress.evaluations),
        notes=(*_notes_on_resuming(request, start), *notes),
    )


def finished_before(request: TrainingRequest, start: TrainingStart) -> TrainingResult:
    """Return the result of a training whose checkpoint has no step left."""
    assert start.saved is not None, "only a checkpoint can have finished"
    assert start.search is not None, "a checkpoint holds its search"
    plan = BatchPlan(
        desired=start.logical_batch_size, tolerable=start.saved["metadata"]["tolerable"]
    )
    note = "nothing was left to do: the checkpoint is complete"
    return training_result(request, start, start.search, plan, (note,))


def _notes_on_resuming(request: TrainingRequest, start: TrainingStart) -> tuple[str, ...]:
    if start.saved is None or request.checkpoints is None:
        return ()
    steps, directory = int(start.saved["runner"]["steps"]), request.checkpoints.store.directory
    notes = (f"training continued from a checkpoint in {directory}, step {steps}",)
    if keeps_workers(request.workload.source.batches) and start.saved["place"]["epoch"] > 1:
        return (*notes, *start.differences, _PERSISTENT_WORKERS)
    return (*notes, *start.differences)
