"""A model whose memory is a number: it runs out above ``limit`` examples."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

Where = Literal["forward", "backward"]

RAN: list[int] = []  # Sizes that got through. A global: no search puts it back.


class BlackBox(nn.Module):
    """Convolution, BatchNorm, dropout, then out of memory in the middle of the pass.

    Args:
        limit: The most examples that fit.
        where: Which pass runs out.
    """

    def __init__(self, limit: int, where: Where = "forward") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.5))
        self.head = nn.Linear(2, 3)
        self.limit = limit
        self.where = where

    def forward(self, images: Tensor) -> Tensor:
        features = self.body(images).mean((2, 3))
        if self.where == "forward":
            hold(len(images), self.limit)
        else:
            features = _Tripwire.apply(features, self.limit)  # type: ignore[no-untyped-call]
        scores: Tensor = self.head(features)
        return scores


def hold(examples: int, limit: int) -> None:
    """Run out of memory as CUDA does, or note that this many examples ran."""
    if examples > limit:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
    RAN.append(examples)


class _Tripwire(torch.autograd.Function):
    """The identity, which runs out of memory on the way back."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, limit: int) -> Tensor:
        ctx.limit = limit
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        hold(len(gradients[0]), ctx.limit)
        return gradients[0], None
