"""The steps that can be traced: training's step, a forward pass, and a step that the user wrote."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from autobatch.data.tree import BatchTree, map_tensors, unwrapped
from autobatch.devices.base import MemoryDevice
from autobatch.devices.cuda import CudaDevice
from autobatch.prediction.activation_checkpointing import checkpoint_activations
from autobatch.prediction.trace import STATE, Recorder
from autobatch.state.snapshot import training_mode
from autobatch.training.engine.prefetch import Prefetcher
from autobatch.training.engine.train_step import TrainStep
from autobatch.training.evaluation.inference import inference
from autobatch.training.options import StepOptions
from autobatch.training.trial_step import TrialStep

StepChange = Literal["as it is", "fused", "SGD", "activation checkpointing"]

_Copied = TypeVar("_Copied")

_MOMENTUM: Final = 0.9
# The first step makes state, the second one meets that state, and the third one is typical.
_TIMES: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingStep:
    """Training's step on a window of two micro-batches, which is the step that a search tries.

    The optimizer's state exists before, as it does in training from the second step on.

    Attributes:
        model: The model, on the fake device.
        options: The options of the step.
        optimizer: The optimizer of the model's parameters.
        sample: Real examples on the host, which are repeated to any size.
        change: The change of the optimizer or of the model.
    """

    model: nn.Module
    options: StepOptions
    optimizer: Optimizer
    sample: BatchTree
    change: StepChange = "as it is"

    def __call__(self, batch: int, recorder: Recorder) -> None:
        """Run the window once."""
        optimizer = _changed(self.optimizer, self.change)
        if self.change == "activation checkpointing":
            checkpoint_activations(self.model)
        step = _train_step(self.options, self.model, optimizer, recorder)
        _label(recorder, [self.model, self.options.loss_module])
        _make_state(optimizer)
        recorder.label(STATE, _state(optimizer))
        recorder.begin_window()
        with training_mode(self.model):
            TrialStep(step, self.sample).prepare([batch, batch], lambda: None)()


@dataclass(frozen=True, slots=True, kw_only=True)
class Updates:
    """The optimizer's part of a ``TrainingStep``: the optimizer makes its state, and steps once.

    Attributes:
        optimizer: The optimizer, whose parameters are on the fake device and all have gradients.
        change: The change of the optimizer.
    """

    optimizer: Optimizer
    change: StepChange

    def __call__(self, batch: int, recorder: Recorder) -> None:  # noqa: ARG002  # Protocol.
        """Take the steps."""
        optimizer = _changed(self.optimizer, self.change)
        _make_state(optimizer)
        recorder.label(STATE, _state(optimizer))
        _make_state(optimizer)


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardPass:
    """The forward pass of an evaluation, which is the step that a search for inference tries.

    Attributes:
        model: The model, on the fake device.
        options: The options of the step.
        optimizer: The optimizer; its present state takes memory.
        sample: Real examples on the host, which are repeated to any size.
    """

    model: nn.Module
    options: StepOptions
    optimizer: Optimizer
    sample: BatchTree

    def __call__(self, batch: int, recorder: Recorder) -> None:
        """Run the forward pass once."""
        step = _train_step(self.options, self.model, self.optimizer, recorder)
        _label(recorder, [self.model, self.options.loss_module])
        recorder.label(STATE, _state(self.optimizer))
        self.model.eval()
        recorder.begin_window()
        inference(step.gradient_pass, step.objective.forward, self.sample).prepare(
            [batch], lambda: None
        )()


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnStep:
    """A step that the user wrote, taken three times: tensors that it keeps exist in the next one.

    Attributes:
        step: A function that takes a step at a number of examples.
        modules: The modules that the step refers to, on the fake device.
        optimizers: The optimizers that the step refers to.
    """

    step: Callable[[int], object]
    modules: Sequence[nn.Module]
    optimizers: Sequence[Optimizer]

    def __call__(self, batch: int, recorder: Recorder) -> None:
        """Take the steps."""
        _label(recorder, self.modules)
        for _ in range(_TIMES):
            self.step(batch)
            for optimizer in self.optimizers:
                recorder.label(STATE, _state(optimizer))


class TracedDevice(CudaDevice):
    """A GPU that is not present; the next micro-batch is there as early as on CUDA.

    Copies have no CUDA stream. A step reads other attributes of a device only if memory runs out,
    and here it never does.
    """

    def __init__(self, torch_device: torch.device) -> None:
        self._device = torch_device
        self.copies_ahead = torch_device.type == "cuda"  # Otherwise this torch cannot play a GPU.
        self.reads_at_once = not self.copies_ahead

    def copied(self, tensor: Tensor) -> Tensor:
        """Return a copy of the tensor on the device."""
        copy = torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self._device
        )
        return copy.contiguous() if 0 in tensor.stride() else copy

    def start_copy(
        self, copy: Callable[[Callable[[Tensor], Tensor]], _Copied]
    ) -> tuple[_Copied, Callable[[], None]]:
        """Copy at once."""
        return MemoryDevice.start_copy(self, copy)


class TracedPrefetcher(Prefetcher):
    """A prefetcher of micro-batches to a device that is not present."""

    def move(self, batch: BatchTree, *, only_reads_targets: bool = False) -> BatchTree:  # noqa: ARG002
        """Return a copy of the batch on the device."""
        return unwrapped(map_tensors(self._device.copied, batch))


def _train_step(
    options: StepOptions, model: nn.Module, optimizer: Optimizer, recorder: Recorder
) -> TrainStep:
    device = TracedDevice(recorder.device)
    step = options.train_step(model, optimizer, device)
    return replace(
        step, gradient_pass=replace(step.gradient_pass, prefetcher=TracedPrefetcher(device))
    )


def _label(recorder: Recorder, modules: Iterable[nn.Module | None]) -> None:
    for module in modules:
        if module is not None:
            recorder.label("parameters", module.parameters())
            recorder.label("buffers", module.buffers())


def _changed(optimizer: Optimizer, change: StepChange) -> Optimizer:
    if change in ("fused", "SGD"):
        optimizer.state.clear()  # A fused optimizer has its step counts on the device.
    if change == "SGD":
        groups = [{"params": group["params"]} for group in optimizer.param_groups]
        made = torch.optim.SGD(groups, lr=1e-3, momentum=_MOMENTUM)
        optimizer.state = made.state  # The state must outlive the window.
        return made
    if change == "fused":
        for group in optimizer.param_groups:
            group["fused"], group["foreach"] = True, False
    return optimizer


def _make_state(optimizer: Optimizer) -> None:
    """Take a step on gradients of zero, in which an optimizer makes its state."""
    groups = optimizer.param_groups
    parameters = [p for group in groups for p in group["params"] if p.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter in parameters:
        parameter.grad = None


def _state(optimizer: Optimizer) -> Iterable[Tensor]:
    for entry in optimizer.state.values():
        yield from (value for value in entry.values() if isinstance(value, Tensor))
