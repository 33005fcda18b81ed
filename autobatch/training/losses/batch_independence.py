"""The check that a model treats each example by itself, so that its batch may be cut.

A check of the loss sees outputs only. Whether an example's output depends on the other examples
(attention across the batch, statistics outside BatchNorm) shows only in the model itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from autobatch.data.tree import BatchTree, tensors
from autobatch.errors import InexactStepError
from autobatch.training.losses.pair_probe import (
    DoublingSchedule,
    first_and_last,
    must_propagate,
    probe_pair,
)
from autobatch.training.losses.tolerance import Tolerance

# How far the same row may differ in batches of one and of two: kernels differ by size.
OUTPUT_TOLERANCE: Final = Tolerance(float64=1e-6, float32=1e-3, float16=5e-2, bfloat16=5e-2)

Outputs = Callable[[BatchTree], BatchTree]


@dataclass(slots=True)
class BatchIndependenceCheck:
    """Runs two examples alone and together, in evaluation mode, until a comparison is possible.

    The check runs in the logical batches 1, 2, 4, 8 and so on that are cut. It has no answer where
    the model draws random numbers, normalizes by the batch in evaluation mode, refuses a single
    example, or returns nothing that has one row an example.
    """

    _schedule: DoublingSchedule = field(default_factory=DoublingSchedule, init=False)
    _passed: bool = field(default=False, init=False)

    def check(self, model: nn.Module, outputs_of: Outputs, batch: BatchTree) -> None:
        """Refuse a model that mixes examples.

        Args:
            model: In any mode; afterwards it is as before.
            outputs_of: Copies a few examples to the device and runs the model on them.
            batch: The logical batch.

        Raises:
            InexactStepError: If an example's outputs depend on the other example.
        """
        self._schedule.seen += 1
        if self._passed or not self._schedule.is_due:
            return
        pair = first_and_last(batch)
        if pair is None:
            return
        self._schedule.passed += 1
        if any(isinstance(m, _BatchNorm) and m.running_mean is None for m in model.modules()):
            return
        for first, second, together, repeated in _outputs_with_rows(model, outputs_of, pair):
            if not _are_close(together, repeated):
                return
            alone = torch.cat([first, second])
            if not _are_close(alone, together):
                difference = float((alone - together).abs().max())
                raise InexactStepError(
                    "the model mixes examples: the outputs for two examples differ by "
                    f"{difference:.3g} between a run of both together and a run of each alone, in "
                    "evaluation mode, so that no split of a batch gives the undivided step; choose "
                    "a desired batch that fits as one micro-batch, or move the comparison of "
                    "examples from the model into a loss, WholeBatch(loss)"
                )
            self._passed = True


def _outputs_with_rows(
    model: nn.Module, outputs_of: Outputs, pair: BatchTree
) -> list[Sequence[Tensor]]:
    """Return each floating output that has one row an example: of both alone, together, and again.

    The list is empty where the model has no such outputs or cannot run like this.
    """
    try:
        runs = probe_pair(model, lambda batch: list(tensors(outputs_of(batch))), pair)
    except Exception as error:  # A model may refuse a single example; this does not matter.
        if must_propagate(error):
            raise
        return []
    if len(set(map(len, runs))) != 1:
        return []
    return [
        output
        for output in zip(*runs, strict=True)
        if output[0].is_floating_point()
        and all(
            tensor.shape == (examples, *output[0].shape[1:])
            for tensor, examples in zip(output, (1, 1, 2, 2), strict=True)
        )
    ]


def _are_close(one: Tensor, other: Tensor) -> bool:
    """Whether two outputs are equal but for rounding; a nan is no difference."""
    if not one.numel():
        return True
    scale = torch.maximum(one.abs().max(), other.abs().max())
    return not bool((one - other).abs().max() > OUTPUT_TOLERANCE.of(one.dtype) * scale)
