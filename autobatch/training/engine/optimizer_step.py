"""Take the optimizer step from a finished gradient, completely or not at all."""

from collections.abc import Iterable
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
    """Turns the gradient of a logical batch into a step: unscale, clip, step, update the scale.

    Attributes:
        optimizer: Over some or all of the model's parameters.
        device: The device of the parameters.
        scaler: The GradScaler, or None.
        clip_grad_norm: The largest 2-norm of the gradient of the optimizer's parameters.
        clip_grad_value: The largest absolute value of an element of that gradient.
        needs_norm: True if the norm is computed even if it is not used for clipping.
        snapshot: True if parameters and optimizer state are copied to the host before each step,
            so that an interrupted step can be undone.
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

    def finish_gradient(self) -> Tensor | None:
        """Unscale the gradient once, then clip it once; does not wait for the device.

        Returns:
            The norm between the two, a scalar; None if nothing needs it.
        """
        if self.scaler is not None and any(p.grad is not None for p in self.parameters()):
            self.scaler.unscale_(self.optimizer)  # It asserts that there is a gradient.
        norm = None
        if self.needs_norm or self.clip_grad_norm is not None or self.scaler is not None:
            norm = nn.utils.get_total_norm(_gradient_values(self.parameters()))
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
        """Take one optimizer step; if memory runs out before anything changed, try once more.

        Raises:
            StepInterruptedError: If memory ran out twice, or after a parameter or its state in the
                optimizer had changed.
        """
        snapshot = _OptimizerSnapshot(self.optimizer, copy_values=self.snapshot)
        if not self._try_step(snapshot):
            self.device.release_cached()  # Only now are the failed attempt's temporaries free.
            if not self._try_step(snapshot):
                raise StepInterruptedError(
                    "memory ran out twice in the optimizer's step; all parameters and their state "
                    "are as they were before it. Its temporaries do not depend on the micro-batch: "
                    "choose fused=True or foreach=False, or raise the limit"
                )
        if self.scaler is not None:
            self.scaler.update()

    def take_in_trial(self) -> None:
        """Take a step even if a scaler would skip it, because a trial must measure its memory."""
        snapshot = _OptimizerSnapshot(self.optimizer, copy_values=self.snapshot)  # As in training.
        self.optimizer.step()
        del snapshot

    def skip(self) -> None:
        """Take no step; a scaler then lowers its scale if the gradient is not finite."""
        if self.scaler is not None:
            self.scaler.update()

    def _try_step(self, snapshot: "_OptimizerSnapshot") -> bool:
        """Return True if the step was taken, False if memory ran out and everything is as before.

        Raises:
            StepInterruptedError: If memory ran out after something had changed.
        """
        try:
            # A scaler waits for the device; the gradient's norm has been read already.
            self.optimizer.step() if self.scaler is None else self.scaler.step(self.optimizer)
        except Exception as error:
            if verdict_of(error) is not Verdict.OUT_OF_MEMORY:
                raise
        else:
            return True
        if snapshot.restore():
            return False
        raise StepInterruptedError(
            "memory ran out with the optimizer's step half done: some parameters, or their state "
            "in the optimizer, may have changed and others not; go back to the last checkpoint. "
            "snapshot_steps=True keeps a copy of both and undoes such a step"
        )


def _gradient_values(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return the values of every gradient; torch computes no norm of a sparse gradient."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return [g.coalesce().values() if g.is_sparse else g for g in gradients]


class _OptimizerSnapshot:
    """An optimizer's parameter groups and state as they are before its step.

    Args:
        optimizer: Its state may be empty.
        copy_values: True copies the tensors to the host, so that an interrupted step can be undone.
            False only records their versions.
    """

    def __init__(self, optimizer: Optimizer, *, copy_values: bool) -> None:
        self._optimizer = optimizer
        state = optimizer.state
        holders: list[dict[Any, Any]] = [state, *optimizer.param_groups]
        holders += [entry for entry in state.values() if isinstance(entry, dict)]
        self._contents = [(holder, dict(holder)) for holder in holders]
        tensors: dict[int, Tensor] = {}  # By id, because groups and state share tensors.
        _gather([*optimizer.param_groups, *state.values()], tensors)
        self._tensors = list(tensors.values())
        self._versions = self._current_versions()
        self._copies: list[Tensor] | None = None
        if copy_values:
            self._copies = [tensor.detach().to(HOST, copy=True) for tensor in self._tensors]

    @torch.no_grad()
    def restore(self) -> bool:
        """Restore everything; return False if values have changed and there is no copy of them."""
        changed = self._changed()
        for holder, content in self._contents:
            holder.clear()
            holder.update(content)
        if changed and self._copies is not None:
            for tensor, value in zip(self._tensors, self._copies, strict=True):
                tensor.copy_(value)
        return not changed or self._copies is not None

    def _changed(self) -> bool:
        """Return whether a tensor was written to, or an entry of a group or state replaced."""
        return (
            self._current_versions() != self._versions
            or any(
                holder.get(name) is not value
                for holder, content in self._contents
                for name, value in content.items()
            )
            or self._may_have_uncounted_writes()
        )

    def _current_versions(self) -> list[int]:
        """Return how often each tensor was written to."""
        return [tensor._version for tensor in self._tensors]

    def _may_have_uncounted_writes(self) -> bool:
        """Return whether a kernel may have written to a tensor without raising its version.

        Fused kernels do not raise versions. The optimizer increases its step counts before it runs
        them, and these are compared; SGD has no step counts. On some devices foreach kernels do
        not raise versions either under a dispatch mode, such as the CPU's memory meter.
        """
        groups = self._optimizer.param_groups
        fused = [p for group in groups if group.get("fused") for p in group["params"]]
        foreach = [p for group in groups if group.get("foreach") for p in group["params"]]
        if any(not backend_of(p.device).counts_foreach_writes for p in fused + foreach):
            return True
        if isinstance(self._optimizer, torch.optim.SGD):
            return bool(fused)
        known = set(map(id, self._tensors))
        steps = [self._optimizer.state.get(p, {}).get("step") for p in fused]
        return any(
            isinstance(step, Tensor) and id(step) not in known and step._version for step in steps
        )


def _gather(values: Iterable[object], tensors: dict[int, Tensor]) -> None:
    """Collect the tensors among the values and in their nested containers, by id."""
    for value in values:
        if isinstance(value, Tensor):
            tensors[id(value)] = value
        elif type(value) in PLAIN_TYPES:  # Most values of a group.
            continue
        elif isinstance(value, dict):
            _gather(value.values(), tensors)
        elif isinstance(value, list | tuple):
            _gather(value, tensors)
