"""One model in one configuration: how it is made, run and limited."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from autobatch.devices.budget import standard_headroom
from autobatch.prediction.gpu_catalogue import Gpu
from benchmarks.harness.models import ModelSpec

Precision = Literal["fp32", "bf16", "fp16"]
Mode = Literal["train", "inference"]

OPTIMIZERS: Final[Mapping[str, Callable[..., Optimizer]]] = {
    "AdamW": functools.partial(AdamW, lr=1e-4),
    "SGD": functools.partial(SGD, lr=1e-4, momentum=0.9),
}
CEILING: Final = 16384  # Nobody trains on larger batches, and their images would fill the host.
_MIB: Final = 2**20
ROOM_BYTES: Final = 512 * _MIB  # For activations, where a CPU imitates no card.
_PER_PARAMETER: Final = (
    6  # Times a parameter's bytes: its gradient, AdamW's state, and the step's own tensors.
)


class Config(NamedTuple):
    """The mode, the precision and the optimizer of a model's run."""

    mode: Mode
    precision: Precision
    optimizer: str | None

    def __str__(self) -> str:
        return ", ".join(word for word in self if word)


# The most informative comes first: a short budget measures every model in it.
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
    """A row of the capacity table.

    Attributes:
        name: The model's name.
        spec: How the model and its data are made.
        config: How the model is run.
        device: Where the model runs.
        card: This machine's GPU, or the imitated card.
        ceiling: The largest size of interest.
        room_bytes: Memory for activations, where a CPU imitates no card.
    """

    name: str
    spec: ModelSpec
    config: Config
    device: torch.device
    card: Gpu | None = None
    ceiling: int = CEILING
    room_bytes: int = ROOM_BYTES

    @property
    def imitates(self) -> bool:
        """True if the CPU's meter imitates the card."""
        return self.card is not None and self.device.type == "cpu"

    def model(self) -> nn.Module:
        """Return the model, on the device."""
        with self.device:
            return self.spec.make()

    @property
    def columns(self) -> dict[str, object]:
        """The columns that identify the row."""
        return {
            "model": self.name,
            "mode": self.config.mode,
            "precision": self.config.precision,
            "optimizer": self.config.optimizer,
            "example": self.spec.example,
        }

    def arguments(self, model: nn.Module) -> dict[str, Any]:
        """Return the arguments of a search and of a trial."""
        optimizer = self.config.optimizer
        return {
            "loss": self.spec.loss,
            "optimizer": None if optimizer is None else OPTIMIZERS[optimizer],
            "device": self.device,
            "precision": self.config.precision,
            "mode": self.config.mode,
            "memory_limit": self._limit_bytes(model),
        }

    def _limit_bytes(self, model: nn.Module) -> int | None:
        if self.device.type != "cpu":
            return None  # The free memory, less the default headroom.
        if self.card is not None:
            return allowed_bytes(self.card)
        parameter_bytes = sum(weight.nbytes for weight in model.parameters())
        return _PER_PARAMETER * parameter_bytes + self.room_bytes


def allowed_bytes(card: Gpu) -> int:
    """Return how many bytes a search on the card lets the allocator hold."""
    headroom_bytes = standard_headroom(card.capacity_bytes)
    return card.capacity_bytes - card.context_bytes[1] - headroom_bytes
