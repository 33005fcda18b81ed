"""A buffer that sums 16-bit gradients in a wider dtype."""

from collections.abc import Sequence

import torch
from torch import Tensor


class GradientBuffer:
    """Sums 16-bit gradients in another dtype, and rounds the sum once.

    A ``.grad`` of bfloat16 holds 8 significant bits, so what the 300th micro-batch adds is rounded
    away. The sums need memory for one more copy of the gradients, in the wider dtype.

    Args:
        parameters: The parameters whose gradients are summed; all that are not 16-bit are skipped.
        dtype: The dtype of the sums.
    """

    def __init__(self, parameters: Sequence[Tensor], dtype: torch.dtype) -> None:
        self._parameters = [p for p in parameters if p.dtype.itemsize == 2]
        self._dtype = dtype
        self._sums: dict[Tensor, Tensor] = {}

    def add_gradients(self) -> None:
        """Add every ``.grad`` to its sum, and set ``.grad`` to None."""
        for parameter in self._parameters:
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

    def write_gradients(self) -> None:
        """Write the sums to ``.grad``, rounded to the parameters' own dtype."""
        for parameter, total in self._sums.items():
            parameter.grad = total.to(parameter.dtype)
        self._sums.clear()
