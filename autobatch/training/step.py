"""One optimizer step per logical batch, in pieces that fit: the object for one's own loop."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from autobatch.batches.nest import Nest
from autobatch.batches.reading import Reading
from autobatch.devices.choose import choose_device, open_device
from autobatch.results import StepResult
from autobatch.training.batch_norm import BatchNormMode
from autobatch.training.custom import BatchLoss
from autobatch.training.driver import Driver
from autobatch.training.forward import Forward
from autobatch.training.options import NonFinite, StepOptions
from autobatch.training.precision import PrecisionName
from autobatch.training.replay import MicroBatchSize
from autobatch.training.schedule import Scheduler, SchedulerFactory, resolve_schedule
from autobatch.validation import check_model, check_one_process, check_optimizer, check_size


class Accumulator:
    """Takes the step that the undivided batch would take, in pieces that fit.

    For one's own loop::

        accumulator = Accumulator(model, optimizer, nn.CrossEntropyLoss(), micro_batch=64)
        for batch in loader:  # Of the batch size that is wanted.
            result = accumulator.step(batch)

    It owns ``.grad``: what it finds there is discarded, and nothing is left there. It leaves the
    model's mode alone. After the last micro-batch the gradient is unscaled once and clipped once;
    then come the optimizer's step, the scaler's update and the scheduler's step.

    Args:
        model: On the device where it is to train.
        optimizer: Over some or all of the model's parameters.
        loss: A loss of torch; a callable ``(outputs, targets)`` that returns a mean over examples
            or ``(sum, terms)``; ``WholeBatch(loss)`` for one that compares examples with one
            another. None takes the model's own ``.loss`` if it returns one, and otherwise infers
            the loss from the targets.
        micro_batch: The largest micro-batch; None means the whole batch until memory runs out.
        forward: ``(model, batch) -> (outputs, targets)`` for batches that are neither
            ``(inputs, ..., target)`` nor a mapping with a target.
        batch_loss: ``(model, batch) -> (sum, terms)`` instead of ``loss`` and ``forward``.
        scheduler: An instance, or a factory ``optimizer -> scheduler``: stepped after each
            optimizer step that was taken.
        scaler: A ``torch.amp.GradScaler``; None makes one for ``"fp16"``.
        precision: ``"fp32"`` is no autocast (the model's own dtype), ``"bf16"`` and ``"fp16"``
            autocast forward passes and losses.
        clip_grad_norm: The largest 2-norm of the finished gradient of the optimizer's parameters.
        clip_grad_value: The largest element of it.
        nonfinite: What happens to a step whose loss is nan or infinite, or whose gradient's norm
            is, where it is known: ``"raise"`` NonFiniteLossError, ``"skip"`` it (the norm is
            computed for this), or ``"ignore"`` it, and never wait for the device (unless only the
            loss knows its terms, or a GradScaler has to look). Too large a gradient under a
            GradScaler is skipped in any case: it asks for a smaller scale.
        batch_norm: ``"micro"`` normalises each micro-batch by itself and pools the running
            statistics; ``"frozen"`` normalises by them and leaves them; ``"refuse"`` cuts nothing.
        gradient_dtype: ``torch.float32`` sums the gradients of 16-bit parameters in it.
        snapshot_steps: Keep a copy of parameters and optimizer state on the host during each
            optimizer step, so that one that memory ends half done is undone.
        replay: False lets the error go up when memory runs out, with the step's gradients let go
            and everything else as it was; True runs the window again in smaller pieces.
        snapshot_on_oom: A folder: what CUDA's allocator holds is written there when memory runs
            out, for https://pytorch.org/memory_viz. Other devices write nothing.

    Raises:
        TypeError, ValueError: If an argument cannot be trained with, with the reason.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss: Callable[..., object] | None = None,
        *,
        micro_batch: int | None = None,
        forward: Forward | None = None,
        batch_loss: BatchLoss | None = None,
        scheduler: Scheduler | SchedulerFactory | None = None,
        scaler: GradScaler | None = None,
        precision: PrecisionName = "fp32",
        clip_grad_norm: float | None = None,
        clip_grad_value: float | None = None,
        nonfinite: NonFinite = "raise",
        batch_norm: BatchNormMode = "micro",
        gradient_dtype: torch.dtype | None = None,
        snapshot_steps: bool = False,
        replay: bool = True,
        snapshot_on_oom: str | os.PathLike[str] | None = None,
    ) -> None:
        check_one_process()
        check_model(model)
        check_optimizer(optimizer, model)
        if micro_batch is not None:
            micro_batch = check_size("micro_batch", micro_batch)
        options = StepOptions(
            loss=loss,
            forward=forward,
            batch_loss=batch_loss,
            scaler=scaler,
            precision=precision,
            clip_grad_norm=clip_grad_norm,
            clip_grad_value=clip_grad_value,
            nonfinite=nonfinite,
            batch_norm=batch_norm,
            gradient_dtype=gradient_dtype,
            snapshot_steps=snapshot_steps,
            replay=replay,
            snapshot_on_oom=snapshot_on_oom,
        )
        present = next(model.parameters()).device
        device = open_device(choose_device(present, present))
        self._read = Reading()
        self._driver = Driver(
            recipe=options.recipe(model, optimizer, device),
            size=MicroBatchSize(micro_batch),
            nonfinite=options.nonfinite,
            schedule=resolve_schedule(scheduler, optimizer),
            replay=options.replay,
            ran_out=options.ran_out,
        )

    @property
    def micro_batch(self) -> int | None:
        """The largest micro-batch: as given, or what fits since memory ran out.

        Set it between steps where memory changes: after layers were unfrozen, say, to what
        ``find_batch_size`` finds then.
        """
        return self._driver.size.size

    @micro_batch.setter
    def micro_batch(self, size: int | None) -> None:
        wished = None if size is None else check_size("micro_batch", size)
        self._driver.size = MicroBatchSize(wished)

    @property
    def steps(self) -> int:
        """Optimizer steps taken."""
        return self._driver.steps

    @property
    def moved_buffers(self) -> frozenset[str]:
        """Names of what of the model a forward pass moves, BatchNorm's buffers apart.

        That is buffers, parameters (an averaged teacher's), and attributes that are numbers or
        tensors without a graph. Cut, they move once a micro-batch instead of once a step.
        """
        return frozenset(self._driver.moved_buffers)

    def step(self, batch: Nest) -> StepResult:
        """Take one optimizer step for one logical batch.

        Args:
            batch: On the host, or wherever it is; a micro-batch at a time is moved to the model.

        Returns:
            The loss that the undivided batch has, and how the batch was cut. A batch without a
            valid term is skipped: no step.

        Raises:
            DoesNotFitError: If not even one example fits. Nothing has moved.
            ReplayLimitError: If memory ran out again and again. Nothing has moved.
            InexactStepError: If splitting would change the loss. This step has moved nothing.
            NonFiniteLossError: If the loss is nan or infinite. Nothing has moved.
            StepInterruptedError: If memory ran out in the optimizer's step.
        """
        return self._driver.step(self._read(batch))

    def state_dict(self) -> dict[str, object]:
        """Return what this object itself knows: sizes, counts, the scaler's and scheduler's state.

        Plain values and tensors. The model's and the optimizer's states are theirs to keep.
        """
        driver = self._driver
        scaler, scheduler = driver.recipe.update.scaler, driver.schedule.scheduler
        return {
            **driver.counts(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "scheduler": None if scheduler is None else scheduler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned.

        Raises:
            ValueError: If it is not of an Accumulator that has the same parts. Nothing has moved.
        """
        driver = self._driver
        parts = {"scaler": driver.recipe.update.scaler, "scheduler": driver.schedule.scheduler}
        missing = sorted(set(self.state_dict()) - set(state))
        if missing:
            raise ValueError(f"this is no state of an Accumulator: it has no {', '.join(missing)}")
        for name, part in parts.items():
            if (part is None) != (state[name] is None):
                raise ValueError(
                    f"the state has {'no' if part else 'a'} {name}, and this Accumulator has "
                    f"{'one' if part else 'none'}"
                )
        driver.load_counts(state)
        for name, part in parts.items():
            if part is not None:
                part.load_state_dict(state[name])
