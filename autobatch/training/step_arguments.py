"""The step's options as keywords of a call, typed for editors and shown in a signature."""

import difflib
import inspect
import os
from collections.abc import Callable
from dataclasses import fields
from typing import Any, Final, TypedDict, TypeVar

import torch
from torch.amp import GradScaler

from autobatch.training.batchnorm.modes import BatchNormMode
from autobatch.training.engine.nonfinite import NonFinite
from autobatch.training.engine.precision import PrecisionName
from autobatch.training.losses.batch_loss import BatchLossFunction
from autobatch.training.losses.forward import Forward
from autobatch.training.losses.resolve import LossLike
from autobatch.training.options import StepOptions

Function = TypeVar("Function", bound=Callable[..., Any])

_LOSS: Final = "loss"  # Every entry point names it: Accumulator takes it by position.


class StepArguments(TypedDict, total=False):
    """The fields of ``StepOptions`` but the loss, for ``**step: Unpack[StepArguments]``."""

    forward: Forward | None
    batch_loss: BatchLossFunction | None
    scaler: GradScaler | None
    precision: PrecisionName
    clip_grad_norm: float | None
    clip_grad_value: float | None
    nonfinite: NonFinite
    batch_norm: BatchNormMode
    gradient_dtype: torch.dtype | None
    snapshot_steps: bool
    replay: bool
    snapshot_on_oom: str | os.PathLike[str] | None


def shows_step_options(function: Function) -> Function:
    """Show the step's options in the signature of ``function``, in the place of ``**step``.

    Jupyter, IPython and ``help`` read ``inspect.signature``; they do not look into ``Unpack``.
    """
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    shown = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type
        )
        for field in fields(StepOptions)
        if field.name != _LOSS
    ]
    function.__signature__ = signature.replace(  # type: ignore[attr-defined]  # Any function has it.
        parameters=[*own, *shown]
    )
    return function


def step_options(
    function: Callable[..., object],
    options: StepOptions | None,
    loss: LossLike | None,
    step: StepArguments,
) -> StepOptions:
    """Return the options of a call of ``function``: ``options``, or those passed one by one.

    Raises:
        TypeError: If an argument is unknown, with the nearest one that ``function`` takes, or if
            both ways were used.
    """
    for name in step:
        if name not in StepArguments.__annotations__:
            near = difflib.get_close_matches(name, inspect.signature(function).parameters, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise TypeError(f"{function.__name__}() takes no argument {name!r}{hint}")
    if options is None:
        return StepOptions(loss=loss, **step)
    if not isinstance(options, StepOptions):
        raise TypeError(f"options must be a StepOptions or None, got {options!r}")
    also = [*([] if loss is None else [_LOSS]), *step]
    if also:
        changed = ", ".join(f"{name}=..." for name in also)
        raise TypeError(
            f"{', '.join(also)} and options= were both passed; pass one of the two, or "
            f"options=dataclasses.replace(options, {changed})"
        )
    return options
