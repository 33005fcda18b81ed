"""From a finished gradient to the optimizer's step, taken whole or not at all."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from autobatch.devices.base import HOST, MemoryDevice
from autobatch.devices.factory import backend_of
from autobatch.devices.oom import verdict_of
from autobatch.errors import StepInterruptedError
from autobatch.results.verdict import Verdict
from autobatch.state.snapshot import PLAIN_TYPES


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerStep:
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
        if self.scaler is not None and any(p.grad is not None for p in self.parameters()):
            self.scaler.unscale_(self.optimizer)  # It asserts that it has scaled something.
        norm = None
        if self.needs_norm or self.clip_grad_norm is not None or self.scaler is not None:
            norm = nn.utils.get_total_norm(_elements(self.parameters()))
        if norm is not None and self.clip_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(self.parameters(), self.clip_grad_norm, norm)
        if self.clip_grad_value is not None:
            nn.utils.clip_grad_value_(self.parameters(), self.clip_grad_value)
        return norm

    def check_gradient(self) -> None:
        """Refuse a step without a gradient.

        Raises:
            ValueError: If no parameter of the optimizer received a gradient.
        """
        if all(parameter.grad is None for parameter in self.parameters()):
            raise ValueError(
                "no parameter received a gradient: the loss does not depend on the model"
            )

    def take(self) -> None:
        """Take one optimizer step; if memory runs out before anything moved, try once more.

        Raises:
            StepInterruptedError: If memory ran out after a parameter or its state had moved, or
                twice.
        """
        before = _Before(self.optimizer, copied=self.snapshot)
        if not self._stepped(before):
            self.device.release_cached()  # The failed attempt's temporaries are gone only now.
            if not self._stepped(before):
                raise StepInterruptedError(
                    "memory ran out twice in the optimizer's step; all parameters and their state "
                    "are as they were before it. Its temporaries do not depend on the micro-batch: "
                    "choose fused=True or foreach=False, or raise the limit"
                )
        if self.scaler is not None:
            self.scaler.update()

    def rehearse(self) -> None:
        """Take a step whatever a scaler thinks of it: a trial must prove that it runs."""
        before = _Before(self.optimizer, copied=self.snapshot)  # Held as training holds it.
        self.optimizer.step()
        del before

    def leave_out(self) -> None:
        """Take no step, and say so to the scaler, which lowers its scale."""
        if self.scaler is not None:
            self.scaler.update()

    def _stepped(self, before: "_Before") -> bool:
        """Whether the step was taken. False: memory ran out, and everything is as it was."""
        try:
            # A scaler looks once more whether all is finite; the device has nothing left to do.
            self.optimizer.step() if self.scaler is None else self.scaler.step(self.optimizer)
        except Exception as error:
            if verdict_of(error) is not Verdict.OUT_OF_MEMORY:
                raise
        else:
            return True
        if before.put_back():
            return False
        raise StepInterruptedError(
            "memory ran out with the optimizer's step half done: some parameters, or their state "
            "in the optimizer, may have moved and others not; go back to the last checkpoint. "
            "snapshot_steps=True keeps a copy of both and undoes such a step"
        )


def _elements(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Every gradient's elements; a sparse gradient has only some, and torch no norm for it."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return [g.coalesce().values() if g.is_sparse else g for g in gradients]


class _Before:
    """What an optimizer holds before its step.

    Args:
        optimizer: Its state may be empty.
        copied: Whether parameters and state are copied to the host, so that a step half done can
            be undone.
    """

    def __init__(self, optimizer: Optimizer, *, copied: bool) -> None:
        self._optimizer = optimizer
        state = optimizer.state
        holders: list[dict[Any, Any]] = [state, *optimizer.param_groups]
        holders += [entry for entry in state.values() if isinstance(entry, dict)]
        self._contents = [(holder, dict(holder)) for holder in holders]
        # Each once: what an entry is found by is in a group as well.
        found: dict[int, Tensor] = {}
        _gather([*optimizer.param_groups, *state.values()], found)
        self._tensors = list(found.values())
        self._versions = self._written()
        self._copies: list[Tensor] | None = None
        if copied:
            self._copies = [tensor.detach().to(HOST, copy=True) for tensor in self._tensors]

    @torch.no_grad()
    def put_back(self) -> bool:
        """Put everything back, or return False: values have moved, and there is no copy."""
        moved = self._moved()
        for holder, content in self._contents:
            holder.clear()
            holder.update(content)
        if moved and self._copies is not None:
            for tensor, value in zip(self._tensors, self._copies, strict=True):
                tensor.copy_(value)
        return not moved or self._copies is not None

    def _moved(self) -> bool:
        """Whether a tensor was written to, or replaced, or a plain number such as a step count."""
        return (
            self._written() != self._versions
            or any(
                holder.get(name) is not value
                for holder, content in self._contents
                for name, value in content.items()
            )
            or self._may_be_moved_unseen()
        )

    def _written(self) -> list[int]:
        """How often each tensor was written to."""
        return [tensor._version for tensor in self._tensors]

    def _may_be_moved_unseen(self) -> bool:
        """Whether a kernel may have written to tensors without counting it as writing.

        Fused ones do not count, but before they run the steps are counted; only SGD counts none.
        On some devices those of many tensors at once do not count either where a dispatch mode,
        such as the CPU's meter, looks on.
        """
        groups = self._optimizer.param_groups
        fused = [p for group in groups if group.get("fused") for p in group["params"]]
        at_once = fused + [p for group in groups if group.get("foreach") for p in group["params"]]
        if any(not backend_of(p.device).counts_foreach_writes for p in at_once):
            return True
        if isinstance(self._optimizer, torch.optim.SGD):
            return bool(fused)
        known = set(map(id, self._tensors))
        steps = [self._optimizer.state.get(p, {}).get("step") for p in fused]
        return any(
            isinstance(step, Tensor) and id(step) not in known and step._version for step in steps
        )


def _gather(values: Iterable[object], found: dict[int, Tensor]) -> None:
    """Find every tensor among them, and in the containers among them, however deep."""
    for value in values:
        if isinstance(value, Tensor):
            found[id(value)] = value
        elif type(value) in PLAIN_TYPES:  # Most of what a group holds.
            continue
        elif isinstance(value, dict):
            _gather(value.values(), found)
        elif isinstance(value, list | tuple):
            _gather(value, found)
