"""One optimizer step per logical batch, in micro-batches that fit, for the user's own loop."""

from collections.abc import Mapping
from typing import Any, Unpack

from torch import nn
from torch.optim import Optimizer

from autobatch.data.normalize import BatchReader
from autobatch.data.tree import BatchTree
from autobatch.devices.factory import choose_device, open_device
from autobatch.results.training import StepResult
from autobatch.training.engine.lr_schedule import Scheduler, SchedulerFactory, resolve_schedule
from autobatch.training.engine.micro_batch_size import MicroBatchSize
from autobatch.training.losses.resolve import LossLike
from autobatch.training.options import StepOptions
from autobatch.training.step_arguments import StepArguments, shows_step_options, step_options
from autobatch.validation import check_model, check_one_process, check_optimizer, check_size


class Accumulator:
    """Takes the optimizer step of a logical batch in micro-batches that fit, in your own loop.

    The step is the one that the undivided batch would take::

        model = nn.Linear(4, 2)
        optimizer = torch.optim.AdamW(model.parameters())
        accumulator = Accumulator(model, optimizer, nn.CrossEntropyLoss(), micro_batch=8)
        loader = DataLoader(TensorDataset(torch.randn(64, 4), torch.randint(0, 2, (64,))), 32)
        for batch in loader:  # The loader's batch size is the size of the logical batch.
            result = accumulator.step(batch)

    The object owns ``.grad``: it discards the gradients that it finds, and leaves none behind. It
    does not change the model's mode. After the last micro-batch the gradient is unscaled once and
    clipped once; then come the optimizer's step, the scaler's update and the scheduler's step.

    Args:
        model: On the device where it trains.
        optimizer: Over some or all of the model's parameters.
        loss: What is minimised, as ``StepOptions`` describes it.
        micro_batch: Examples in the largest micro-batch. None takes the whole logical batch at once
            until memory runs out.
        scheduler: An instance, or a factory ``optimizer -> scheduler``. It is stepped after each
            optimizer step that was taken.
        options: The step's options together, in the place of ``loss`` and ``step``.
        step: The step's options one by one: ``precision``, ``clip_grad_norm``, ``batch_norm`` and
            all other fields of ``StepOptions``.

    Raises:
        TypeError, ValueError: An argument is wrong; the message shows its value and the way out.
    """

    @shows_step_options
    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss: LossLike | None = None,
        *,
        micro_batch: int | None = None,
        scheduler: Scheduler | SchedulerFactory | None = None,
        options: StepOptions | None = None,
        **step: Unpack[StepArguments],
    ) -> None:
        check_one_process()
        check_model(model)
        check_optimizer(optimizer, model)
        if micro_batch is not None:
            micro_batch = check_size("micro_batch", micro_batch)
        options = step_options(Accumulator, options, loss, step)
        present = next(model.parameters()).device
        device = open_device(choose_device(present, present))
        self._read = BatchReader()
        self._runner = options.step_runner(
            options.train_step(model, optimizer, device),
            micro_batch,
            resolve_schedule(scheduler, optimizer),
        )

    @property
    def micro_batch(self) -> int | None:
        """Examples in the largest micro-batch: as passed, or what fits since memory ran out.

        Set it between steps when memory changes, for example after layers were unfrozen, to what
        ``find_batch_size`` finds then.
        """
        return self._runner.gradient.micro_batch_size.size

    @micro_batch.setter
    def micro_batch(self, size: int | None) -> None:
        requested = None if size is None else check_size("micro_batch", size)
        self._runner.gradient.micro_batch_size = MicroBatchSize(requested)

    @property
    def steps(self) -> int:
        """Optimizer steps taken."""
        return self._runner.steps

    @property
    def moved_buffers(self) -> frozenset[str]:
        """Names of what a forward pass changes in the model, apart from BatchNorm's buffers.

        These are buffers, parameters (of an averaged teacher), and attributes that are numbers or
        tensors without a graph. In a batch that is cut they change once a micro-batch instead of
        once a step.
        """
        return frozenset(self._runner.gradient.mutated)

    def step(self, batch: BatchTree) -> StepResult:
        """Take one optimizer step for one logical batch.

        Args:
            batch: ``(inputs, ..., target)`` or a mapping, of tensors of shape ``(example, ...)``,
                on the host or on any device. One micro-batch at a time is copied to the model.

        Returns:
            The loss of the undivided batch, and how the batch was cut. A batch without a valid term
            is skipped: no step is taken.

        Raises:
            DoesNotFitError: Not even one example fits. Nothing was changed.
            ReplayLimitError: Memory ran out again and again. Nothing was changed.
            InexactStepError: Cutting the batch would change the loss. Nothing was changed.
            NonFiniteLossError: The loss is nan or infinite. Nothing was changed.
            StepInterruptedError: Memory ran out in the middle of the optimizer's step.
        """
        return self._runner.step(self._read(batch))

    def state_dict(self) -> dict[str, object]:
        """Return the micro-batch size, the counts, and the state of the scaler and the scheduler.

        These are plain values and tensors. Save the states of model and optimizer yourself.
        """
        scaler, scheduler = self._runner.optimizer_step.scaler, self._runner.schedule.scheduler
        return {
            **self._runner.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "scheduler": None if scheduler is None else scheduler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what ``state_dict`` returned.

        Raises:
            ValueError: The state is of an Accumulator with other parts. Nothing was changed.
        """
        runner = self._runner
        parts = {"scaler": runner.optimizer_step.scaler, "scheduler": runner.schedule.scheduler}
        missing = sorted(set(self.state_dict()) - set(state))
        if missing:
            raise ValueError(f"this is no state of an Accumulator: it has no {', '.join(missing)}")
        for name, part in parts.items():
            if (part is None) != (state[name] is None):
                raise ValueError(
                    f"the state has {'no' if part else 'a'} {name}, and this Accumulator has "
                    f"{'one' if part else 'none'}"
                )
        runner.load_state_dict(state)
        for name, part in parts.items():
            if part is not None:
                part.load_state_dict(state[name])
