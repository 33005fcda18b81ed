"""Gradients summed in a wider type than that of the parameters."""

from collections.abc import Sequence

import torch
from torch import Tensor


class GradientBuffer:
    """Adds up 16-bit gradients in another dtype, and rounds the sum once.

    A ``.grad`` of bfloat16 holds 8 bits: the part of a 300th micro-batch is rounded away. The sums
    take one more copy of the gradients, in the wider type, for the length of a window.

    Args:
        parameters: The parameters to sum for; those that are not of 16 bits are skipped.
        dtype: The type of the sums.
    """

    def __init__(self, parameters: Sequence[Tensor], dtype: torch.dtype) -> None:
        self._narrow = [p for p in parameters if p.dtype.itemsize == 2]
        self._dtype = dtype
        self._sums: dict[Tensor, Tensor] = {}

    def absorb(self) -> None:
        """Add every ``.grad`` to its sum, and empty it."""
        for parameter in self._narrow:
            gradient = parameter.grad
            if gradient is None:
                continue
            parameter.grad = None
            if parameter in self._sums:
                self._sums[parameter].add_(gradient)
            else:
                self._sums[parameter] = gradient.to(self._dtype)

    @property
    def sums(self) -> list[Tensor]:
        """The sums so far."""
        return list(self._sums.values())

    def give_back(self) -> None:
        """Store the sums in ``.grad``, in the parameters' own dtype."""
        for parameter, total in self._sums.items():
            parameter.grad = total.to(parameter.dtype)
        self._sums.clear()
