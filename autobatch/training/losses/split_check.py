"""The check that a loss which autobatch does not know is additive over examples.

The outputs of a logical batch are joined. Two different splits of them must give the loss of the
whole, and its gradient with respect to the outputs. The model does not run, so that dropout and
BatchNorm cannot change the comparison.
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
from autobatch.training.losses.tolerance import Tolerance

# In float64 a loss may still round to float32 inside; otherwise the square root of the precision.
SPLIT_TOLERANCE: Final = Tolerance(
    float64=1e-6,
    float32=math.sqrt(torch.finfo(torch.float32).eps),
    float16=math.sqrt(torch.finfo(torch.float16).eps),
    bfloat16=math.sqrt(torch.finfo(torch.bfloat16).eps),
)

Value = TypeVar("Value")

_NO_MEMORY: Final = (torch.OutOfMemoryError, MemoryError)
_NOISE_FACTOR: Final = 10  # Gradients may differ this many times more than from call to call.


def check_splits(loss: Loss, outputs: Sequence[BatchTree], targets: Sequence[BatchTree]) -> bool:
    """Return True if splits give the loss of the whole, False if these outputs allow no answer.

    There is no answer if the loss of the whole is not finite, if there are fewer than two examples,
    or if each part has the loss of the whole, so that any weights would do (an output layer that
    begins at zero). There is none either if a gradient is not finite or differs too much from call
    to call, or if memory runs out. A later logical batch may give an answer.

    The check compares values, and gradients with respect to floating outputs. Values alone do not
    suffice: ``z + c - c.detach()`` always equals ``z``, whatever the gradient of ``c`` is.

    The loss runs in float64 and must agree to 1e-6, so that it may round to float32 inside. A loss
    that fails in float64 runs in float32, then in its own type, and must agree to the square root
    of that type's precision; a gradient, as a fraction of its largest element. The check calls the
    loss at most six times in each type, with as many backward passes.

    Afterwards the random numbers, the buffers of a loss module, every ``.grad`` and the attributes
    that the module sets are as before. Only a change inside an object of the loss, such as a list,
    remains.

    Args:
        loss: Any loss.
        outputs: One batch tree for each micro-batch, detached.
        targets: One batch tree for each micro-batch, on the device of the outputs.

    Raises:
        InexactStepError: If splitting changes the loss or its gradient, or the outputs cannot be
            joined and split.
    """
    # The step itself has been computed, so that only this check runs out of memory here.
    with contextlib.suppress(*_NO_MEMORY):
        return _is_additive(loss, _join(outputs, targets))
    return False


def _is_additive(loss: Loss, whole: BatchTree) -> bool:
    """Whether two splits give the loss of the whole; False if they allow no answer."""
    examples = size_of(whole)
    if examples < 2:
        return False
    # Two examples have one split. Three or more have two, of which one is uneven.
    thirds = (examples + 1) // 3
    splits = sorted({(examples // 2, examples - examples // 2), (examples - thirds, thirds)})
    repeated, *split_losses = _evaluate_in_best_precision(loss, whole, splits)
    expected = repeated.values[0] if repeated.values else math.nan
    if not math.isfinite(expected):
        return False
    for split, parts in zip(splits, split_losses, strict=True):
        if not parts.agrees(expected, parts.combined):
            raise InexactStepError(
                f"splitting changes this loss: over {examples} examples it is {expected:.9g}, but "
                f"{parts.combined:.9g} from parts of {split[0]} + {split[1]}; "
                + _explain(repeated, parts)
            )
    if not _gradients_agree(splits, repeated, split_losses):
        return False
    return any(
        not parts.agrees(expected, value) for parts in split_losses for value in parts.values
    )


def _gradients_agree(
    splits: Sequence[tuple[int, int]],
    repeated: "_PartLosses",
    split_losses: Sequence["_PartLosses"],
) -> bool:
    """Whether all gradients agree; False if they allow no answer. A difference raises an error."""
    expected, again = (g / t for g, t in zip(repeated.gradients, repeated.terms, strict=True))
    largest, noise = _largest(expected), _NOISE_FACTOR * _largest(expected - again)
    if not noise <= largest:  # Also if one of them is nan.
        return False
    for split, parts in zip(splits, split_losses, strict=True):
        difference = _largest(expected - parts.combined_gradient)
        if not difference <= parts.tolerance * largest + noise:
            raise InexactStepError(
                f"splitting changes the gradient of this loss: over {len(expected)} examples its "
                f"largest element is {largest:.9g}, but from parts of {split[0]} + {split[1]} one "
                f"is off by {difference:.9g}; " + _advise(parts)
            )
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class _PartLosses:
    """The loss of consecutive parts of the outputs.

    Attributes:
        sums: The summed loss of each part.
        terms: The denominator of each part.
        gradients: The gradient of each sum with respect to the outputs, ``(examples, features)``.
        counted: Whether the loss itself returned the terms.
        tolerance: How far two values may differ, as a fraction of the larger.
    """

    sums: Sequence[float]
    terms: Sequence[float]
    gradients: Sequence[Tensor]
    counted: bool
    tolerance: float

    @property
    def values(self) -> list[float]:
        """The loss of each part that has terms."""
        return [s / terms for s, terms in zip(self.sums, self.terms, strict=True) if terms]

    @property
    def combined(self) -> float:
        """The loss of the whole, from the sums and terms of its parts."""
        return sum(self.sums) / sum(self.terms) if sum(self.terms) else math.nan

    @property
    def combined_gradient(self) -> Tensor:
        """The gradient of the whole, from the gradients and terms of its parts."""
        return torch.cat(list(self.gradients)) / sum(self.terms)

    def agrees(self, one: float, other: float) -> bool:
        """Whether two values are equal within the tolerance; False if one is nan."""
        scale = max(map(abs, (one, *self.values)))
        return math.isclose(one, other, rel_tol=0.0, abs_tol=self.tolerance * scale)


def _largest(gradient: Tensor) -> float:
    return float(gradient.abs().max())


def _explain(repeated: _PartLosses, parts: _PartLosses) -> str:
    """Return the likely reason of a difference, and what the user can do."""
    first, second = repeated.values[0], repeated.values[-1]
    if not repeated.agrees(first, second):
        return (
            f"called again on the same outputs it is {second:.9g}: draw random numbers in the "
            "model or in forward=, and keep no state in the loss"
        )
    if parts.agrees(first, sum(parts.values)):
        return (
            "it looks like a sum over examples: return (sum, number of examples) to train on their "
            'mean, or pass a loss of torch such as nn.MSELoss(reduction="sum") to train on the sum'
        )
    return _advise(parts)


def _advise(parts: _PartLosses) -> str:
    coupled = (
        "a loss that compares examples with one another is exact in parts as WholeBatch(loss), or "
        "in a desired batch that fits as one micro-batch"
    )
    if parts.counted:
        return "the sum and the terms that it returns must each add up over examples; " + coupled
    return (
        "return (sum, terms) if it is a mean over something other than examples, such as valid "
        "tokens or weights; " + coupled
    )


def _join(outputs: Sequence[BatchTree], targets: Sequence[BatchTree]) -> BatchTree:
    """Return all outputs and targets as one pair."""
    pairs = list(zip(outputs, targets, strict=True))
    try:
        whole = join(pairs)
        size_of(whole)
    except ValueError as error:
        raise InexactStepError(
            "autobatch cannot check if this loss is exact in parts, because its outputs and "
            f"targets cannot be joined: {error}; return from forward= only what the loss needs, "
            "one row an example, or pass a loss of torch that autobatch knows"
        ) from error
    return whole


def _evaluate_in_best_precision(
    loss: Loss, whole: BatchTree, splits: Sequence[tuple[int, int]]
) -> list[_PartLosses]:
    """Return the losses of the whole twice, then of the parts of each split."""
    families = [[whole, whole], *(cut(whole, sizes) for sizes in splits)]
    for precision in (torch.float64, torch.float32, None):
        try:
            return [_evaluate(loss, parts, precision, _with_leaves) for parts in families]
        except Exception as error:
            if isinstance(error, _NO_MEMORY):
                raise
    # A loss may need outputs without a gradient, to convert them to NumPy for example. A loss that
    # fails for another reason fails again here.
    return [_evaluate(loss, parts, None, lambda outputs: (outputs, [])) for parts in families]


def _evaluate(
    loss: Loss,
    parts: Sequence[BatchTree],
    precision: torch.dtype | None,
    prepare: Callable[[BatchTree], tuple[BatchTree, list[Tensor]]],
) -> _PartLosses:
    """Return the loss of each part.

    Args:
        loss: Called once for each part.
        parts: Pairs of outputs and targets.
        precision: The floating type to convert them to, or None.
        prepare: Returns the outputs for the loss, and the tensors that receive a gradient.
    """
    sums, denominators, gradients = [], [], []
    counted, dtypes = False, {torch.float64}
    with _restored(loss, parts):
        for part in parts:
            pair = _copy(part, precision)
            assert isinstance(pair, tuple), "outputs and targets were joined as pairs"
            targets, examples = pair[1], size_of(pair)
            with torch.enable_grad():
                outputs, leaves = prepare(pair[0])
                summed, terms = loss.summed(outputs, targets, examples)
            counted = terms is not None
            denominator = loss.denominator(targets, examples) if terms is None else float(terms)
            sums.append(float(summed))
            denominators.append(denominator)
            gradients.append(_gradient(summed, leaves, examples))
            dtypes.add(summed.dtype)
    return _PartLosses(
        sums=sums,
        terms=denominators,
        gradients=gradients,
        counted=counted,
        tolerance=SPLIT_TOLERANCE.of(*dtypes),
    )


def _with_leaves(outputs: BatchTree) -> tuple[BatchTree, list[Tensor]]:
    """Return outputs that have a gradient, and the leaves that receive it."""
    leaves = []

    def from_leaf(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or not tensor.ndim:
            return tensor
        leaves.append(tensor.requires_grad_())
        return tensor.clone()  # A loss may not change a leaf in place.

    return map_tensors(from_leaf, outputs), leaves


def _gradient(summed: Tensor, leaves: Sequence[Tensor], examples: int) -> Tensor:
    """Return the gradient of a part's sum, one row an example; zeros if there is none."""
    found: Sequence[Tensor] = [torch.zeros_like(leaf) for leaf in leaves]
    if leaves and summed.requires_grad:
        # No .grad changes: the loss may depend on parameters as well.
        found = torch.autograd.grad(summed, leaves, materialize_grads=True)
    rows = [g.reshape(examples, g.numel() // examples).to(HOST, torch.float64) for g in found]
    return torch.cat([torch.zeros(examples, 1, dtype=torch.float64), *rows], 1)


def _copy(nest: BatchTree, precision: torch.dtype | None) -> BatchTree:
    """Return a copy, which the loss may change, with floating tensors in another precision."""
    return map_tensors(
        lambda t: t.to((t.is_floating_point() and precision) or t.dtype, copy=True), nest
    )


@contextlib.contextmanager
def _restored(loss: Loss, parts: Sequence[BatchTree]) -> Iterator[None]:
    """Restore random numbers and the loss's state at the end; no autocast or warning inside."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        # A warning would be about these parts, which training does not use.
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        for name in {tensor.device.type for tensor in tensors(list(parts))}:
            # Autocast would round the tensors that were just converted.
            stack.enter_context(torch.autocast(name, enabled=False))
        stack.callback(random_state())
        stack.enter_context(_restored_state(loss.module or nn.Module()))
        yield


@contextlib.contextmanager
def _restored_state(module: nn.Module) -> Iterator[None]:
    parts = [(part, dict(vars(part)), dict(part._buffers)) for part in module.modules()]
    # The loss works on copies: a buffer that it changes in place would join the check's graph.
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
