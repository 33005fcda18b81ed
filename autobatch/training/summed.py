"""A loss as the law needs it: a sum for each micro-batch, and what the sums are divided by."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from autobatch.batches.nest import Nest

Summed = Callable[[Nest, Nest, int], tuple[Tensor, Tensor | float | None]]


class Loss(Protocol):
    """A loss as the law needs it: a sum, and what it is divided by."""

    @property
    def checked(self) -> bool:
        """Whether the loss was not recognised, so that its word has to be tested."""

    @property
    def divides(self) -> bool:
        """Whether there is a denominator: False for ``reduction="sum"``."""

    def denominator(self, targets: Nest, examples: int) -> float:
        """Return what the summed loss of a logical batch is divided by; 0 if no term is valid.

        Args:
            targets: Those of the whole logical batch.
            examples: Examples in the logical batch.
        """

    def terms(self, targets: Nest, examples: int) -> Tensor | float:
        """Return the same for a micro-batch, where its targets are: nothing waits for a device."""

    def summed(
        self, outputs: Nest, targets: Nest, examples: int
    ) -> tuple[Tensor, Tensor | float | None]:
        """Return the summed loss of one micro-batch, and its terms where only the loss knows them.

        Terms come from a ``(sum, terms)`` callable alone: its sums are divided by the example
        count, and every ``.grad`` is rescaled by examples / terms at the end.
        """

    def for_window(self) -> Summed:
        """Return ``summed`` for one window, in which settings do not change: looked up once."""


def widened(tensor: Tensor) -> Tensor:
    """Return it in float32 where it was float16: a sum there overflows above 65504."""
    return tensor.float() if tensor.dtype is torch.float16 else tensor
