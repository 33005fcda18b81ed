"""One model in one configuration: how it is made, run and limited."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from autobatch.devices.base import standard_headroom
from autobatch.prediction.gpu_catalogue import Gpu
from benchmarks.zoo import Subject

Precision = Literal["fp32", "bf16", "fp16"]
Mode = Literal["train", "inference"]

OPTIMIZERS: Final[Mapping[str, Callable[..., Optimizer]]] = {
    "AdamW": functools.partial(AdamW, lr=1e-4),
    "SGD": functools.partial(SGD, lr=1e-4, momentum=0.9),
}
CEILING: Final = 16384  # Larger batches are no one's; their images would fill the host.
_MIB: Final = 2**20
ROOM_BYTES: Final = 512 * _MIB  # For activations, where a CPU is measured as it is.
_PER_PARAMETER: Final = (
    6  # Times its own bytes: its gradient, AdamW's state, and what a step takes.
)


class Config(NamedTuple):
    """How a model is run."""

    mode: Mode
    precision: Precision
    optimizer: str | None

    def __str__(self) -> str:
        return ", ".join(word for word in self if word)


# The most telling first: a budget that is short sees every model in it before any in another.
ON_A_GPU: Final = (
    Config("train", "bf16", "AdamW"),
    Config("inference", "bf16", None),
    Config("train", "fp32", "AdamW"),
    Config("train", "fp16", "AdamW"),
    Config("train", "bf16", "SGD"),
    Config("inference", "fp32", None),
    Config("inference", "fp16", None),
    Config("train", "fp32", "SGD"),
    Config("train", "fp16", "SGD"),
)
ON_THE_CPU: Final = (
    Config("train", "fp32", "AdamW"),
    Config("inference", "fp32", None),
    Config("train", "fp32", "SGD"),
    Config("train", "bf16", "AdamW"),
    Config("inference", "bf16", None),
    Config("train", "bf16", "SGD"),
    Config("train", "fp16", "AdamW"),
    Config("inference", "fp16", None),
    Config("train", "fp16", "SGD"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row.

    Attributes:
        name: The model's.
        subject: The model.
        config: How it is run.
        device: Where.
        card: The GPU that is here, or that is imitated.
        ceiling: The largest size of interest.
        room_bytes: For activations, where a CPU is measured as it is.
    """

    name: str
    subject: Subject
    config: Config
    device: torch.device
    card: Gpu | None = None
    ceiling: int = CEILING
    room_bytes: int = ROOM_BYTES

    @property
    def imitates(self) -> bool:
        """Whether the CPU's meter stands for the card."""
        return self.card is not None and self.device.type == "cpu"

    def model(self) -> nn.Module:
        """Return it, on the device."""
        with self.device:
            return self.subject.make()

    @property
    def facts(self) -> dict[str, object]:
        """What the row is of."""
        return {
            "model": self.name,
            "mode": self.config.mode,
            "precision": self.config.precision,
            "optimizer": self.config.optimizer,
            "example": self.subject.example,
        }

    def asked(self, model: nn.Module) -> dict[str, Any]:
        """Return what a search and a trial are told."""
        optimizer = self.config.optimizer
        return {
            "loss": self.subject.loss,
            "optimizer": None if optimizer is None else OPTIMIZERS[optimizer],
            "device": self.device,
            "precision": self.config.precision,
            "mode": self.config.mode,
            "memory_limit": self._limit_bytes(model),
        }

    def _limit_bytes(self, model: nn.Module) -> int | None:
        if self.device.type != "cpu":
            return None  # What is free, with the headroom that a user has.
        if self.card is not None:
            return allowed_bytes(self.card)
        parameter_bytes = sum(weight.nbytes for weight in model.parameters())
        return _PER_PARAMETER * parameter_bytes + self.room_bytes


def allowed_bytes(card: Gpu) -> int:
    """Return what a search on the card would let the allocator hold."""
    headroom_bytes = standard_headroom(card.capacity_bytes)
    return card.capacity_bytes - card.context_bytes[1] - headroom_bytes
