"""The model, the data, the step and the memory budget of a call, checked once."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from autobatch.data.source import Data, Source, open_source
from autobatch.devices.accounting import account_for
from autobatch.devices.base import MemoryDevice
from autobatch.devices.budget import Budget
from autobatch.devices.factory import choose_device, open_device
from autobatch.errors import DoesNotFitError
from autobatch.results.memory import Breakdown
from autobatch.results.search import Trial
from autobatch.state.snapshot import attributes_of, preserved, state_tensors, training_mode
from autobatch.training.engine.train_step import TrainStep
from autobatch.training.options import StepOptions
from autobatch.units import Size, format_bytes
from autobatch.validation import check_model, check_one_process, check_optimizer

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What a search tries and a training runs.

    Attributes:
        step: The training step, which trials run too.
        options: The options of the step.
        source: The data.
        loss_module: The loss if it is a module, otherwise None. It goes to the device, and is
            restored, together with the model.
        budget: The memory limit and the headroom that the user allows.
    """

    step: TrainStep
    options: StepOptions
    source: Source
    loss_module: nn.Module | None
    budget: Budget

    @classmethod
    def resolve(
        cls,
        model: nn.Module,
        data: Data,
        *,
        batch_size: int,
        options: StepOptions,
        optimizer: Optimizer | OptimizerFactory | None,
        device: str | torch.device | None,
        memory_limit: Size | None,
        headroom: Size | None,
    ) -> "Workload":
        """Check every argument. Nothing changes, except that an optimizer's factory is called.

        Args:
            model: As for ``find_and_train``, like all arguments that follow.
            data: Nothing is read, except from a list, whose examples are counted.
            batch_size: Examples in a batch that is read of a Dataset or of tensors.
            options: The options of the step.
            optimizer: An instance, a factory ``params -> Optimizer``, or None for AdamW.
            device: A device, or None.
            memory_limit: In bytes, or like ``"24GiB"``, or None.
            headroom: In bytes, or like ``"1GiB"``, or None.

        Raises:
            TypeError, ValueError: An argument is wrong; the message shows its value and the way
                out.
            DeviceUnavailableError: The device is not present.
        """
        check_one_process()
        check_model(model)
        options.objective()  # Refuses a loss before data is opened and an optimizer is made.
        budget = Budget.parse(memory_limit, headroom)
        source = open_source(data, batch_size=batch_size)
        present = next(model.parameters()).device
        chosen = choose_device(device, present)
        loss = options.loss_module
        own_optimizer = _optimizer(optimizer, model, loss)
        modules = [model] if loss is None else [model, loss]
        memory = open_device(
            chosen,
            lambda: _resident_tensors(modules, own_optimizer),
            counts_host=budget.memory_limit_bytes is None,
        )
        return cls(
            step=options.train_step(model, own_optimizer, memory),
            options=options,
            source=source,
            loss_module=loss,
            budget=budget,
        )

    def resolver(self) -> Callable[..., "Workload"]:
        """Return a function ``(data, *, batch_size) -> Workload`` that another process can call.

        The function holds the model, the optimizer and the options, and no data.
        """
        return partial(
            Workload.resolve,
            self.step.model,
            options=self.options,
            optimizer=self.step.optimizer,
            device=self.device.torch_device,
            memory_limit=self.budget.memory_limit_bytes,
            headroom=self.budget.headroom_bytes,
        )

    @property
    def device(self) -> MemoryDevice:
        """The device on which the step runs."""
        return self.step.device

    @property
    def modules(self) -> list[nn.Module]:
        """The model, and the loss if it is a module."""
        return [module for module in (self.step.model, self.loss_module) if module is not None]

    @property
    def limits_training(self) -> bool:
        """True if training itself runs inside the memory limit.

        On the CPU this needs a meter that costs time, so training is limited there only if the user
        gives a ``memory_limit``. Without one, the search has already left the headroom.
        """
        return self.budget.memory_limit_bytes is not None or not self.device.limit_costs_time

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Restore modules, optimizer, scaler and random generators when the block ends.

        Inside the block, the model is on the device and in training mode.
        """
        optimizers, scaler = [self.step.optimizer], self.step.optimizer_step.scaler
        with ExitStack() as stack:
            if scaler is not None:
                stack.callback(attributes_of(scaler))
            stack.enter_context(
                preserved(self.modules, optimizers, random_sources=[self.source.owner])
            )
            self.move_to_device()
            stack.enter_context(training_mode(self.step.model))
            yield

    def move_to_device(self) -> None:
        """Move the model, the loss and the optimizer state to the device."""
        device = self.device.torch_device
        if next(self.step.model.parameters()).device == device:
            return
        for module in self.modules:
            module.to(device)
        _move_state(self.step.optimizer, device)

    def limit_bytes(self, *, trains: bool = True) -> int:
        """Return how many bytes a step may allocate now.

        Args:
            trains: True if the step computes gradients, for the breakdown in the error.

        Raises:
            ValueError: The headroom is larger than the memory that is free.
            DoesNotFitError: The model alone does not fit.
        """
        limit = self.budget.limit_bytes(self.device.read())
        headroom_bytes = self.budget.headroom_bytes or 0
        if limit <= 0 < headroom_bytes:
            raise ValueError(
                f"headroom of {format_bytes(headroom_bytes)} is at least all of the memory that is "
                "allowed, and leaves nothing to train in; pass a smaller headroom"
            )
        breakdown = self.breakdown_bytes()
        if limit < breakdown["parameters"] + breakdown["buffers"]:
            raise DoesNotFitError(1, limit, self.breakdown(limit, trains=trains))
        return limit

    def breakdown(
        self, limit_bytes: int, trial: Trial | None = None, *, trains: bool = True
    ) -> Breakdown:
        """Return what takes the memory in a trial, or what a failed trial needs at least.

        Args:
            limit_bytes: The bytes that a step may allocate.
            trial: The trial; None before the first one.
            trains: True if the step computes gradients and optimizer state.
        """
        needs = self.breakdown_bytes()
        if not trains:
            needs["gradients"] = 0
        elif trial is None or not trial.fits:  # Part of the state may be missing.
            full_bytes = _full_state_bytes(self.step.optimizer)
            needs["optimizer state"] = max(needs["optimizer state"], full_bytes)
        return account_for(
            needs, device=self.device, budget=self.budget, limit_bytes=limit_bytes, trial=trial
        )

    def breakdown_bytes(self) -> dict[str, int]:
        """Return the bytes that the step needs at any batch size, by what takes them."""
        parameters = [p for module in self.modules for p in module.parameters()]
        buffers = [buffer for module in self.modules for buffer in module.buffers()]
        home = self.device.torch_device
        state = [t for t in state_tensors(self.step.optimizer) if t.device == home]
        return {
            "parameters": _bytes(parameters),
            "buffers": _bytes(buffers),
            "gradients": _bytes([p for p in parameters if p.requires_grad]),
            "optimizer state": _bytes(state),  # Without step counts on the host.
        }


def _optimizer(
    given: Optimizer | OptimizerFactory | None, model: nn.Module, loss: nn.Module | None
) -> Optimizer:
    if given is not None and (isinstance(given, Optimizer) or not callable(given)):
        return check_optimizer(given, model)
    parameters = list(model.parameters())
    if loss is not None:  # A loss may learn a temperature. Shared parameters are listed once.
        known = set(map(id, parameters))
        parameters += [p for p in loss.parameters() if id(p) not in known]
    if given is None:
        return AdamW(parameter for parameter in parameters if parameter.requires_grad)
    return check_optimizer(given(parameters), model)


def _resident_tensors(modules: list[nn.Module], optimizer: Optimizer) -> list[Tensor]:
    held: list[Tensor] = []
    for module in modules:
        held += [*module.parameters(), *module.buffers()]
    return held + state_tensors(optimizer)


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())


def _full_state_bytes(optimizer: Optimizer) -> int:
    """Return the bytes of torch's Adam or SGD state after the first step; 0 for other optimizers.

    Adam holds two or three moments of each parameter, and SGD at most the momentum.
    """
    total = 0
    for group in optimizer.param_groups:
        copies = 0
        if type(optimizer) in (Adam, AdamW):
            copies = 3 if group["amsgrad"] else 2
        elif type(optimizer) is SGD:
            copies = 1 if group["momentum"] else 0
        total += copies * _bytes([p for p in group["params"] if p.requires_grad])
    return total


def _move_state(optimizer: Optimizer, device: torch.device) -> None:
    """Move the state as ``Optimizer.load_state_dict`` does: step counts stay on the host."""
    for group in optimizer.param_groups:
        moves_step_counts = group.get("capturable") or group.get("fused")
        for parameter in group["params"]:
            entry = optimizer.state.get(parameter, {})
            for key, value in entry.items():
                if isinstance(value, Tensor) and (key != "step" or moves_step_counts):
                    entry[key] = value.to(device)
