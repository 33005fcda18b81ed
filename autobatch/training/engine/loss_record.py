"""The losses of a window's micro-batches, read with one wait for the device."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from autobatch.devices.base import MemoryDevice
from autobatch.devices.factory import widest_dtype

_ROWS: Final = 32  # Room for this many micro-batches at least: one block of a GPU's allocator.


@dataclass(frozen=True, slots=True, kw_only=True)
class StepNumbers:
    """A window's numbers, on the host.

    Attributes:
        losses: The summed loss of each micro-batch.
        terms: The number of loss terms, where only the loss could count them; else None.
        norm: The gradient's 2-norm; None where nothing needs it.
    """

    losses: list[float]
    terms: float | None
    norm: float | None

    @property
    def loss_sum(self) -> float:
        """The sum over the logical batch."""
        return math.fsum(self.losses) if all(map(math.isfinite, self.losses)) else sum(self.losses)


class LossRecord:
    """Keeps one loss for each micro-batch, and the number of terms where only the loss knows it.

    Where reading costs no wait, as on the CPU, losses become numbers at once. On any other device
    losses stay there until they are read, in the device's widest type: a sum of 16 bits loses small
    parts.

    Args:
        micro_batches: How many the window has.
        device: The device of the losses.
    """

    def __init__(self, micro_batches: int, device: MemoryDevice) -> None:
        self._losses: list[float] = []
        self._terms: list[float] = []
        self._norm: Tensor | None = None
        self._held: Tensor | None = None
        self._counted = False  # Whether the loss returns terms.
        self._count = 0
        self._numbers: StepNumbers | None = None
        self._start_reading: Callable[[Tensor], Callable[[], list[float]]] | None = None
        self._sent: Callable[[], list[float]] | None = None
        if not device.reads_at_once:
            place = device.torch_device
            rows = max(micro_batches, _ROWS)
            self._held = torch.zeros(2, rows, dtype=widest_dtype(place), device=place)
            self._start_reading = device.start_reading

    def add(self, loss: Tensor, terms: Tensor | float | None) -> None:
        """Keep one micro-batch's summed loss, and its number of terms if the loss returned one."""
        if self._held is None:
            self._losses.append(loss.item())
            if terms is not None:
                self._terms.append(float(terms))
        else:
            self._held[0, self._count] = loss.detach()
            if terms is not None:
                self._held[1, self._count] = terms
        self._counted |= terms is not None
        self._count += 1

    def note_norm(self, norm: Tensor) -> None:
        """Keep the gradient's norm."""
        self._norm = norm

    @property
    def counted(self) -> bool:
        """Whether the loss returned a number of terms."""
        return self._counted

    @property
    def terms(self) -> Tensor | float | None:
        """The sum of the terms so far, on its device; None if the loss returned none."""
        if not self._counted:
            return None
        if self._numbers is not None:
            return self._numbers.terms
        return sum(self._terms) if self._held is None else self._held[1].sum()

    def read(self) -> StepNumbers:
        """Return the numbers: the first call waits for the device, once."""
        if self._numbers is None:
            self._numbers = self._read()
            # A kept result must keep neither tensors nor the device.
            self._held = self._norm = self._sent = self._start_reading = None
        return self._numbers

    def send(self) -> None:
        """Begin to copy the numbers to the host, so that reading them waits for no later work."""
        if self._start_reading is not None:
            self._sent = self._start_reading(self._together())
            self._start_reading = None  # A kept result must not keep the device.

    def _read(self) -> StepNumbers:
        has_norm = self._norm is not None
        if self._held is None:
            terms = sum(self._terms) if self._counted else None
            norm = None if self._norm is None else self._norm.item()
            return StepNumbers(losses=self._losses, terms=terms, norm=norm)
        rows = self._held.shape[1]
        numbers = self._together().tolist() if self._sent is None else self._sent()
        return StepNumbers(
            losses=numbers[: self._count],
            terms=math.fsum(numbers[rows : rows + self._count]) if self._counted else None,
            norm=numbers[-1] if has_norm else None,
        )

    def _together(self) -> Tensor:
        """All numbers in one row: losses, terms, the norm."""
        assert self._held is not None, "numbers that were read at once are not held"
        flat = self._held.flatten()
        if self._norm is None:
            return flat
        return torch.cat([flat, self._norm.detach().to(flat.device, flat.dtype)[None]])
