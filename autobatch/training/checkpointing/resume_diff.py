"""Sentences on how a resumed training differs from its arguments and from its earlier steps."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Final

from torch import Tensor
from torch.optim import Optimizer

Settings = Mapping[str, object]

_SET_BY_SCHEDULERS: Final = frozenset({"lr", "momentum", "betas"})
# Attributes of torch's schedulers that count steps or repeat the optimizer's initial settings.
_PROGRESS: Final = frozenset(
    {
        *("last_epoch", "base_lrs", "best", "num_bad_epochs", "cooldown_counter", "T_cur", "T_i"),
        *("_step_count", "_last_lr", "_is_initial", "_get_lr_called_within_step"),
    }
)
_NUMBERS: Final = (bool, int, float)


def settings_of(optimizer: Optimizer, scheduler: object) -> Settings:
    """Return the numbers and texts that an optimizer and its scheduler were made with, by name.

    Args:
        optimizer: Its settings that a scheduler changes are skipped if there is a scheduler.
        scheduler: A scheduler or None. Only the settings of torch's own schedulers are read.
    """
    varying = _SET_BY_SCHEDULERS if scheduler is not None else frozenset()
    found: dict[str, object] = {}
    for number, group in enumerate(optimizer.param_groups):
        beside = f" of parameter group {number}" if len(optimizer.param_groups) > 1 else ""
        for name, value in group.items():
            if name not in varying:
                found[name.removeprefix("initial_") + beside] = _plain(value)
    found.update(_scheduler_settings(scheduler))
    return {name: value for name, value in found.items() if value is not None}


def overruled(passed: Settings, now: Settings) -> tuple[str, ...]:
    """Return a sentence for each setting that the checkpoint has replaced.

    Args:
        passed: The settings of this call, before the checkpoint was loaded.
        now: The settings after the checkpoint was loaded.

    Example:
        >>> overruled({"lr": 0.5}, {"lr": 0.1})
        ('lr continues as 0.1 from the checkpoint, not as 0.5',)
    """
    return tuple(
        f"{name} continues as {now[name]} from the checkpoint, not as {value}"
        for name, value in passed.items()
        if name in now and now[name] != value
    )


def changed(before: Settings, now: Settings) -> tuple[str, ...]:
    """Return a sentence for each setting that was another one before the checkpoint.

    Args:
        before: The settings that the checkpoint records. A missing one is not compared.
        now: The settings of this call.
    """
    return tuple(
        f"{name} was {before[name]} before the checkpoint, and is {value} now"
        for name, value in now.items()
        if name in before and before[name] != value
    )


def _scheduler_settings(scheduler: object, nested_in: str = "") -> Iterator[tuple[str, object]]:
    if not type(scheduler).__module__.startswith("torch.optim."):
        return
    whose = f"{type(scheduler).__name__}{nested_in}'s"
    for name, value in vars(scheduler).items():
        if name not in _PROGRESS:
            yield f"{whose} {name}", _plain(value)
    for number, nested in enumerate(getattr(scheduler, "_schedulers", ())):
        yield from _scheduler_settings(nested, f"{nested_in} {number}")


def _plain(value: object) -> object:
    """Return a number, a text or a tuple of numbers as it is; None for any other value."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, list | tuple):
        numbers = all(isinstance(item, _NUMBERS) for item in value)
        return tuple(value) if numbers else None
    if isinstance(value, Counter):
        return tuple(sorted(value.elements()))
    return value if isinstance(value, (*_NUMBERS, str)) else None
