"""Accumulate the gradient of a logical batch over its micro-batches.

    loss(logical batch) = sum of loss_sum(b) / sum of terms(b), over its micro-batches b

``loss_sum`` is the summed loss of a micro-batch, ``terms`` its number of loss terms. The sum over
the logical batch is divided once, by the terms of the whole logical batch. The mean of the
micro-batches' own means is another loss as soon as two micro-batches differ in their terms.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from autobatch.training.engine.loss_record import LossRecord
from autobatch.training.losses.loss import Terms

_MicroBatch = TypeVar("_MicroBatch")


def accumulate(
    micro_batches: Iterable[_MicroBatch],
    loss: Callable[[_MicroBatch], tuple[Tensor, Terms]],
    *,
    denominator: float,
    losses: LossRecord,
    scale: Callable[[Tensor], Tensor] | None = None,
    after_backward: Callable[[], None] | None = None,
) -> None:
    """Add the gradient of ``sum(loss_sum) / denominator`` to every ``.grad``.

    Args:
        micro_batches: At least one. Each is released before the next is requested.
        loss: Returns the summed loss of a micro-batch, and its number of terms if only the loss can
            count them.
        denominator: The number of loss terms of the logical batch.
        losses: Records the loss and the terms of each micro-batch.
        scale: Multiplies the gradient that a backward pass starts with, as a GradScaler does.
        after_backward: Called after each backward pass.
    """
    start: Tensor | None = None
    for micro_batch in micro_batches:
        loss_sum, terms = loss(micro_batch)
        del micro_batch
        if loss_sum.requires_grad:  # A micro-batch without a valid term may have no graph at all.
            if start is None:
                start = _starting_gradient(loss_sum, 1 / denominator, scale)
            # Starting with 1 / denominator saves a division, and the division's backward pass.
            loss_sum.backward(gradient=start)
            if after_backward is not None:
                after_backward()
        losses.add(loss_sum, terms)
        del loss_sum, terms  # Otherwise the old graph lives through the next forward pass.


def _starting_gradient(
    loss_sum: Tensor, value: float, scale: Callable[[Tensor], Tensor] | None
) -> Tensor:
    """Return the gradient that a backward pass starts with.

    It is scaled before it is rounded to 16 bits, because unscaled it might be rounded to 0.
    """
    if scale is None:
        return torch.full_like(loss_sum.detach(), value)
    dtype = torch.promote_types(loss_sum.dtype, torch.float32)
    return scale(torch.full_like(loss_sum.detach(), value, dtype=dtype)).to(loss_sum.dtype)


def rescale(gradients: Sequence[Tensor], factor: Tensor | float) -> None:
    """Multiply every gradient by ``factor`` in place, once, after the last backward pass."""
    dense = [gradient for gradient in gradients if gradient.layout is torch.strided]
    if dense:
        torch._foreach_mul_(dense, factor)
    for gradient in gradients:
        if gradient.layout is not torch.strided:
            gradient.mul_(factor)
