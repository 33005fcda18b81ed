"""What of a training was not exact, or not as asked, in words."""

import math
from collections.abc import Iterator, Sequence

from autobatch.plan import BatchPlan
from autobatch.training.loop import Progress


def notes(
    planned: BatchPlan,
    ended: BatchPlan,
    done: Progress,
    *,
    asked: int,
    normalises: bool,
    checked: bool,
    moved: Sequence[str],
) -> Iterator[str]:
    """Yield a sentence for each thing that the user should know of.

    Args:
        planned: How a logical batch was to be cut.
        ended: How it was cut at the end.
        done: What the training did.
        asked: The desired batch, which the data may not fill.
        normalises: Whether a layer normalises with the statistics of the batch that it sees.
        checked: Whether the loss was not recognised.
        moved: Names of buffers that a forward pass moves, BatchNorm's apart.
    """
    if planned.desired < asked:
        yield (
            f"the data holds {planned.desired} examples, fewer than the {asked} desired: a step "
            f"takes {planned.desired}"
        )
    if normalises and max(planned.accumulation_steps, ended.accumulation_steps) > 1:
        yield (
            "BatchNorm normalises each micro-batch by its own statistics, so this model's steps "
            "differ from the undivided batch's in that; its running statistics are pooled over the "
            "whole batch and moved once a step"
        )
    if moved:
        yield (
            "these buffers are moved by the forward pass, so once a micro-batch instead of once a "
            f"step: {', '.join(moved)}"
        )
    if checked and max(planned.accumulation_steps, ended.accumulation_steps) > 1:
        yield (
            "the loss is none that autobatch knows: it was seen to be a mean over examples (or its "
            "sum over its terms) in the windows 1, 2, 4, 8 and so on that were cut"
        )
    lost = sum(not math.isfinite(loss) for loss in done.losses)
    if lost:
        yield f"{lost} of {len(done.losses)} losses are not finite"
    if done.replays:
        yield (
            f"memory ran out {done.replays} times in training; each window was run again, and "
            f"micro-batches went from {planned.micro_batch} to {ended.micro_batch}"
        )
    if done.skipped:
        yield f"{done.skipped} logical batches held no valid term and were skipped"
