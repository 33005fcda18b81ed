"""The check that a model treats each example by itself, so that its batch may be cut at all.

A loss can be held to the law from its outputs; that an example's output depends on its neighbours
(attention across the batch, statistics that are no BatchNorm) shows only in the model itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from autobatch.data.tree import BatchTree, tensors
from autobatch.devices.oom import verdict_of
from autobatch.errors import InexactStepError
from autobatch.results.verdict import Verdict
from autobatch.training.losses.pair_probe import (
    DoublingSchedule,
    alone_and_together,
    first_and_last,
)
from autobatch.training.model_state.evaluation_mode import undisturbed

# How far the same row may differ, as a fraction of the largest output: kernels differ by size.
_TOLERANCES: Final = {torch.float64: 1e-6, torch.float32: 1e-3}
_COARSE: Final = 5e-2

Outputs = Callable[[BatchTree], BatchTree]


@dataclass(slots=True)
class BatchIndependenceCheck:
    """Runs two examples alone and together, in evaluation mode, until they have told something.

    Asked in the windows 1, 2, 4, 8 and so on that are cut. It cannot tell where the model draws
    random numbers, normalises by the batch even then, refuses a single example, or returns nothing
    that has one row an example.
    """

    _schedule: DoublingSchedule = field(default_factory=DoublingSchedule, init=False)
    _shown: bool = field(default=False, init=False)

    def ask(self, model: nn.Module, outputs_of: Outputs, batch: BatchTree) -> None:
        """Refuse a model that mixes examples.

        Args:
            model: Put back as it was.
            outputs_of: Moves a few examples to the model and runs it.
            batch: The logical batch.

        Raises:
            InexactStepError: If an example's outputs depend on the other one.
        """
        self._schedule.seen += 1
        if self._shown or not self._schedule.is_due:
            return
        pair = first_and_last(batch)
        if pair is None:
            return
        self._schedule.passed += 1
        if any(isinstance(m, _BatchNorm) and m.running_mean is None for m in model.modules()):
            return
        found = _outputs(model, outputs_of, alone_and_together(pair))
        if found is None:
            return
        one, other, both, again = found
        for first, second, together, repeated in zip(one, other, both, again, strict=True):
            if not _alike(together, repeated):
                return
            alone = torch.cat([first, second])
            if not _alike(alone, together):
                difference = float((alone - together).abs().max())
                raise InexactStepError(
                    "the model mixes examples: the outputs for two of them differ by "
                    f"{difference:.3g} when they are run together and when each is run alone, in "
                    "evaluation mode, so no split of a batch gives the undivided step; choose a "
                    "desired batch that fits as one micro-batch, or move what compares examples "
                    "from the model into a loss, WholeBatch(loss)"
                )
            self._shown = True


def _outputs(
    model: nn.Module, outputs_of: Outputs, batches: Sequence[BatchTree]
) -> list[list[Tensor]] | None:
    """What has a row for each example, for each batch; None: cannot tell."""
    try:
        with undisturbed(model):
            made = [list(tensors(outputs_of(batch))) for batch in batches]
    except InexactStepError:
        raise
    except Exception as error:  # A model may refuse a single example, and be no worse for it.
        if verdict_of(error) is Verdict.OUT_OF_MEMORY:
            raise
        return None
    counts = [1, 1, 2, 2]
    if len(set(map(len, made))) != 1:
        return None
    kept = [
        place
        for place, column in enumerate(zip(*made, strict=True))
        if column[0].is_floating_point()
        and all(t.shape == (n, *column[0].shape[1:]) for t, n in zip(column, counts, strict=True))
    ]
    return [[row[place] for place in kept] for row in made]


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether two outputs are the same but for rounding; what is not finite is no reason."""
    scale = torch.maximum(one.abs().max(), other.abs().max()) if one.numel() else one.new_ones(())
    tolerance = _TOLERANCES.get(one.dtype, _COARSE)
    difference = (one - other).abs().max() if one.numel() else one.new_zeros(())
    return not bool(difference > tolerance * scale)
