"""The two halves of a training step: the gradient of a logical batch and the optimizer step."""

from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer

from autobatch.devices.base import MemoryDevice
from autobatch.training.engine.gradient_pass import GradientPass
from autobatch.training.engine.optimizer_step import OptimizerStep
from autobatch.training.losses.objective import Objective


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainStep:
    """What a training step consists of; a trial runs the same one.

    Attributes:
        gradient_pass: Computes the gradient of a logical batch.
        optimizer_step: Turns the gradient into a step.
    """

    gradient_pass: GradientPass
    optimizer_step: OptimizerStep

    @property
    def model(self) -> nn.Module:
        """The model that is trained."""
        return self.gradient_pass.model

    @property
    def objective(self) -> Objective:
        """What is minimized."""
        return self.gradient_pass.objective

    @property
    def device(self) -> MemoryDevice:
        """The device of the model."""
        return self.gradient_pass.device

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer over some or all of the model's parameters."""
        return self.optimizer_step.optimizer
