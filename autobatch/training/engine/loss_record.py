"""The losses of a logical batch, kept on the device and read with one wait for it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from autobatch.devices.base import MemoryDevice
from autobatch.devices.factory import widest_dtype

_LEAST_SLOTS: Final = 32  # A GPU's allocator has no smaller block.


@dataclass(frozen=True, slots=True, kw_only=True)
class StepNumbers:
    """The numbers of a logical batch, on the host.

    Attributes:
        losses: The summed loss of each micro-batch.
        terms: The number of loss terms if only the loss could count them, else None.
        norm: The gradient's 2-norm if something needs it, else None.
    """

    losses: list[float]
    terms: float | None
    norm: float | None

    @property
    def loss_sum(self) -> float:
        """The summed loss of the logical batch."""
        return math.fsum(self.losses) if all(map(math.isfinite, self.losses)) else sum(self.losses)


class LossRecord:
    """Records the loss of each micro-batch, its number of terms and the gradient's norm.

    On the CPU, where reading a number does not wait, losses become numbers at once. On any other
    device they stay in a tensor of the device's widest floating dtype until they are read: a sum in
    16 bits would lose small summands.

    Args:
        micro_batches: The number of micro-batches.
        device: The device of the losses.
    """

    def __init__(self, micro_batches: int, device: MemoryDevice) -> None:
        self._losses: list[float] = []
        self._terms: list[float] = []
        self._norm: Tensor | None = None
        self._on_device: Tensor | None = None  # Losses in row 0, terms in row 1.
        self._has_terms = False
        self._count = 0
        self._numbers: StepNumbers | None = None
        self._start_reading: Callable[[Tensor], Callable[[], list[float]]] | None = None
        self._finish_reading: Callable[[], list[float]] | None = None
        if not device.reads_at_once:
            where = device.torch_device
            slots = max(micro_batches, _LEAST_SLOTS)
            self._on_device = torch.zeros(2, slots, dtype=widest_dtype(where), device=where)
            self._start_reading = device.start_reading

    def add(self, loss: Tensor, terms: Tensor | float | None) -> None:
        """Record the summed loss of a micro-batch, and its terms if the loss counted them."""
        if self._on_device is None:
            self._losses.append(loss.item())
            if terms is not None:
                self._terms.append(float(terms))
        else:
            self._on_device[0, self._count] = loss.detach()
            if terms is not None:
                self._on_device[1, self._count] = terms
        self._has_terms |= terms is not None
        self._count += 1

    def add_norm(self, norm: Tensor) -> None:
        """Record the gradient's norm, a scalar."""
        self._norm = norm

    @property
    def has_terms(self) -> bool:
        """True if the loss returned a number of terms."""
        return self._has_terms

    @property
    def terms(self) -> Tensor | float | None:
        """The number of terms so far, on its device; None if the loss returned none."""
        if not self._has_terms:
            return None
        if self._numbers is not None:
            return self._numbers.terms
        return sum(self._terms) if self._on_device is None else self._on_device[1].sum()

    def read(self) -> StepNumbers:
        """Return the numbers; only the first call waits for the device."""
        if self._numbers is None:
            self._numbers = self._read()
            # A result that is kept for long must hold neither tensors nor the device.
            self._on_device = self._norm = self._finish_reading = self._start_reading = None
        return self._numbers

    def start_reading(self) -> None:
        """Begin to copy the numbers to the host, so that ``read`` does not wait for later work."""
        if self._start_reading is not None:
            self._finish_reading = self._start_reading(self._flat())
            self._start_reading = None  # It holds the device.

    def _read(self) -> StepNumbers:
        if self._on_device is None:
            terms = sum(self._terms) if self._has_terms else None
            norm = None if self._norm is None else self._norm.item()
            return StepNumbers(losses=self._losses, terms=terms, norm=norm)
        slots = self._on_device.shape[1]
        finish = self._finish_reading
        numbers = self._flat().tolist() if finish is None else finish()
        return StepNumbers(
            losses=numbers[: self._count],
            terms=math.fsum(numbers[slots : slots + self._count]) if self._has_terms else None,
            norm=numbers[-1] if self._norm is not None else None,
        )

    def _flat(self) -> Tensor:
        """Return all numbers in one tensor: losses, terms, then the norm."""
        assert self._on_device is not None, "numbers that are read at once are not on the device"
        flat = self._on_device.flatten()
        if self._norm is None:
            return flat
        return torch.cat([flat, self._norm.detach().to(flat.device, flat.dtype)[None]])
