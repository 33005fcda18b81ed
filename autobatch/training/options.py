"""The options of an optimizer step."""

import functools
import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from autobatch.devices.base import HOST, MemoryDevice
from autobatch.devices.memory_snapshot import check_directory, write_snapshot
from autobatch.events import Observer
from autobatch.state.rng import generators_in
from autobatch.training.batchnorm.modes import BatchNormMode, check_batch_norm
from autobatch.training.engine.batch_gradient import BatchGradient
from autobatch.training.engine.gradient_pass import GradientPass
from autobatch.training.engine.lr_schedule import Schedule
from autobatch.training.engine.micro_batch_size import MicroBatchSize
from autobatch.training.engine.nonfinite import NonFinite, NonFinitePolicy, check_nonfinite
from autobatch.training.engine.optimizer_step import OptimizerStep
from autobatch.training.engine.precision import (
    Precision,
    PrecisionName,
    check_precision,
    scaler_for,
)
from autobatch.training.engine.prefetch import Prefetcher
from autobatch.training.engine.step_runner import StepRunner
from autobatch.training.engine.train_step import TrainStep
from autobatch.training.losses.batch_loss import BatchLoss, BatchLossFunction
from autobatch.training.losses.forward import Forward
from autobatch.training.losses.objective import Objective
from autobatch.training.losses.resolve import LossLike, loss_module, resolve_objective
from autobatch.training.model_state.parameter_cache import ParameterCache
from autobatch.validation import check_positive

_GRADIENT_DTYPES: Final = (None, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOptions:
    """How the step of one logical batch is computed; every entry point takes the same options.

    An entry point takes the options one by one, or together as ``options=``::

        options = StepOptions(precision="bf16", clip_grad_norm=1.0)
        data = (torch.randn(32, 4), torch.randint(0, 2, (32,)))
        model = nn.Linear(4, 2)
        found = find_batch_size(model, data, options=options)
        result = find_and_train(model, data, 16, options=options, progress=False)

    Attributes:
        loss: A loss of torch, its functional or a partial of the functional; a callable
            ``(outputs, targets)`` that returns a mean over examples or ``(sum, terms)``;
            ``WholeBatch(loss)`` for a loss that compares examples with one another; or
            ``BatchLoss(function)`` for a function of the model and the batch. None takes the
            model's own ``.loss`` where the model returns one, otherwise cross-entropy for integer
            targets and mean squared error for floating ones.
        forward: ``(model, batch) -> (outputs, targets)``, for a batch that is neither
            ``(inputs, ..., target)`` nor a mapping with a target.
        batch_loss: ``batch_loss=function`` is short for ``loss=BatchLoss(function)``. The
            constructor writes it into ``loss``, and leaves None here.
        scaler: A ``torch.amp.GradScaler``; None makes one for ``precision="fp16"``.
        precision: ``"fp32"`` runs without autocast, in the model's own dtype; ``"bf16"`` and
            ``"fp16"`` run forward passes and losses under autocast.
        clip_grad_norm: The largest 2-norm of the finished gradient of the optimizer's parameters.
            The gradient is unscaled once and clipped once a step.
        clip_grad_value: The largest absolute value of an element of that gradient.
        nonfinite: What happens to a step whose loss is nan or infinite, or whose gradient's norm
            is, where the norm is known. ``"raise"`` raises NonFiniteLossError. ``"skip"`` takes no
            step, and computes the norm to find out. ``"ignore"`` takes the step and never waits for
            the device, unless only the loss knows its terms or a GradScaler has to look. A gradient
            that overflows under a GradScaler is skipped in any case: the scale becomes smaller.
        batch_norm: ``"micro"`` normalises each micro-batch by itself and pools the running
            statistics; ``"frozen"`` normalises by the running statistics and leaves them as they
            are; ``"refuse"`` raises InexactStepError where a batch with BatchNorm has to be cut.
        gradient_dtype: ``torch.float32`` sums the gradients of 16-bit parameters in float32.
        snapshot_steps: Whether a copy of the parameters and the optimizer state lies on the host
            during each optimizer step, so that a step that runs out of memory half done is undone.
        replay: True runs a logical batch again in smaller micro-batches when memory runs out; False
            raises the error, with the step's gradients released and everything else restored.
        snapshot_on_oom: A folder where the state of CUDA's allocator is written when memory runs
            out, for https://pytorch.org/memory_viz. Other devices and a search write nothing.

    Raises:
        TypeError, ValueError: An option is wrong; the message shows its value and the way out.
    """

    loss: LossLike | None = None
    forward: Forward | None = None
    batch_loss: BatchLossFunction | None = None
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
        scaler_for("fp32", self.scaler, HOST.type)  # Refuses other objects than a GradScaler.
        check_nonfinite(self.nonfinite)
        if self.gradient_dtype not in _GRADIENT_DTYPES:
            raise ValueError(
                f"gradient_dtype must be torch.float32 or None, got {self.gradient_dtype!r}"
            )
        norm = check_positive("clip_grad_norm", self.clip_grad_norm)
        value = check_positive("clip_grad_value", self.clip_grad_value)
        if norm is not None and value is not None:
            raise ValueError(
                f"clip_grad_norm={norm} and clip_grad_value={value} were both passed, and "
                "their order would change the result; pass one of the two"
            )
        if not isinstance(self.replay, bool):
            raise TypeError(f"replay must be True or False, got {self.replay!r}")
        if self.snapshot_on_oom is not None:
            check_directory("snapshot_on_oom", self.snapshot_on_oom)
        self._check_loss()

    def _check_loss(self) -> None:
        """Write ``batch_loss`` into ``loss``, and refuse a wrong loss."""
        if self.forward is not None and not callable(self.forward):
            raise TypeError(f"forward must be callable, got {self.forward!r}")
        if self.batch_loss is not None:
            if self.loss is not None or self.forward is not None:
                raise TypeError("batch_loss takes the place of loss and forward; pass it alone")
            if not callable(self.batch_loss):
                raise TypeError(f"batch_loss must be callable, got {self.batch_loss!r}")
            object.__setattr__(self, "loss", BatchLoss(self.batch_loss))
            object.__setattr__(self, "batch_loss", None)
        self.objective()

    def objective(self) -> Objective:
        """Return a new objective: what training minimizes.

        Raises:
            TypeError: ``loss`` is not of a kind that autobatch takes.
        """
        return resolve_objective(self.loss, self.forward)

    @property
    def on_oom(self) -> Callable[[int], None]:
        """Called with the step's number when memory runs out, before memory is released."""
        if self.snapshot_on_oom is None:
            return _nothing
        return functools.partial(write_snapshot, self.snapshot_on_oom)

    @property
    def loss_module(self) -> nn.Module | None:
        """The loss if it is a module, otherwise None."""
        return loss_module(self.loss)

    def train_step(self, model: nn.Module, optimizer: Optimizer, device: MemoryDevice) -> TrainStep:
        """Return the training step of ``model`` and ``optimizer`` on ``device``."""
        scaler = scaler_for(self.precision, self.scaler, device.torch_device.type)
        optimizer_step = OptimizerStep(
            optimizer=optimizer,
            device=device,
            scaler=scaler,
            clip_grad_norm=self.clip_grad_norm,
            clip_grad_value=self.clip_grad_value,
            needs_norm=self.nonfinite == "skip",
            snapshot=self.snapshot_steps,
        )
        gradient_pass = self.gradient_pass(
            model, device, scaler=scaler, more_parameters=optimizer_step.parameters
        )
        return TrainStep(gradient_pass=gradient_pass, optimizer_step=optimizer_step)

    def gradient_pass(
        self,
        model: nn.Module,
        device: MemoryDevice,
        *,
        scaler: GradScaler | None = None,
        more_parameters: Callable[[], Iterable[Tensor]] = tuple,
    ) -> GradientPass:
        """Return what computes gradients of ``model`` on ``device``.

        Args:
            model: On ``device``.
            device: Where the model trains.
            scaler: Multiplies the gradient; None leaves it as it is.
            more_parameters: Returns parameters outside of the model and the loss.
        """
        loss = [] if self.loss_module is None else [self.loss_module]
        return GradientPass(
            model=model,
            objective=self.objective(),
            device=device,
            precision=Precision(name=self.precision, device_type=device.torch_device.type),
            batch_norm=self.batch_norm,
            gradient_dtype=self.gradient_dtype,
            scaler=scaler,
            prefetcher=Prefetcher(device),
            generators=list(generators_in(model)),
            parameter_cache=ParameterCache(model, loss, more_parameters),
        )

    def step_runner(
        self,
        step: TrainStep,
        micro_batch: int | None,
        schedule: Schedule,
        *,
        limited: Callable[[], AbstractContextManager[None]] = nullcontext,
        limit_bytes: int | None = None,
        observer: Observer = lambda _: None,
        multiple_of: int = 1,
    ) -> StepRunner:
        """Return the runner of a training step.

        Args:
            step: From ``train_step``.
            micro_batch: Examples in the largest micro-batch; None takes the whole logical batch
                until memory runs out.
            schedule: The learning-rate schedule.
            limited: Returns the context in which memory may be used.
            limit_bytes: The memory limit of that context in bytes, or None.
            observer: Receives an event each time that a logical batch runs again.
            multiple_of: Micro-batch sizes are multiples of this.
        """
        return StepRunner(
            gradient=BatchGradient(
                gradient_pass=step.gradient_pass,
                micro_batch_size=MicroBatchSize(micro_batch),
                limited=limited,
                limit_bytes=limit_bytes,
                observer=observer,
                multiple_of=multiple_of,
                retry=self.replay,
                on_oom=self.on_oom,
            ),
            optimizer_step=step.optimizer_step,
            nonfinite=NonFinitePolicy(
                mode=self.nonfinite, uses_scaler=step.optimizer_step.scaler is not None
            ),
            schedule=schedule,
        )


def _nothing(_: int) -> None:
    """Do nothing."""
