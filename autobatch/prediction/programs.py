"""Steps as programs to be traced: training's own, a forward pass, and one of the user's."""

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

Change = Literal["as it is", "fused", "SGD", "checkpointed"]

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
    sample: Nest
    change: Change = "as it is"

    def __call__(self, batch: int, recorder: Recorder) -> None:
        """Run the window once."""
        optimizer = _changed(self.optimizer, self.change)
        if self.change == "checkpointed":
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
    sample: Nest

    def __call__(self, batch: int, recorder: Recorder) -> None:
        """Run it once."""
        recipe = _recipe(self.options, self.model, self.optimizer, recorder)
        _label(recorder, [self.model, self.options.loss_module])
        recorder.label(STATE, _state(self.optimizer))
        self.model.eval()
        recorder.begin_window()
        forward = self.options.batch_loss or self.options.forward
        inference(recipe, forward, self.sample).prepare([batch], lambda: None)()


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


class FakeFeed(Feed):
    """Micro-batches on a device that is not there: the next one is there as early as on CUDA.

    Copies do not have a stream of their own.
    """

    def move(self, nest: Nest, *, targets_are_read: bool = False) -> Nest:  # noqa: ARG002
        """Return a copy on the device."""
        return unwrapped(map_tensors(self._copied, nest))

    def _sent(self, part: Nest) -> tuple[Nest, Any]:
        return map_tensors(self._copied, part), None

    def _copied(self, tensor: Tensor) -> Tensor:
        copy = torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self._device
        )
        return copy.contiguous() if 0 in tensor.stride() else copy

    def _arrived(self, nest: Nest, copied: object) -> Nest:  # noqa: ARG002  # The base's.
        return unwrapped(nest)


def _recipe(
    options: StepOptions, model: nn.Module, optimizer: Optimizer, recorder: Recorder
) -> Recipe:
    # A step asks a device only where it is, unless memory runs out, and here it never does.
    device = cast("MemoryDevice", SimpleNamespace(torch_device=recorder.device))
    return replace(options.recipe(model, optimizer, device), feed=FakeFeed(recorder.device))


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
