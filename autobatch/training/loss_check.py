"""The check that a loss which was not recognised may be split.

The outputs of a window are joined, and the law must give their loss again from two different
splits. The model is not run for this, so that dropout and BatchNorm cannot disturb it.
"""

import contextlib
import functools
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from autobatch.batches.nest import Nest, cut, join, map_tensors, size_of, tensors
from autobatch.errors import InexactStepError
from autobatch.randomness import random_state
from autobatch.training.losses import Loss, UnrecognisedLoss

Value = TypeVar("Value")


def check_splits(loss: Loss, outputs: Sequence[Nest], targets: Sequence[Nest]) -> bool:
    """Return True if the law holds for ``loss``, False if these outputs cannot tell.

    They cannot tell where the loss of the whole is not finite, where there are fewer than two
    examples, or where each part has the loss of the whole, so that any weights would do (an output
    layer that begins at zero): ask again on the next window.

    In float64 the two must agree to 1e-6, so that the loss may round to float32 inside. One that
    refuses float64 is asked in float32, then in its own type, and must agree to the square root of
    that type's precision. Costs at most six calls of the loss in each type.

    Leaves no trace: the RNG, a loss module's buffers and the attributes that it sets are as before.
    Only what it alters inside an object of its own, a list say, stays altered.

    Args:
        loss: Recognised or not.
        outputs: One nest a micro-batch, detached.
        targets: One nest a micro-batch, where the outputs are.

    Raises:
        InexactStepError: If splitting changes the loss, or nothing can be joined and split.
    """
    whole = _join(outputs, targets)
    examples = size_of(whole)
    if examples < 2:
        return False
    # Two examples have one split, three or more have two, of which one is uneven.
    thirds = (examples + 1) // 3
    splits = sorted({(examples // 2, examples - examples // 2), (examples - thirds, thirds)})
    repeated, *readings = _read_in_best_precision(loss, whole, splits)
    expected = repeated.values[0] if repeated.values else math.nan
    if not math.isfinite(expected):
        return False
    for split, reading in zip(splits, readings, strict=True):
        if not reading.agrees(expected, reading.combined):
            raise InexactStepError(
                f"splitting changes this loss: over {examples} examples it is {expected:.9g}, but "
                f"{reading.combined:.9g} from parts of {split[0]} + {split[1]}; "
                + _way_out(repeated, reading)
            )
    return any(not r.agrees(expected, value) for r in readings for value in r.values)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reading:
    """The loss of consecutive parts.

    Attributes:
        sums: The summed loss of each part.
        terms: The denominator of each part.
        counted: Whether the loss itself gave the terms.
        precision: The coarsest type that it answered in.
    """

    sums: Sequence[float]
    terms: Sequence[float]
    counted: bool
    precision: torch.dtype

    @property
    def values(self) -> list[float]:
        """The loss of each part that has terms."""
        return [s / terms for s, terms in zip(self.sums, self.terms, strict=True) if terms]

    @property
    def combined(self) -> float:
        """What the law makes of the parts."""
        return sum(self.sums) / sum(self.terms) if sum(self.terms) else math.nan

    def agrees(self, one: float, other: float) -> bool:
        """Whether two values are equal to the precision of the parts; never where one is nan."""
        eps = torch.finfo(self.precision).eps
        tolerance = 1e-6 if self.precision is torch.float64 else math.sqrt(eps)
        scale = max(map(abs, (one, *self.values)))
        return math.isclose(one, other, rel_tol=0.0, abs_tol=tolerance * scale)


def _way_out(repeated: _Reading, reading: _Reading) -> str:
    first, second = repeated.values[0], repeated.values[-1]
    if not repeated.agrees(first, second):
        return (
            f"called again on the same outputs it is {second:.9g}: draw random numbers in the "
            "model or in forward=, and keep no state in the loss"
        )
    if reading.agrees(first, sum(reading.values)):
        return (
            "it looks like a sum over examples: return (sum, number of examples) to step on their "
            'mean, or pass a loss of torch such as nn.MSELoss(reduction="sum") to step on the sum'
        )
    coupled = (
        "a loss that compares examples with one another is not exact in parts: choose a desired "
        "batch that fits as one micro-batch"
    )
    if reading.counted:
        return "the sum and the terms that it returns must each add up over examples; " + coupled
    return (
        "return (sum, terms) if it is a mean over something other than examples, such as valid "
        "tokens or weights; " + coupled
    )


def _join(outputs: Sequence[Nest], targets: Sequence[Nest]) -> Nest:
    """All outputs and targets, as one pair."""
    pairs = list(zip(outputs, targets, strict=True))
    try:
        whole = join(pairs)
        size_of(whole)
    except ValueError as error:
        raise InexactStepError(
            "this loss cannot be shown to be exact in parts, because its outputs and targets "
            f"cannot be joined: {error}; return from forward= only what the loss needs, one row "
            "an example, or pass a loss of torch that autobatch recognises"
        ) from error
    return whole


def _read_in_best_precision(
    loss: Loss, whole: Nest, splits: Sequence[tuple[int, int]]
) -> list[_Reading]:
    """The whole twice, then each split."""
    families = [[whole, whole], *(cut(whole, sizes) for sizes in splits)]
    for precision in (torch.float64, torch.float32):
        # What is wrong for another reason is wrong again below, and raised there.
        with contextlib.suppress(Exception):
            return [_read(loss, parts, precision) for parts in families]
    return [_read(loss, parts, None) for parts in families]


def _read(loss: Loss, parts: Sequence[Nest], precision: torch.dtype | None) -> _Reading:
    sums, denominators, counted, coarsest = [], [], False, torch.float64
    with _no_trace(loss, parts):
        for part in parts:
            pair = _copy(part, precision)
            assert isinstance(pair, tuple), "outputs and targets were joined as pairs"
            outputs, targets = pair
            examples = size_of(pair)
            summed, terms = loss.summed(outputs, targets, examples)
            counted = terms is not None
            denominator = loss.denominator(targets, examples) if terms is None else float(terms)
            sums.append(float(summed))
            denominators.append(denominator)
            coarsest = max(coarsest, summed.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    return _Reading(sums=sums, terms=denominators, counted=counted, precision=coarsest)


def _copy(nest: Nest, precision: torch.dtype | None) -> Nest:
    """A copy, which the loss may alter, with its floating tensors in another precision."""
    return map_tensors(
        lambda t: t.to((t.is_floating_point() and precision) or t.dtype, copy=True), nest
    )


@contextlib.contextmanager
def _no_trace(loss: Loss, parts: Sequence[Nest]) -> Iterator[None]:
    """Put RNG and the loss's state back at the end; no graph, autocast or warning until then."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        # A warning may be about these parts, which are not training's.
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        for name in {tensor.device.type for tensor in tensors(list(parts))}:
            # It would round again what was just made precise.
            stack.enter_context(torch.autocast(name, enabled=False))
        stack.callback(random_state())
        stack.enter_context(_state_kept(_module_of(loss)))
        yield


def _module_of(loss: Loss) -> nn.Module:
    """The module that the loss is, or is a method or partial of; an empty one if there is none."""
    function: object = loss.function if isinstance(loss, UnrecognisedLoss) else None
    while isinstance(function, functools.partial):
        function = function.func
    owner = getattr(function, "__self__", function)
    return owner if isinstance(owner, nn.Module) else nn.Module()


@contextlib.contextmanager
def _state_kept(module: nn.Module) -> Iterator[None]:
    parts = [(part, dict(vars(part)), dict(part._buffers)) for part in module.modules()]
    values = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for part, attributes, buffers in parts:
            _refill(vars(part), attributes)
            _refill(part._buffers, buffers)
        for buffer, value in values:
            buffer.copy_(value)


def _refill(mapping: dict[str, Value], content: dict[str, Value]) -> None:
    mapping.clear()
    mapping.update(content)
