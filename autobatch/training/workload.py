"""All arguments of a public function, resolved and refused once."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from autobatch.data.rebatch import Data, Source, open_source
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
    """Everything that a search and a training need to know, checked.

    Attributes:
        step: What training and trials run.
        options: What the step was made of.
        source: The data.
        loss_module: The loss where it is a module: it moves, and is put back, with the model.
        budget: What memory is allowed.
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
        """Check every argument before anything is touched.

        Raises:
            TypeError, ValueError: With the value that came and the way out.
            DeviceUnavailableError: If the device is not here.
        """
        check_one_process()
        check_model(model)
        options.objective()  # Refused before data is opened and an optimizer made.
        budget = Budget.parse(memory_limit, headroom)
        source = open_source(data, batch_size=batch_size)
        present = next(model.parameters()).device
        chosen = choose_device(device, present)
        loss = options.loss_module
        own_optimizer = _optimizer(optimizer, model, loss)
        modules = [model] if loss is None else [model, loss]
        memory = open_device(
            chosen,
            lambda: _residents(modules, own_optimizer),
            counts_host=budget.memory_limit_bytes is None,
        )
        return cls(
            step=options.train_step(model, own_optimizer, memory),
            options=options,
            source=source,
            loss_module=loss,
            budget=budget,
        )

    @property
    def resolve_again(self) -> Callable[..., "Workload"]:
        """What makes this job anew in another process, given data and batch size there."""
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
        """Where the step runs."""
        return self.step.device

    @property
    def modules(self) -> list[nn.Module]:
        """The model, and the loss where it is a module."""
        return [module for module in (self.step.model, self.loss_module) if module is not None]

    @property
    def trains_limited(self) -> bool:
        """Whether training itself is held to the limit.

        The CPU is metered only where the user gives a limit: the meter costs time, and without a
        limit the search has left the headroom.
        """
        return self.budget.memory_limit_bytes is not None or not self.device.limit_costs_time

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Leave no trace of what happens inside, on the model, the data or the generators."""
        optimizers, scaler = [self.step.optimizer], self.step.optimizer_step.scaler
        with ExitStack() as stack:
            if scaler is not None:
                stack.callback(attributes_of(scaler))
            stack.enter_context(
                preserved(self.modules, optimizers, random_sources=[self.source.owner])
            )
            self.move()
            stack.enter_context(training_mode(self.step.model))
            yield

    def move(self) -> None:
        """Bring model, loss and optimizer state to the device."""
        device = self.device.torch_device
        if next(self.step.model.parameters()).device == device:
            return
        for module in self.modules:
            module.to(device)
        _move_state(self.step.optimizer, device)

    def limit_bytes(self, *, trains: bool = True) -> int:
        """Return what a step may allocate now.

        Args:
            trains: Whether there are gradients, for the breakdown of what does not fit.

        Raises:
            DoesNotFitError: If the model alone does not fit.
        """
        limit = self.budget.limit_bytes(self.device.read())
        headroom_bytes = self.budget.headroom_bytes or 0
        if limit <= 0 < headroom_bytes:
            raise ValueError(
                f"headroom of {format_bytes(headroom_bytes)} leaves nothing to train in"
            )
        breakdown = self.breakdown_bytes()
        if limit < breakdown["parameters"] + breakdown["buffers"]:
            raise DoesNotFitError(1, limit, self.breakdown(limit, trains=trains))
        return limit

    def breakdown(
        self, limit_bytes: int, trial: Trial | None = None, *, trains: bool = True
    ) -> Breakdown:
        """Return where the memory goes at a trial; where it failed, what is needed at least.

        Args:
            limit_bytes: What a step might allocate.
            trial: None before there is one.
            trains: Whether there are gradients, and state is made.
        """
        needs = self.breakdown_bytes()
        if not trains:
            needs["gradients"] = 0
        elif trial is None or not trial.fits:  # Then not all of the state may have been made.
            full_bytes = _full_state_bytes(self.step.optimizer)
            needs["optimizer state"] = max(needs["optimizer state"], full_bytes)
        return account_for(
            needs, device=self.device, budget=self.budget, limit_bytes=limit_bytes, trial=trial
        )

    def breakdown_bytes(self) -> dict[str, int]:
        """Return what the step needs whatever the batch, by name."""
        parameters = [p for module in self.modules for p in module.parameters()]
        buffers = [buffer for module in self.modules for buffer in module.buffers()]
        home = self.device.torch_device
        state = [t for t in state_tensors(self.step.optimizer) if t.device == home]
        return {
            "parameters": _bytes(parameters),
            "buffers": _bytes(buffers),
            "gradients": _bytes([p for p in parameters if p.requires_grad]),
            "optimizer state": _bytes(state),  # Not what waits on the host, such as step counts.
        }


def _optimizer(
    given: Optimizer | OptimizerFactory | None, model: nn.Module, loss: nn.Module | None
) -> Optimizer:
    if given is not None and (isinstance(given, Optimizer) or not callable(given)):
        return check_optimizer(given, model)
    parameters = list(model.parameters())
    if loss is not None:  # A temperature, say. A parameter that both hold is there once.
        known = set(map(id, parameters))
        parameters += [p for p in loss.parameters() if id(p) not in known]
    if given is None:
        return AdamW(parameter for parameter in parameters if parameter.requires_grad)
    return check_optimizer(given(parameters), model)


def _residents(modules: list[nn.Module], optimizer: Optimizer) -> list[Tensor]:
    held: list[Tensor] = []
    for module in modules:
        held += [*module.parameters(), *module.buffers()]
    return held + state_tensors(optimizer)


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())


def _full_state_bytes(optimizer: Optimizer) -> int:
    """What torch's Adam and SGD hold once all that is trained was stepped; 0 of other optimizers.

    Adam holds two moments and perhaps a third, of each parameter; SGD its momentum.
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
    """Bring state along, as ``Optimizer.load_state_dict`` would: step counts stay on the host."""
    for group in optimizer.param_groups:
        counts_move = group.get("capturable") or group.get("fused")
        for parameter in group["params"]:
            entry = optimizer.state.get(parameter, {})
            for key, value in entry.items():
                if isinstance(value, Tensor) and (key != "step" or counts_move):
                    entry[key] = value.to(device)
