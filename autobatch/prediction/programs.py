"""The steps that can be traced: training's step, a forward pass, and a step that the user wrote."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Final, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from autobatch.batches.nest import Nest, map_tensors, unwrapped
from autobatch.devices.base import MemoryDevice
from autobatch.prediction.activation_checkpointing import checkpoint_activations
from autobatch.prediction.trace import STATE, Recorder
from autobatch.state import training_mode
from autobatch.training.evaluation import inference
from autobatch.training.feed import Feed
from autobatch.training.options import StepOptions
from autobatch.training.rehearsal import Rehearsal
from autobatch.training.window import Recipe

StepChange = Literal["as it is", "fused", "SGD", "activation checkpointing"]

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
    sample: Nest
    change: StepChange = "as it is"

    def __call__(self, batch: int, recorder: Recorder) -> None:
        """Run the window once."""
        optimizer = _changed(self.optimizer, self.change)
        if self.change == "activation checkpointing":
            checkpoint_activations(self.model)
        recipe = _recipe(self.options, self.model, optimizer, recorder)
        _label(recorder, [self.model, self.options.loss_module])
        _make_state(optimizer)
        recorder.label(STATE, _state(optimizer))
        recorder.begin_window()
        with training_mode(self.model):
            Rehearsal(recipe, self.sample).prepare([batch, batch], lambda: None)()


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
    sample: Nest

    def __call__(self, batch: int, recorder: Recorder) -> None:
        """Run the forward pass once."""
        recipe = _recipe(self.options, self.model, self.optimizer, recorder)
        _label(recorder, [self.model, self.options.loss_module])
        recorder.label(STATE, _state(self.optimizer))
        self.model.eval()
        recorder.begin_window()
        forward = self.options.batch_loss or self.options.forward
        inference(recipe, forward, self.sample).prepare([batch], lambda: None)()


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


class FakePrefetcher(Feed):
    """A feed of micro-batches to a fake device, which copies the next one as early as on CUDA does.

    Its copies have no CUDA stream.
    """

    def move(self, nest: Nest, *, targets_are_read: bool = False) -> Nest:  # noqa: ARG002
        """Return a copy of the batch on the device."""
        return unwrapped(map_tensors(self._copied, nest))

    def _sent(self, part: Nest) -> tuple[Nest, Any]:
        return map_tensors(self._copied, part), None

    def _copied(self, tensor: Tensor) -> Tensor:
        copy = torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self._device
        )
        return copy.contiguous() if 0 in tensor.stride() else copy

    def _arrived(self, nest: Nest, copied: object) -> Nest:  # noqa: ARG002  # The base class has this argument.
        return unwrapped(nest)


def _recipe(
    options: StepOptions, model: nn.Module, optimizer: Optimizer, recorder: Recorder
) -> Recipe:
    # A step reads other attributes of a device only if memory runs out, and here it never does.
    device = cast("MemoryDevice", SimpleNamespace(torch_device=recorder.device))
    return replace(options.recipe(model, optimizer, device), feed=FakePrefetcher(recorder.device))


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
