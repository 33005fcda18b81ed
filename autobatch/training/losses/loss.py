"""A loss as the law needs it: a sum for each micro-batch, and what the sums are divided by."""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from autobatch.data.tree import BatchTree


class Loss(Protocol):
    """A loss as the law needs it: a sum, and what it is divided by."""

    @property
    def checked(self) -> bool:
        """Whether the loss was not recognised, so that its word has to be tested."""

    @property
    def divides(self) -> bool:
        """Whether there is a denominator: False for ``reduction="sum"``."""

    def denominator(self, targets: BatchTree, examples: int) -> float:
        """Return what the summed loss of a logical batch is divided by; 0 if no term is valid.

        Args:
            targets: Those of the whole logical batch.
            examples: Examples in the logical batch.
        """

    def terms(self, targets: BatchTree, examples: int) -> Tensor | float:
        """Return the same for a micro-batch, where its targets are: nothing waits for a device."""

    def summed(
        self, outputs: BatchTree, targets: BatchTree, examples: int
    ) -> tuple[Tensor, Tensor | float | None]:
        """Return the summed loss of one micro-batch, and its terms where only the loss knows them.

        Terms come from a ``(sum, terms)`` callable alone: its sums are divided by the example
        count, and every ``.grad`` is rescaled by examples / terms at the end.
        """

    @property
    def is_mean(self) -> bool:
        """True if the loss has returned a mean whose terms nothing counts."""
        return False

    @property
    def module(self) -> nn.Module | None:
        """The module that the loss is, or is a method or partial of."""
        return None

    @property
    def ignored_class(self) -> int:
        """The class index that the loss leaves out of its mean."""
        return -100

    def notes(self) -> Iterator[str]:
        """Yield a sentence for each thing about the loss that a user should know."""
        yield from ()


def widened(tensor: Tensor) -> Tensor:
    """Return it in float32 where it was float16: a sum there overflows above 65504."""
    return tensor.float() if tensor.dtype is torch.float16 else tensor


Terms = Tensor | float | None
