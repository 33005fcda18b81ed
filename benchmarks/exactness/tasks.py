"""Small trainings in float64, the same for every engine, and an observer of their steps."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import torch
from reference import Pair, sgd, twin
from torch import Tensor, nn
from torch.optim import Optimizer

IGNORED: Final = -100  # A target that the loss ignores.


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingTask:
    """A training of one epoch, in order.

    Attributes:
        model: The model; each engine trains a copy.
        loss: A cross-entropy, a mean or a sum.
        data: Inputs and targets, on the host.
        micro_batch: The largest micro-batch, in examples.
        accumulation_steps: Micro-batches in a step; the last step may have fewer.
        device: Where the model is trained.
    """

    model: nn.Module
    loss: nn.CrossEntropyLoss
    data: Pair
    micro_batch: int
    accumulation_steps: int
    device: torch.device

    @property
    def logical_batches(self) -> list[Pair]:
        """The logical batch of each step; the last may be smaller."""
        x, y = self.data
        size = self.micro_batch * self.accumulation_steps
        return list(zip(x.split(size), y.split(size), strict=True))


Failure = Callable[["ObservedTraining", int], bool]
"""Returns whether memory runs out in a forward pass of this many examples."""


@dataclass(slots=True)
class ObservedTraining:
    """One engine's training, observed by hooks, which also make memory run out.

    Attributes:
        task: The training.
        in_forward: Decides whether memory runs out in a forward pass.
        in_step: Whether memory runs out once at the beginning of the second optimizer step.
        steps: The parameters after each optimizer step, of every model that was begun.
        begun: The initial parameters of the last model.
        forwards: Forward passes since the last optimizer step.
        ran_out: How often memory ran out.
    """

    task: TrainingTask
    in_forward: Failure | None = None
    in_step: bool = False
    steps: list[Tensor] = field(default_factory=list)
    begun: Tensor | None = None
    forwards: int = 0
    ran_out: int = 0

    def begin(self) -> tuple[nn.Module, Optimizer]:
        """Return a new copy of the model, and its optimizer."""
        model = twin(self.task.model).to(self.task.device)
        optimizer = sgd(model)
        self.begun = _values(model)
        self.forwards = 0
        model.register_forward_pre_hook(lambda _, inputs: self._forward(len(inputs[0])))
        optimizer.register_step_pre_hook(lambda *_: self._step())
        optimizer.register_step_post_hook(functools.partial(_note, self, model))
        return model, optimizer

    @property
    def last_update(self) -> Tensor:
        """The change of the parameters in the last step."""
        before = self.steps[-2] if len(self.steps) > 1 else self.begun
        assert before is not None, "a step was taken, so a model was begun"
        return self.steps[-1] - before

    def _forward(self, examples: int) -> None:
        self.forwards += 1
        if self.in_forward is not None and self.in_forward(self, examples):
            self._run_out()

    def _step(self) -> None:
        if self.in_step and len(self.steps) == 1 and not self.ran_out:
            self._run_out()

    def _run_out(self) -> None:
        self.ran_out += 1
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")


def _note(training: ObservedTraining, model: nn.Module, *_: object) -> None:
    training.steps.append(_values(model))
    training.forwards = 0


def _values(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().cpu().clone()


def relative(one: Tensor, other: Tensor) -> float:
    """Return the norm of the difference of two vectors over the norm of ``other``."""
    return float((one - other).norm() / other.norm())
