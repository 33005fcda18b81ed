"""The check that a loss which was not recognised may be split.

The outputs of a window are joined, and the law must give their loss, and its gradient with respect
to them, again from two different splits. The model is not run for this, so that dropout and
BatchNorm cannot disturb it.
"""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import torch
from torch import Tensor, nn

from autobatch.data.tree import BatchTree, cut, join, map_tensors, size_of, tensors
from autobatch.devices.base import HOST
from autobatch.errors import InexactStepError
from autobatch.state.rng import random_state
from autobatch.training.losses.loss import Loss

Value = TypeVar("Value")

_NO_MEMORY: Final = (torch.OutOfMemoryError, MemoryError)
_NOISE: Final = 10  # Gradients may differ by so many times what they do from call to call.


def check_splits(loss: Loss, outputs: Sequence[BatchTree], targets: Sequence[BatchTree]) -> bool:
    """Return True if the law holds for ``loss``, False if these outputs cannot tell.

    They cannot tell where the loss of the whole is not finite, where there are fewer than two
    examples, or where each part has the loss of the whole, so that any weights would do (an output
    layer that begins at zero): ask again on the next window. The same goes for a gradient that is
    not finite or differs too much from call to call, and for memory that runs out.

    The gradient is that with respect to floating outputs; a loss without one is judged by its
    values. Equal values do not do where there is one: ``z + c - c.detach()`` is always ``z``.

    In float64 the two must agree to 1e-6, so that the loss may round to float32 inside. One that
    refuses float64 is asked in float32, then in its own type, and must agree to the square root of
    that type's precision, gradients as a fraction of the largest. Costs at most six calls of the
    loss, and as many backward passes, in each type.

    Leaves no trace: the RNG, a loss module's buffers, every ``.grad`` and the attributes that the
    module sets are as before. Only what it alters inside an object of its own, a list say, stays
    altered.

    Args:
        loss: Recognised or not.
        outputs: One nest a micro-batch, detached.
        targets: One nest a micro-batch, where the outputs are.

    Raises:
        InexactStepError: If splitting changes the loss or its gradient, or nothing can be joined
            and split.
    """
    # What runs out of memory here is the check, not the step, which has been computed.
    with contextlib.suppress(*_NO_MEMORY):
        return _judge(loss, _join(outputs, targets))
    return False


def _judge(loss: Loss, whole: BatchTree) -> bool:
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
    if not _gradients_agree(splits, repeated, readings):
        return False
    return any(not r.agrees(expected, value) for r in readings for value in r.values)


def _gradients_agree(
    splits: Sequence[tuple[int, int]], repeated: "_Reading", readings: Sequence["_Reading"]
) -> bool:
    """True, or False if they cannot tell; what disagrees is raised."""
    expected, again = (g / t for g, t in zip(repeated.gradients, repeated.terms, strict=True))
    largest, noise = _largest(expected), _NOISE * _largest(expected - again)
    if not noise <= largest:  # Nor where one is nan.
        return False
    for split, reading in zip(splits, readings, strict=True):
        difference = _largest(expected - reading.combined_gradient)
        if not difference <= reading.tolerance * largest + noise:
            raise InexactStepError(
                f"splitting changes the gradient of this loss: over {len(expected)} examples its "
                f"largest element is {largest:.9g}, but from parts of {split[0]} + {split[1]} one "
                f"is off by {difference:.9g}; " + _advice(reading)
            )
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reading:
    """The loss of consecutive parts.

    Attributes:
        sums: The summed loss of each part.
        terms: The denominator of each part.
        gradients: The gradient of each sum with respect to the outputs, ``(examples, features)``.
        counted: Whether the loss itself gave the terms.
        precision: The coarsest type that it answered in.
    """

    sums: Sequence[float]
    terms: Sequence[float]
    gradients: Sequence[Tensor]
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

    @property
    def combined_gradient(self) -> Tensor:
        """What the law makes of the parts' gradients."""
        return torch.cat(list(self.gradients)) / sum(self.terms)

    @property
    def tolerance(self) -> float:
        """How far two values may be apart, as a fraction of the larger."""
        eps = torch.finfo(self.precision).eps
        return 1e-6 if self.precision is torch.float64 else math.sqrt(eps)

    def agrees(self, one: float, other: float) -> bool:
        """Whether two values are equal to the precision of the parts; never where one is nan."""
        scale = max(map(abs, (one, *self.values)))
        return math.isclose(one, other, rel_tol=0.0, abs_tol=self.tolerance * scale)


def _largest(gradient: Tensor) -> float:
    return float(gradient.abs().max())


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
    return _advice(reading)


def _advice(reading: _Reading) -> str:
    coupled = (
        "a loss that compares examples with one another is exact in parts as WholeBatch(loss), or "
        "in a desired batch that fits as one micro-batch"
    )
    if reading.counted:
        return "the sum and the terms that it returns must each add up over examples; " + coupled
    return (
        "return (sum, terms) if it is a mean over something other than examples, such as valid "
        "tokens or weights; " + coupled
    )


def _join(outputs: Sequence[BatchTree], targets: Sequence[BatchTree]) -> BatchTree:
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
    loss: Loss, whole: BatchTree, splits: Sequence[tuple[int, int]]
) -> list[_Reading]:
    """The whole twice, then each split."""
    families = [[whole, whole], *(cut(whole, sizes) for sizes in splits)]
    for precision in (torch.float64, torch.float32, None):
        try:
            return [_read(loss, parts, precision, _with_leaves) for parts in families]
        except Exception as error:
            if isinstance(error, _NO_MEMORY):
                raise
    # Outputs that need no gradient in training may be used as such, taken to NumPy say. What is
    # wrong for another reason is wrong again here, and raised.
    return [_read(loss, parts, None, lambda outputs: (outputs, [])) for parts in families]


def _read(
    loss: Loss,
    parts: Sequence[BatchTree],
    precision: torch.dtype | None,
    prepared: Callable[[BatchTree], tuple[BatchTree, list[Tensor]]],
) -> _Reading:
    sums, denominators, gradients = [], [], []
    counted, coarsest = False, torch.float64
    with _no_trace(loss, parts):
        for part in parts:
            pair = _copy(part, precision)
            assert isinstance(pair, tuple), "outputs and targets were joined as pairs"
            targets, examples = pair[1], size_of(pair)
            with torch.enable_grad():
                outputs, leaves = prepared(pair[0])
                summed, terms = loss.summed(outputs, targets, examples)
            counted = terms is not None
            denominator = loss.denominator(targets, examples) if terms is None else float(terms)
            sums.append(float(summed))
            denominators.append(denominator)
            gradients.append(_gradient(summed, leaves, examples))
            coarsest = max(coarsest, summed.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    return _Reading(
        sums=sums, terms=denominators, gradients=gradients, counted=counted, precision=coarsest
    )


def _with_leaves(outputs: BatchTree) -> tuple[BatchTree, list[Tensor]]:
    """Outputs that have a gradient, and the leaves that it goes to."""
    leaves = []

    def grown(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or not tensor.ndim:
            return tensor
        leaves.append(tensor.requires_grad_())
        return tensor.clone()  # A leaf could not be altered in place.

    return map_tensors(grown, outputs), leaves


def _gradient(summed: Tensor, leaves: Sequence[Tensor], examples: int) -> Tensor:
    """The gradient of a part's sum, one row an example; zero if there is none."""
    found: Sequence[Tensor] = [torch.zeros_like(leaf) for leaf in leaves]
    if leaves and summed.requires_grad:
        # Into no .grad: what else the loss depends on may be learnt.
        found = torch.autograd.grad(summed, leaves, materialize_grads=True)
    rows = [g.reshape(examples, g.numel() // examples).to(HOST, torch.float64) for g in found]
    return torch.cat([torch.zeros(examples, 1, dtype=torch.float64), *rows], 1)


def _copy(nest: BatchTree, precision: torch.dtype | None) -> BatchTree:
    """A copy, which the loss may alter, with its floating tensors in another precision."""
    return map_tensors(
        lambda t: t.to((t.is_floating_point() and precision) or t.dtype, copy=True), nest
    )


@contextlib.contextmanager
def _no_trace(loss: Loss, parts: Sequence[BatchTree]) -> Iterator[None]:
    """Put RNG and the loss's state back at the end; no autocast or warning until then."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        # A warning may be about these parts, which are not training's.
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        for name in {tensor.device.type for tensor in tensors(list(parts))}:
            # It would round again what was just made precise.
            stack.enter_context(torch.autocast(name, enabled=False))
        stack.callback(random_state())
        stack.enter_context(_state_kept(loss.module or nn.Module()))
        yield


@contextlib.contextmanager
def _state_kept(module: nn.Module) -> Iterator[None]:
    parts = [(part, dict(vars(part)), dict(part._buffers)) for part in module.modules()]
    # The loss is lent copies, for altering a buffer in place would tie it to the check's graph.
    copies = {id(buffer): buffer.clone() for buffer in module.buffers()}
    try:
        for part, _, buffers in parts:
            part._buffers.update({n: copies[id(b)] for n, b in buffers.items() if b is not None})
        yield
    finally:
        for part, attributes, buffers in parts:
            _refill(vars(part), attributes)
            _refill(part._buffers, buffers)


def _refill(mapping: dict[str, Value], content: dict[str, Value]) -> None:
    mapping.clear()
    mapping.update(content)
