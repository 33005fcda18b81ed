"""Sums in a wider type than what they are made of."""

from collections.abc import Sequence

import torch
from torch import Tensor

from autobatch.devices.factory import widest_dtype


class WideSums:
    """Adds up 16-bit gradients in another dtype, and rounds the sum once.

    A ``.grad`` of bfloat16 holds 8 bits: what a 300th micro-batch adds is rounded away. Costs one
    more copy of the gradients, in the wider type, for the length of a window.

    Args:
        parameters: Whose ``.grad`` is meant; those of other than 16 bits are left alone.
        dtype: Of the sums.
    """

    def __init__(self, parameters: Sequence[Tensor], dtype: torch.dtype) -> None:
        self._narrow = [p for p in parameters if p.dtype.itemsize == 2]
        self._dtype = dtype
        self._sums: dict[Tensor, Tensor] = {}

    def absorb(self) -> None:
        """Move every gradient into its sum."""
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
        """Leave the sums in ``.grad``, in the parameters' own dtype."""
        for parameter, total in self._sums.items():
            parameter.grad = total.to(parameter.dtype)
        self._sums.clear()


def in_widest(tensor: Tensor) -> Tensor:
    """Return a tensor's values in the widest floating type of its device."""
    return tensor.to(widest_dtype(tensor.device))
