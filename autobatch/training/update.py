"""From a finished gradient to the optimizer's step, taken whole or not at all."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from autobatch.devices.base import MemoryDevice
from autobatch.devices.failures import verdict_of
from autobatch.errors import StepInterruptedError
from autobatch.results import Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """How the gradient of a logical batch becomes a step: unscale, clip, step, update the scale.

    Attributes:
        optimizer: Over some or all of the model's parameters.
        device: Where they are.
        scaler: Of fp16; None where nothing is scaled.
        clip_grad_norm: The largest 2-norm of the gradient of the optimizer's parameters.
        clip_grad_value: The largest element.
        needs_norm: Whether the norm has to be known though nothing is clipped by it.
        snapshot: Whether a step that fails half done is undone from a copy.
    """

    optimizer: Optimizer
    device: MemoryDevice
    scaler: GradScaler | None = None
    clip_grad_norm: float | None = None
    clip_grad_value: float | None = None
    needs_norm: bool = False
    snapshot: bool = False

    def parameters(self) -> list[Tensor]:
        """Return the optimizer's parameters."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def scaled(self) -> Callable[[Tensor], Tensor] | None:
        """Return what multiplies the beginning of a backward pass."""
        return None if self.scaler is None else self.scaler.scale

    def finish_gradient(self) -> Tensor | None:
        """Unscale the gradient, once, then clip it, once; return its norm in between, if needed.

        Nothing here waits for the device.
        """
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = None
        if self.clip_grad_norm is not None:
            norm = nn.utils.clip_grad_norm_(self.parameters(), self.clip_grad_norm)
        elif self.needs_norm or self.scaler is not None:
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
            norm = nn.utils.get_total_norm(gradients)
        if self.clip_grad_value is not None:
            nn.utils.clip_grad_value_(self.parameters(), self.clip_grad_value)
        return norm

    def take(self) -> None:
        """Take one optimizer step; if memory runs out before anything moved, try once more.

        Raises:
            StepInterruptedError: If memory ran out after a parameter or its state had moved, or
                twice.
        """
        put_back = _snapshot(self.optimizer) if self.snapshot else None
        if not self._stepped(put_back):
            self.device.release_cached()  # The failed attempt's temporaries are gone only now.
            if not self._stepped(put_back):
                raise StepInterruptedError(
                    "memory ran out twice in the optimizer's step; all parameters and their state "
                    "are as they were before it. Its temporaries do not depend on the micro-batch: "
                    "choose fused=True or foreach=False, or raise the limit"
                )
        if self.scaler is not None:
            self.scaler.update()

    def rehearse(self) -> None:
        """Take a step whatever a scaler thinks of it: a trial must prove that it runs."""
        self.optimizer.step()

    def leave_out(self) -> None:
        """Take no step, and say so to the scaler, which lowers its scale."""
        if self.scaler is not None:
            self.scaler.update()

    def _stepped(self, put_back: Callable[[], None] | None) -> bool:
        """Whether the step was taken. False: memory ran out, and everything is as it was."""
        before = _versions(self.optimizer)
        entries = {key: set(entry) for key, entry in self.optimizer.state.items()}
        try:
            # A scaler looks once more whether all is finite; the device has nothing left to do.
            self.optimizer.step() if self.scaler is None else self.scaler.step(self.optimizer)
        except Exception as error:
            if verdict_of(error) is not Verdict.OUT_OF_MEMORY:
                raise
        else:
            return True
        _forget_new_entries(self.optimizer, entries)
        if _versions(self.optimizer) == before:
            return False
        if put_back is None:
            raise StepInterruptedError(
                "memory ran out with the optimizer's step half done: some parameters, or their "
                "state in the optimizer, have moved and others have not; go back to the last "
                "checkpoint. snapshot_steps=True keeps a copy of both and undoes such a step"
            )
        put_back()
        return False


def check_clip(name: str, value: object) -> float | None:
    """Return the bound, or refuse it by ``name``.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is not above 0. Infinity clips nothing, and reports the norm.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number above 0 or None, got {value!r}")
    if math.isnan(value) or value <= 0:
        raise ValueError(f"{name} must be above 0, got {value}")
    return float(value)


@torch.no_grad()
def _snapshot(optimizer: Optimizer) -> Callable[[], None]:
    """Copy every parameter and its state to the host; return what puts them back."""
    copies = [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in _moving(optimizer)]
    plain = [
        (entry, {name: value for name, value in entry.items() if not isinstance(value, Tensor)})
        for entry in optimizer.state.values()
    ]

    @torch.no_grad()
    def put_back() -> None:
        for tensor, value in copies:
            tensor.copy_(value)
        for entry, values in plain:
            entry.update(values)

    return put_back


def _versions(optimizer: Optimizer) -> list[int]:
    """How often each parameter, and each tensor of its state, was written to."""
    return [tensor._version for tensor in _moving(optimizer)]


def _moving(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield parameter
            # .get: looking a missing one up would create it.
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor):
                    yield value


def _forget_new_entries(optimizer: Optimizer, entries: Mapping[Tensor, set[str]]) -> None:
    """Delete the state that the failed step had begun to make."""
    for key in list(optimizer.state):
        if key not in entries:
            del optimizer.state[key]
            continue
        for name in set(optimizer.state[key]) - entries[key]:
            del optimizer.state[key][name]
