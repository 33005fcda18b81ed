"""What a resumed training does otherwise than it is asked now, or than it did before, in words."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Final

from torch import Tensor
from torch.optim import Optimizer

Settings = Mapping[str, object]

_MOVED_BY_SCHEDULERS: Final = frozenset({"lr", "momentum", "betas"})
# Of torch's schedulers: where they are, not what they were made with. Base rates are initial ones.
_MOVING: Final = frozenset(
    {
        *("last_epoch", "base_lrs", "best", "num_bad_epochs", "cooldown_counter", "T_cur", "T_i"),
        *("_step_count", "_last_lr", "_is_initial", "_get_lr_called_within_step"),
    }
)
_NUMBERS: Final = (bool, int, float)


def settings_of(optimizer: Optimizer, scheduler: object) -> Settings:
    """Return what both were made with, by name: numbers and text.

    Args:
        optimizer: What a scheduler moves in it is left out if there is one.
        scheduler: None where there is none. Only torch's own are looked into.
    """
    moved = _MOVED_BY_SCHEDULERS if scheduler is not None else frozenset()
    found: dict[str, object] = {}
    for place, group in enumerate(optimizer.param_groups):
        beside = f" of parameter group {place}" if len(optimizer.param_groups) > 1 else ""
        for name, value in group.items():
            if name not in moved:
                found[name.removeprefix("initial_") + beside] = _plain(value)
    found.update(_of_scheduler(scheduler))
    return {name: value for name, value in found.items() if value is not None}


def overruled(given: Settings, now: Settings) -> tuple[str, ...]:
    """Return which settings a state that was loaded has changed: its ``load_state_dict`` is silent.

    Args:
        given: Before.
        now: Since it was loaded.
    """
    return tuple(
        f"{name} goes on as {now[name]}, and not as {value}"
        for name, value in given.items()
        if name in now and now[name] != value
    )


def changed(before: Settings, now: Settings) -> tuple[str, ...]:
    """Return what was otherwise in the steps before; what is not known of them is left out."""
    return tuple(
        f"{name} was {before[name]} until there, and is {value} since"
        for name, value in now.items()
        if name in before and before[name] != value
    )


def _of_scheduler(scheduler: object, place: str = "") -> Iterator[tuple[str, object]]:
    if not type(scheduler).__module__.startswith("torch.optim."):
        return
    whose = f"{type(scheduler).__name__}{place}'s"
    for name, value in vars(scheduler).items():
        if name not in _MOVING:
            yield f"{whose} {name}", _plain(value)
    for number, inside in enumerate(getattr(scheduler, "_schedulers", ())):
        yield from _of_scheduler(inside, f"{place} {number}")


def _plain(value: object) -> object:
    """A number, text, some numbers in a row; None for anything else."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, list | tuple):
        numbers = all(isinstance(item, _NUMBERS) for item in value)
        return tuple(value) if numbers else None
    if isinstance(value, Counter):
        return tuple(sorted(value.elements()))
    return value if isinstance(value, (*_NUMBERS, str)) else None
