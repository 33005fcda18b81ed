"""What a training step is made of: a gradient and the optimizer's step. A trial takes the same."""

from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer

from autobatch.devices.base import MemoryDevice
from autobatch.training.engine.gradient_pass import GradientPass
from autobatch.training.engine.optimizer_step import OptimizerStep
from autobatch.training.losses.objective import Objective


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainStep:
    """The two halves of a training step.

    Attributes:
        gradient_pass: Computes the gradient of a logical batch.
        optimizer_step: Makes a step of the gradient.
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
        """Where the model is."""
        return self.gradient_pass.device

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer over some or all of the model's parameters."""
        return self.optimizer_step.optimizer
