"""What of a training was not exact, or not as asked, in words."""

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
    done: Progress,
    *,
    desired: int,
    objective: Objective,
    batch_norm: BatchNormMode | None,
    mutated: Sequence[str],
    found: SearchResult,
) -> Iterator[str]:
    """Yield a sentence for each thing that the user should know of.

    Args:
        planned: How a logical batch was to be cut.
        ended: How it was cut at the end.
        done: What the training did.
        desired: Examples in a logical batch, as the user wants it.
        objective: What was minimized.
        batch_norm: What BatchNorm did with a micro-batch; None where no layer normalizes by the
            batch.
        mutated: Names of what of the model a forward pass changes, except BatchNorm's buffers.
        found: The search.
    """
    if planned.desired < desired:
        yield (
            f"the data holds {planned.desired} examples, fewer than the {desired} desired: a step "
            f"takes {planned.desired}"
        )
    cut = max(planned.accumulation_steps, ended.accumulation_steps) > 1
    if cut:
        yield from _of_cutting(batch_norm, mutated)
    yield from objective.notes(cut=cut)
    speeds = {speed.size: speed.examples_per_second for speed in found.speeds}
    if found.fastest != found.size:
        yield (
            f"micro-batches of {found.fastest} were preferred to the tolerable {found.size}: "
            f"{speeds[found.fastest]:,.4g} examples a second against "
            f"{speeds.get(found.size, 0.0):,.4g}"
        )
    if done.loading_seconds > max(_LOADING_SHARE * done.seconds, 1.0):
        yield (
            f"steps waited for their data in {done.loading_seconds / done.seconds:.0%} of the "
            "time: loading is the limit, and no micro-batch trains faster than that"
        )
    yield from found.notes
    lost = sum(not math.isfinite(loss) for loss in done.losses)
    if lost:
        yield f"{lost} of {len(done.losses)} losses are not finite"
    if done.replays:
        yield (
            f"memory ran out {done.replays} times in training; each window was run again, and "
            f"micro-batches went from {planned.micro_batch} to {ended.micro_batch}"
        )
    for reason, count in done.skipped.items():
        yield f"{count} logical batches {_SKIPPED.get(reason, reason)}"


_LOADING_SHARE: Final = 0.5
_SKIPPED = {
    "no valid term": "held no valid term and were skipped",
    "not finite": "had a loss or gradient that is not finite and were skipped",
    "overflow": "overflowed in fp16 and were skipped while the scale came down",
}


def _of_cutting(batch_norm: BatchNormMode | None, mutated: Sequence[str]) -> Iterator[str]:
    """What differs from the undivided batch."""
    if batch_norm == "micro":
        yield (
            "BatchNorm normalises each micro-batch by its own statistics, so this model's steps "
            "differ from the undivided batch's in that; its running statistics are pooled over the "
            "whole batch and moved once a step"
        )
    if batch_norm == "frozen":
        yield "BatchNorm was frozen: it normalises by its running statistics, which do not move"
    if mutated:
        yield (
            "the forward pass moves these of the model's buffers, parameters or attributes, once a "
            f"micro-batch instead of once a step: {', '.join(mutated)}"
        )
