"""The law: one logical batch's gradient from any pieces of it.

    loss(logical batch) = sum of loss_sum(b) / sum of terms(b), over its micro-batches b

The denominator is the logical batch's. Averaging the micro-batches' own means instead is wrong as
soon as two of them differ in terms.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from autobatch.training.engine.loss_record import LossRecord
from autobatch.training.losses.loss import Terms

MicroBatch = TypeVar("MicroBatch")


def accumulate(
    micro_batches: Iterable[MicroBatch],
    share: Callable[[MicroBatch], tuple[Tensor, Terms]],
    *,
    denominator: float,
    ledger: LossRecord,
    scaled: Callable[[Tensor], Tensor] | None = None,
    after_backward: Callable[[], None] | None = None,
) -> None:
    """Add the gradient of ``sum(loss_sum) / denominator`` to every ``.grad``.

    Args:
        micro_batches: At least one. Each is let go before the next is asked for.
        share: Returns a micro-batch's summed loss, and its terms where only the loss knows them.
        denominator: The logical batch's, known before the first backward pass.
        ledger: Is told of each micro-batch's loss and terms.
        scaled: Multiplies what a backward pass begins with, as a GradScaler does.
        after_backward: Called after each backward pass.
    """
    seed: Tensor | None = None
    for micro_batch in micro_batches:
        loss_sum, terms = share(micro_batch)
        del micro_batch
        if loss_sum.requires_grad:  # A micro-batch without a valid term may have no graph at all.
            if seed is None:
                seed = _seed(loss_sum, 1 / denominator, scaled)
            # The gradient's seed takes the place of a division and of its backward.
            loss_sum.backward(gradient=seed)
            if after_backward is not None:
                after_backward()
        ledger.add(loss_sum, terms)
        del loss_sum, terms  # Or the finished graph lives through the next forward.


def _seed(loss_sum: Tensor, value: float, scaled: Callable[[Tensor], Tensor] | None) -> Tensor:
    """What a backward pass begins with: scaled first, for in 16 bits it might round to 0."""
    if scaled is None:
        return torch.full_like(loss_sum.detach(), value)
    wide = torch.promote_types(loss_sum.dtype, torch.float32)
    return scaled(torch.full_like(loss_sum.detach(), value, dtype=wide)).to(loss_sum.dtype)


def rescale(gradients: Sequence[Tensor], factor: Tensor | float) -> None:
    """Multiply every gradient by ``factor``, in place: once, after the last backward pass."""
    dense = [gradient for gradient in gradients if gradient.layout is torch.strided]
    if dense:
        torch._foreach_mul_(dense, factor)
    for gradient in gradients:
        if gradient.layout is not torch.strided:
            gradient.mul_(factor)
