"""Notes on what was not exact in a training."""

import math
from collections.abc import Iterator, Sequence
from typing import Final

from autobatch.results.plan import BatchPlan
from autobatch.results.search import SearchResult
from autobatch.training.batchnorm.modes import BatchNormMode
from autobatch.training.losses.objective import Objective
from autobatch.training.progress import Progress


def notes(
    planned: BatchPlan,
    ended: BatchPlan,
    progress: Progress,
    *,
    desired: int,
    objective: Objective,
    batch_norm: BatchNormMode | None,
    mutated: Sequence[str],
    found: SearchResult,
) -> Iterator[str]:
    """Yield one sentence for each thing that the user should know.

    Args:
        planned: How a logical batch was cut at the beginning.
        ended: How a logical batch was cut at the end.
        progress: The losses, seconds, retries and skipped batches of the training.
        desired: Examples in a logical batch, as the user wants it.
        objective: The loss that was minimized.
        batch_norm: How BatchNorm treated micro-batches; None if no layer normalizes by the batch.
        mutated: Names of the buffers, parameters and attributes that a forward pass changes,
            without those of BatchNorm.
        found: The result of the search.
    """
    if planned.desired < desired:
        yield (
            f"the data holds {planned.desired} examples, fewer than desired={desired}, so each "
            f"step is over {planned.desired} examples"
        )
    cut = max(planned.accumulation_steps, ended.accumulation_steps) > 1
    if cut:
        yield from _notes_on_cutting(batch_norm, mutated)
    yield from objective.notes(cut=cut)
    speeds = {speed.size: speed.examples_per_second for speed in found.speeds}
    if found.fastest != found.size:
        yield (
            f"training used micro-batches of {found.fastest} examples, which are faster than the "
            f"tolerable batch of {found.size}: {speeds[found.fastest]:,.4g} examples a second "
            f"against {speeds.get(found.size, 0.0):,.4g}"
        )
    if progress.loading_seconds > max(_LOADING_FRACTION * progress.seconds, 1.0):
        yield (
            f"steps waited for data in {progress.loading_seconds / progress.seconds:.0%} of the "
            "time: the data loading limits the speed, and no other micro-batch size is faster"
        )
    yield from found.notes
    not_finite = sum(not math.isfinite(loss) for loss in progress.losses)
    if not_finite:
        yield f"{not_finite} of {len(progress.losses)} losses are not finite"
    if progress.replays:
        yield (
            f"memory ran out {progress.replays} times in training; each time the logical batch "
            f"ran again, and the micro-batch size went from {planned.micro_batch} to "
            f"{ended.micro_batch} examples"
        )
    for reason, count in progress.skipped.items():
        yield f"{count} logical batches {_SKIPPED.get(reason, reason)}"


_LOADING_FRACTION: Final = 0.5
_SKIPPED = {
    "no valid term": "were skipped because they held no valid term",
    "not finite": "were skipped because their loss or gradient was not finite",
    "overflow": (
        "were skipped because their gradient overflowed in fp16; the GradScaler lowered its scale"
    ),
}


def _notes_on_cutting(batch_norm: BatchNormMode | None, mutated: Sequence[str]) -> Iterator[str]:
    """Yield how a step differs from the step of the undivided batch."""
    if batch_norm == "micro":
        yield (
            "BatchNorm normalizes each micro-batch by its own statistics, so a step differs from "
            "the step of the undivided batch; the running statistics are pooled over the whole "
            "batch and updated once a step"
        )
    if batch_norm == "frozen":
        yield "BatchNorm was frozen: it normalizes by its running statistics, which do not change"
    if mutated:
        yield (
            "the forward pass changes these buffers, parameters or attributes of the model once a "
            f"micro-batch instead of once a step: {', '.join(mutated)}"
        )
