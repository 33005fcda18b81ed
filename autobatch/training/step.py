"""One optimizer step per logical batch, in pieces that fit: the object for one's own loop."""

from collections.abc import Mapping
from typing import Any, Unpack

from torch import nn
from torch.optim import Optimizer

from autobatch.batches.nest import Nest
from autobatch.batches.reading import Reading
from autobatch.devices.choose import choose_device, open_device
from autobatch.plan import check_size
from autobatch.refusals import check_model, check_one_process, check_optimizer
from autobatch.results import StepResult
from autobatch.training.driver import Driver
from autobatch.training.options import LossLike, StepOptions
from autobatch.training.replay import MicroBatchSize
from autobatch.training.schedule import Scheduler, SchedulerFactory, resolve_schedule
from autobatch.training.step_arguments import StepArguments, shows_step_options, step_options


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
