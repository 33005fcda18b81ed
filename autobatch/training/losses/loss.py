"""A loss for gradient accumulation: a sum for each micro-batch, and one denominator."""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from autobatch.data.tree import BatchTree


class Loss(Protocol):
    """A loss that gives a sum for each micro-batch, and the denominator of the logical batch."""

    @property
    def checked(self) -> bool:
        """True if the loss is user code whose additivity must be verified."""

    @property
    def divides(self) -> bool:
        """True if the sum is divided by something; False for ``reduction="sum"``."""

    def denominator(self, targets: BatchTree, examples: int) -> float:
        """Return what the summed loss of a logical batch is divided by; 0 if no term is valid.

        Args:
            targets: The targets of the whole logical batch.
            examples: Examples in the logical batch.
        """

    def terms(self, targets: BatchTree, examples: int) -> Tensor | float:
        """Return the same for a micro-batch, as a tensor where its targets are.

        Nothing waits for the device.

        Args:
            targets: The targets of the micro-batch.
            examples: Examples in the micro-batch.
        """

    def summed(
        self, outputs: BatchTree, targets: BatchTree, examples: int
    ) -> tuple[Tensor, Tensor | float | None]:
        """Return the summed loss of one micro-batch, and its terms where only the loss knows them.

        Only a callable ``(sum, terms)`` gives terms. Its sums are divided by the number of
        examples, and every ``.grad`` is rescaled by examples / terms after the last micro-batch.

        Args:
            outputs: The model's outputs for the micro-batch.
            targets: The targets of the micro-batch.
            examples: Examples in the micro-batch.
        """

    @property
    def is_mean(self) -> bool:
        """True if the loss has returned a mean whose terms nothing counts."""
        return False

    @property
    def module(self) -> nn.Module | None:
        """The module that the loss is, or of which it is a method or partial."""
        return None

    @property
    def ignored_class(self) -> int:
        """The class index that the loss leaves out of its mean."""
        return -100

    def notes(self) -> Iterator[str]:
        """Yield a sentence for each thing about the loss that a user should know."""
        yield from ()


def widened(tensor: Tensor) -> Tensor:
    """Return a float16 tensor in float32, where its sum cannot overflow; others as they are."""
    return tensor.float() if tensor.dtype is torch.float16 else tensor


Terms = Tensor | float | None  # None where the denominator was counted from the targets.
