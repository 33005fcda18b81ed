"""What of a training was not exact, or not as asked, in words."""

import math
from collections.abc import Iterator, Sequence
from typing import Final

from autobatch.plan import BatchPlan
from autobatch.results import SearchResult
from autobatch.training.custom import Custom
from autobatch.training.inferred import compared_by
from autobatch.training.known_losses import InferredLoss
from autobatch.training.progress import Progress
from autobatch.training.window import Recipe


def notes(
    planned: BatchPlan,
    ended: BatchPlan,
    done: Progress,
    *,
    asked: int,
    normalises: bool,
    recipe: Recipe,
    moved: Sequence[str],
    agreed: int,
    found: SearchResult,
) -> Iterator[str]:
    """Yield a sentence for each thing that the user should know of.

    Args:
        planned: How a logical batch was to be cut.
        ended: How it was cut at the end.
        done: What the training did.
        asked: The desired batch, which the data may not fill.
        normalises: Whether a layer normalises with the statistics of the batch that it sees.
        recipe: What a step was made of.
        moved: Names of what of the model a forward pass moves, BatchNorm's buffers apart.
        agreed: How often an unknown loss was held to the law, and kept it.
        found: The search.
    """
    if planned.desired < asked:
        yield (
            f"the data holds {planned.desired} examples, fewer than the {asked} desired: a step "
            f"takes {planned.desired}"
        )
    yield from _of_the_loss(recipe)
    if max(planned.accumulation_steps, ended.accumulation_steps) > 1:
        yield from _of_cutting(recipe, moved, agreed, normalises=normalises)
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


def _of_the_loss(recipe: Recipe) -> Iterator[str]:
    """Whether mean squared error was inferred, which a classifier hardly wants."""
    compared = compared_by(recipe.objective)
    if compared is None or not isinstance(compared.loss, InferredLoss):
        return
    if compared.loss.squares:
        yield (
            "no loss was given and the targets are floating, so the loss is the mean squared "
            "error; for classes pass integer targets, or loss="
        )


_LOADING_SHARE: Final = 0.5
_SKIPPED = {
    "no valid term": "held no valid term and were skipped",
    "not finite": "had a loss or gradient that is not finite and were skipped",
    "overflow": "overflowed in fp16 and were skipped while the scale came down",
}


def _of_cutting(
    recipe: Recipe, moved: Sequence[str], agreed: int, *, normalises: bool
) -> Iterator[str]:
    """What differs from the undivided batch, or was not proved."""
    if normalises and recipe.batch_norm == "micro":
        yield (
            "BatchNorm normalises each micro-batch by its own statistics, so this model's steps "
            "differ from the undivided batch's in that; its running statistics are pooled over the "
            "whole batch and moved once a step"
        )
    if normalises and recipe.batch_norm == "frozen":
        yield "BatchNorm was frozen: it normalises by its running statistics, which do not move"
    if moved:
        yield (
            "the forward pass moves these of the model's buffers, parameters or attributes, once a "
            f"micro-batch instead of once a step: {', '.join(moved)}"
        )
    compared = compared_by(recipe.objective)
    if compared is not None and compared.loss.checked:
        seen = (
            f"it was seen {agreed} times, in the windows 1, 2, 4, 8 and so on that were cut, to be "
            "a mean over examples (or its sum over its terms)"
        )
        unseen = "it could not be checked, and is believed to be a mean over examples"
        yield f"the loss is none that autobatch knows: {seen if agreed else unseen}"
    if isinstance(recipe.objective, Custom):
        yield (
            "batch_loss is a function of yours: its sums and terms were seen to add up for two "
            "examples in the windows 1, 2, 4, 8 and so on that were cut, unless it draws random "
            "numbers"
        )
