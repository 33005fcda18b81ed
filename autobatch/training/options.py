"""How a step is to be taken: the user's options, checked before anything is touched."""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from autobatch.devices.base import MemoryDevice
from autobatch.devices.snapshots import check_directory, write_snapshot
from autobatch.randomness import generators_in
from autobatch.training.batch_norm import BatchNormMode, check_batch_norm
from autobatch.training.custom import BatchLoss, Custom
from autobatch.training.feed import Feed
from autobatch.training.forward import Forward
from autobatch.training.inferred import Inferred
from autobatch.training.losses import resolve_loss
from autobatch.training.members import Members
from autobatch.training.objective import Compared, Objective
from autobatch.training.precision import (
    Precision,
    PrecisionName,
    check_precision,
    scaler_for,
)
from autobatch.training.update import Update
from autobatch.training.whole_batch import Whole, WholeBatch
from autobatch.training.window import Recipe
from autobatch.validation import check_positive

NonFinite = Literal["raise", "skip", "ignore"]
LossLike = Callable[..., object]

_NON_FINITE: Final = ("raise", "skip", "ignore")
_WIDE: Final = (None, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOptions:
    """The arguments that say what a step is; those of ``Accumulator``, by the same names.

    Raises:
        TypeError, ValueError: With the value that came and the way out.
    """

    loss: LossLike | None = None
    forward: Forward | None = None
    batch_loss: BatchLoss | None = None
    scaler: GradScaler | None = None
    precision: PrecisionName = "fp32"
    clip_grad_norm: float | None = None
    clip_grad_value: float | None = None
    nonfinite: NonFinite = "raise"
    batch_norm: BatchNormMode = "micro"
    gradient_dtype: torch.dtype | None = None
    snapshot_steps: bool = False
    replay: bool = True
    snapshot_on_oom: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        check_precision(self.precision)
        check_batch_norm(self.batch_norm)
        if self.nonfinite not in _NON_FINITE:
            raise ValueError(f"nonfinite must be one of {_NON_FINITE}, got {self.nonfinite!r}")
        if self.gradient_dtype not in _WIDE:
            raise ValueError(
                f"gradient_dtype must be torch.float32 or None, got {self.gradient_dtype!r}"
            )
        norm = check_positive("clip_grad_norm", self.clip_grad_norm)
        value = check_positive("clip_grad_value", self.clip_grad_value)
        if norm is not None and value is not None:
            raise ValueError(
                f"clip_grad_norm={norm} and clip_grad_value={value} depend on which comes first; "
                "pass one of the two"
            )
        if not isinstance(self.replay, bool):
            raise TypeError(f"replay must be True or False, got {self.replay!r}")
        if self.snapshot_on_oom is not None:
            check_directory("snapshot_on_oom", self.snapshot_on_oom)
        for name in ("forward", "batch_loss"):
            given = getattr(self, name)
            if given is not None and not callable(given):
                raise TypeError(f"{name} must be callable, got {given!r}")

    def objective(self) -> Objective:
        """Return what is made smaller.

        Raises:
            TypeError: If the loss is no loss, or there are two of them.
        """
        if self.batch_loss is not None:
            if self.loss is not None or self.forward is not None:
                raise TypeError("batch_loss takes the place of loss and forward; pass it alone")
            return Custom(batch_loss=self.batch_loss)
        if isinstance(self.loss, WholeBatch):
            return Whole(loss=self.loss, forward=self.forward)
        loss = resolve_loss(self.loss)
        compared = Compared(loss=loss, forward=self.forward)
        if self.loss is None and self.forward is None:
            return Inferred(otherwise=compared)
        return compared

    @property
    def ran_out(self) -> Callable[[int], None]:
        """What is told the step in which memory runs out, while it still holds what it held."""
        if self.snapshot_on_oom is None:
            return _nothing
        return functools.partial(write_snapshot, self.snapshot_on_oom)

    @property
    def loss_module(self) -> nn.Module | None:
        """The loss where it is a module: it moves, and is put back, with the model."""
        loss = self.loss.loss if isinstance(self.loss, WholeBatch) else self.loss
        return loss if isinstance(loss, nn.Module) else None

    def recipe(self, model: nn.Module, optimizer: Optimizer, device: MemoryDevice) -> Recipe:
        """Return what a step is made of."""
        kind = device.torch_device.type
        loss = [] if self.loss_module is None else [self.loss_module]
        return Recipe(
            model=model,
            objective=self.objective(),
            update=Update(
                optimizer=optimizer,
                device=device,
                scaler=scaler_for(self.precision, self.scaler, kind),
                clip_grad_norm=self.clip_grad_norm,
                clip_grad_value=self.clip_grad_value,
                needs_norm=self.nonfinite == "skip",
                snapshot=self.snapshot_steps,
            ),
            precision=Precision(name=self.precision, device_type=kind),
            batch_norm=self.batch_norm,
            gradient_dtype=self.gradient_dtype,
            feed=Feed(device.torch_device),
            generators=list(generators_in(model)),
            members=Members(model, loss, optimizer),
        )


def _nothing(_: int) -> None:
    """Nobody asked."""
