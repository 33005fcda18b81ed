"""The law: one logical batch's gradient from any pieces of it.

    loss(logical batch) = sum of loss_sum(b) / sum of terms(b), over its micro-batches b

The denominator is the logical batch's. Averaging the micro-batches' own means instead is wrong as
soon as two of them differ in terms.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

MicroBatch = TypeVar("MicroBatch")
Terms = Tensor | float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Accumulated:
    """What the micro-batches add up to, apart from the gradient that they leave.

    Attributes:
        loss_sum: The sum over the logical batch, without graph, no dimensions.
        terms: What only the loss could count, or None where the denominator was known before.
    """

    loss_sum: Tensor
    terms: Terms


def accumulate(
    micro_batches: Iterable[MicroBatch],
    share: Callable[[MicroBatch], tuple[Tensor, Terms]],
    *,
    denominator: float,
) -> Accumulated:
    """Add the gradient of ``sum(loss_sum) / denominator`` to every ``.grad``.

    Args:
        micro_batches: At least one. Each is let go before the next is asked for.
        share: Returns a micro-batch's summed loss, and its terms where only the loss knows them.
        denominator: The logical batch's, known before the first backward pass.
    """
    seed: Tensor | None = None
    total: Tensor | None = None
    terms: Terms = None
    for micro_batch in micro_batches:
        loss_sum, own_terms = share(micro_batch)
        del micro_batch
        value = loss_sum.detach()
        if seed is None:
            seed = torch.full_like(value, 1 / denominator)
        if loss_sum.requires_grad:  # A micro-batch without a valid term may have no graph at all.
            # The gradient's seed takes the place of a division and of its backward.
            loss_sum.backward(gradient=seed)
        # One running scalar, so that many micro-batches hold no more than two; in float64, for a
        # sum of 16 bits forgets small parts. No .item(): nothing waits for the device.
        total = value.to(torch.float64, copy=True) if total is None else total.add_(value)
        if own_terms is not None:
            terms = _widened(own_terms) if terms is None else terms + _widened(own_terms)
        del loss_sum, value, own_terms  # Or the finished graph lives through the next forward.
    assert total is not None, "a window has at least one micro-batch"
    return Accumulated(loss_sum=total, terms=terms)


def rescale(gradients: Sequence[Tensor], factor: float) -> None:
    """Multiply every gradient by ``factor``, in place: once, after the last backward pass."""
    dense = [gradient for gradient in gradients if gradient.layout is torch.strided]
    if dense:
        torch._foreach_mul_(dense, factor)
    for gradient in gradients:
        if gradient.layout is not torch.strided:
            gradient.mul_(factor)


def _widened(terms: Tensor | float) -> Tensor | float:
    return terms.detach().double() if isinstance(terms, Tensor) else terms
