"""The precision of forward passes: the model's own dtype, or autocast to 16 bits."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch.amp import GradScaler

PrecisionName = Literal["fp32", "bf16", "fp16"]

_DTYPES: Final = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """Autocast on one device, or no autocast.

    Attributes:
        name: ``"fp32"`` means no autocast: forward passes run in the model's own dtype, which may
            be another, such as float64.
        device_type: As in ``torch.device``.
    """

    name: PrecisionName
    device_type: str

    def forward(self) -> AbstractContextManager[object]:
        """Return the context for a forward pass and its loss; never for a backward pass."""
        dtype = _DTYPES[self.name]
        return nullcontext() if dtype is None else torch.autocast(self.device_type, dtype)

    def window(self) -> AbstractContextManager[object]:
        """Return the context for all micro-batches between two optimizer steps.

        Autocast caches its casts of the weights until the outermost context ends. Inside this
        context each weight is therefore cast once a window, not once a micro-batch. The context
        must end before the optimizer changes the weights.
        """
        if _DTYPES[self.name] is None:
            return nullcontext()
        return torch.autocast(self.device_type, enabled=False)


def check_precision(precision: object) -> PrecisionName:
    """Return the precision if it is one of the three.

    Raises:
        ValueError: With the value that was passed.
    """
    for name in ("fp32", "bf16", "fp16"):
        if precision == name:
            return name
    raise ValueError(f'precision must be "fp32", "bf16" or "fp16", got {precision!r}')


def scaler_for(precision: PrecisionName, scaler: object, device_type: str) -> GradScaler | None:
    """Return the user's GradScaler, a new one for ``"fp16"``, or None.

    Raises:
        TypeError: If ``scaler`` is no GradScaler.
    """
    if scaler is None:
        return GradScaler(device_type) if precision == "fp16" else None
    if not isinstance(scaler, GradScaler):
        raise TypeError(f"scaler must be a torch.amp.GradScaler or None, got {scaler!r}")
    return scaler if scaler.is_enabled() else None
