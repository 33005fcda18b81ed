"""Steps as programs to be traced: training's own, a forward pass, and one of the user's."""

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

Change = Literal["as it is", "fused", "SGD", "checkpointed"]

_Copied = TypeVar("_Copied")

_MOMENTUM: Final = 0.9
_TIMES: Final = 3  # State is made, then held to the next step, and that is a step like all others.


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingStep:
    """Training's own window of two micro-batches, as a search rehearses it.

    The optimizer's state is there before, as it is from the second step on.

    Attributes:
        model: On the fake device.
        options: What a step is.
        optimizer: Over the model's parameters.
        sample: Real examples, on the host; they are repeated to any size.
        change: Of the optimizer, or of the model.
    """

    model: nn.Module
    options: StepOptions
    optimizer: Optimizer
    sample: BatchTree
    change: Change = "as it is"

    def __call__(self, batch: int, recorder: Recorder) -> None:
        """Run the window once."""
        optimizer = _changed(self.optimizer, self.change)
        if self.change == "checkpointed":
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
    """Another optimizer's part of a ``TrainingStep``: its state is made, and it steps once.

    Attributes:
        optimizer: Over parameters on the fake device, all of which have gradients.
        change: What becomes of it.
    """

    optimizer: Optimizer
    change: Change

    def __call__(self, batch: int, recorder: Recorder) -> None:  # noqa: ARG002  # It needs none.
        """Take the steps."""
        optimizer = _changed(self.optimizer, self.change)
        _make_state(optimizer)
        recorder.label(STATE, _state(optimizer))
        _make_state(optimizer)


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardPass:
    """The forward pass of an evaluation, as a search for inference tries it.

    Attributes:
        model: On the fake device.
        options: What a step is.
        optimizer: Only what it holds by now takes memory.
        sample: Real examples, on the host; they are repeated to any size.
    """

    model: nn.Module
    options: StepOptions
    optimizer: Optimizer
    sample: BatchTree

    def __call__(self, batch: int, recorder: Recorder) -> None:
        """Run it once."""
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
    """A step of the user's own, taken a few times: what it holds on to is there the next time.

    Attributes:
        step: Takes a step at so many examples.
        modules: What it holds, on the fake device.
        optimizers: Those that it holds.
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
    """A GPU that is not here: the next micro-batch is there as early as on CUDA.

    Copies do not have a stream of their own. A step uses nothing else of its device, unless memory
    runs out, and here it never does.
    """

    def __init__(self, torch_device: torch.device) -> None:
        self._device = torch_device
        self.copies_ahead = torch_device.type == "cuda"  # Else this torch cannot play a GPU.
        self.reads_at_once = not self.copies_ahead

    def copied(self, tensor: Tensor) -> Tensor:
        """Return a copy on the device."""
        copy = torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self._device
        )
        return copy.contiguous() if 0 in tensor.stride() else copy

    def start_copy(
        self, copy: Callable[[Callable[[Tensor], Tensor]], _Copied]
    ) -> tuple[_Copied, Callable[[], None]]:
        """Copy at once."""
        return MemoryDevice.start_copy(self, copy)


class TracedFeed(Prefetcher):
    """Micro-batches on a device that is not there."""

    def move(self, batch: BatchTree, *, only_reads_targets: bool = False) -> BatchTree:  # noqa: ARG002
        """Return a copy on the device."""
        return unwrapped(map_tensors(self._device.copied, batch))


def _train_step(
    options: StepOptions, model: nn.Module, optimizer: Optimizer, recorder: Recorder
) -> TrainStep:
    device = TracedDevice(recorder.device)
    step = options.train_step(model, optimizer, device)
    return replace(step, gradient_pass=replace(step.gradient_pass, prefetcher=TracedFeed(device)))


def _label(recorder: Recorder, modules: Iterable[nn.Module | None]) -> None:
    for module in modules:
        if module is not None:
            recorder.label("parameters", module.parameters())
            recorder.label("buffers", module.buffers())


def _changed(optimizer: Optimizer, change: Change) -> Optimizer:
    if change in ("fused", "SGD"):
        optimizer.state.clear()  # It is made again; fused, with its step counts on the device.
    if change == "SGD":
        groups = [{"params": group["params"]} for group in optimizer.param_groups]
        made = torch.optim.SGD(groups, lr=1e-3, momentum=_MOMENTUM)
        optimizer.state = made.state  # It is to outlive the window, as the given one's does.
        return made
    if change == "fused":
        for group in optimizer.param_groups:
            group["fused"], group["foreach"] = True, False
    return optimizer


def _make_state(optimizer: Optimizer) -> None:
    """Take a step on gradients of zero: optimizers make their state in their first step."""
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
