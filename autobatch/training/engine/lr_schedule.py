"""When a learning-rate scheduler is stepped, and with which loss."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, Protocol, TypeGuard

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

Interval = Literal["step", "epoch"]
_INTERVALS: Final = ("step", "epoch")


class Scheduler(Protocol):
    """The methods of a learning-rate scheduler, of torch or of the user."""

    @property
    def step(self) -> Callable[..., object]:
        """Changes the learning rate; ReduceLROnPlateau's takes a loss."""

    def state_dict(self) -> dict[str, object]:
        """Return what ``load_state_dict`` takes."""

    def load_state_dict(self, state_dict: dict[str, object], /) -> object:
        """Continue from what ``state_dict`` returned."""


SchedulerFactory = Callable[[Optimizer], Scheduler]


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A scheduler and how often it is stepped.

    Attributes:
        scheduler: None if there is no scheduler.
        interval: ``"step"`` after each optimizer step, ``"epoch"`` after each epoch.
    """

    scheduler: Scheduler | None = None
    interval: Interval = "step"

    def after_step(self) -> None:
        """Step the scheduler if its interval is a step; called after each step that was taken."""
        if self.scheduler is not None and self.interval == "step":
            self.scheduler.step()

    def after_epoch(self, loss: float) -> None:
        """Step the scheduler if its interval is an epoch; called after each epoch.

        Args:
            loss: The evaluation's loss; without an evaluation the epoch's mean training loss.
        """
        if self.scheduler is None or self.interval != "epoch":
            return
        scheduler: object = self.scheduler
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(loss)
        else:
            self.scheduler.step()


def resolve_schedule(given: object, optimizer: Optimizer, interval: object = "step") -> Schedule:
    """Return the schedule of a scheduler, or of a factory ``optimizer -> scheduler``.

    Raises:
        TypeError: If it is neither.
        ValueError: If the interval is unknown, the scheduler belongs to another optimizer, or it
            needs a loss and the interval is ``"step"``.
    """
    if interval not in _INTERVALS:
        raise ValueError(f"scheduler_interval must be one of {_INTERVALS}, got {interval!r}")
    checked_interval: Interval = "epoch" if interval == "epoch" else "step"
    if given is None:
        return Schedule(interval=checked_interval)
    if not _is_scheduler(given):
        given = given(optimizer) if callable(given) else given
    if not _is_scheduler(given):
        raise TypeError(
            "scheduler must be a learning-rate scheduler or a factory (optimizer) -> scheduler, "
            f"got {type(given).__name__}"
        )
    if getattr(given, "optimizer", optimizer) is not optimizer:
        raise ValueError(
            f"{type(given).__name__} belongs to another optimizer than the one that steps; make "
            "it for this one, or pass a factory (optimizer) -> scheduler"
        )
    scheduler: object = given
    if isinstance(scheduler, ReduceLROnPlateau) and checked_interval == "step":
        raise ValueError(
            "ReduceLROnPlateau is stepped on a loss after each epoch: pass "
            'scheduler_interval="epoch" to find_and_train, or step it yourself'
        )
    return Schedule(scheduler=given, interval=checked_interval)


def _is_scheduler(given: object) -> TypeGuard[Scheduler]:
    if inspect.isclass(given):
        return False
    return isinstance(given, LRScheduler) or all(
        callable(getattr(given, name, None)) for name in ("step", "state_dict", "load_state_dict")
    )
