"""Torch's own losses, recognized by identity: how each is summed, and the terms of its mean."""

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from autobatch.data.tree import LIST_OF_EXAMPLES_HINT, BatchTree, describe
from autobatch.devices.factory import in_widest
from autobatch.training.losses.loss import Loss, widened

_Settings = Mapping[str, object]  # The keyword arguments of one of torch's functionals.


@dataclass(frozen=True, slots=True)
class _LossSpec:
    """How one of torch's losses is called, and the terms of its mean.

    Attributes:
        module: The class.
        functional: The function that the class calls.
        terms: Counts the terms of the mean from targets and settings.
        elementwise: Whether outputs and targets have the same shape.
        reductions: The reductions that the loss knows, besides ``"none"``.
        weights: The settings that are tensors of weights.
    """

    module: type[nn.Module]
    functional: Callable[..., Tensor]
    terms: Callable[[Tensor, _Settings], Tensor | float]
    elementwise: bool = True
    reductions: tuple[str, ...] = ("mean", "sum")
    weights: tuple[str, ...] = ("weight",)

    @property
    def name(self) -> str:
        return self.module.__name__


@dataclass(frozen=True, slots=True)
class _BuiltinLoss(Loss):
    spec: _LossSpec
    settings: Callable[[], _Settings]

    @property
    def checked(self) -> bool:
        return False

    @property
    def divides(self) -> bool:
        return self.settings().get("reduction", "mean") != "sum"

    @property
    def ignored_class(self) -> int:
        ignored = self.settings().get("ignore_index", -100)
        return ignored if isinstance(ignored, int) else -100

    def denominator(self, targets: BatchTree, examples: int) -> float:
        return float(self.terms(targets, examples))

    def terms(self, targets: BatchTree, examples: int) -> Tensor | float:  # noqa: ARG002  # The protocol has it.
        target, settings = self._only_tensor("targets", targets), self.settings()
        if self.spec.elementwise:
            _refuse_example_weights(self.spec, target, settings)
        else:
            _refuse_scalar_target(self.spec, target)
        reduction = settings.get("reduction", "mean")
        if reduction == "sum":
            return 1.0
        if reduction == "batchmean":
            return float(target.shape[0])
        return self.spec.terms(target, settings)

    def summed(
        self,
        outputs: BatchTree,
        targets: BatchTree,
        examples: int,  # noqa: ARG002  # The protocol has it.
    ) -> tuple[Tensor, Tensor | float | None]:
        spec, settings = self.spec, {**self.settings(), "reduction": "sum"}
        output = widened(self._only_tensor("outputs", outputs))
        target = widened(self._only_tensor("targets", targets))
        if spec.elementwise:
            _refuse_broadcast(spec, output, target)
            _refuse_example_weights(spec, target, settings)
        for name in spec.weights:
            weight = settings.get(name)
            if isinstance(weight, Tensor):  # The model may be on another device than at first.
                own = widened(weight.to(output.device))
                settings[name] = own.expand_as(target) if spec.elementwise else own
        return spec.functional(output, target, **settings), None

    def _only_tensor(self, role: Literal["outputs", "targets"], nest: BatchTree) -> Tensor:
        if isinstance(nest, Tensor):
            return nest
        raise TypeError(
            f"{self.spec.name} takes one tensor of {role}, got {describe(nest)}; pass a loss "
            "(outputs, targets) that picks it, or a forward that returns one tensor of each"
            + _advice(nest)
        )


@dataclass(slots=True)
class InferredLoss(Loss):
    """Cross-entropy for integer targets and mean squared error for floating ones.

    Attributes:
        squares: Whether the last targets were floating.
    """

    squares: bool = False

    @property
    def checked(self) -> bool:
        """False: both losses are torch's own."""
        return False

    @property
    def divides(self) -> bool:
        """True: both losses are means."""
        return True

    def denominator(self, targets: BatchTree, examples: int) -> float:
        """Return the terms of a logical batch's targets."""
        return _infer(targets).denominator(targets, examples)

    def terms(self, targets: BatchTree, examples: int) -> Tensor | float:
        """Return the terms of a micro-batch's targets."""
        return _infer(targets).terms(targets, examples)

    def summed(
        self, outputs: BatchTree, targets: BatchTree, examples: int
    ) -> tuple[Tensor, Tensor | float | None]:
        """Return the summed loss, and no terms."""
        known = _infer(targets)
        self.squares = known is _MEAN_SQUARED_ERROR
        return known.summed(outputs, targets, examples)

    def notes(self) -> Iterator[str]:
        """Yield a note if floating targets led to the mean squared error."""
        if self.squares:
            yield (
                "no loss was given and the targets are floating, so the loss is the mean squared "
                "error; for classes pass integer targets, or loss="
            )


def _infer(targets: BatchTree) -> _BuiltinLoss:
    if isinstance(targets, Tensor) and targets.dtype is not torch.bool and not targets.is_complex():
        return _MEAN_SQUARED_ERROR if targets.is_floating_point() else _CROSS_ENTROPY
    raise TypeError(
        "no loss can be inferred from these targets: cross-entropy needs one integer tensor, mean "
        f"squared error one floating tensor, got {describe(targets)}; pass loss=" + _advice(targets)
    )


def _advice(targets: BatchTree) -> str:
    """Return advice for targets of a single example; otherwise ``""``."""
    is_one = not targets.ndim if isinstance(targets, Tensor) else isinstance(targets, int | float)
    return LIST_OF_EXAMPLES_HINT if is_one else ""


def _refuse_scalar_target(spec: _LossSpec, target: Tensor) -> None:
    if not target.ndim:
        raise ValueError(
            f"{spec.name} needs targets with the examples along dimension 0, got shape []"
            + _advice(target)
        )


def builtin_module(loss: nn.Module) -> Loss | None:
    """Return the ``Loss`` of one of torch's loss modules; None for any other module.

    Raises:
        TypeError, ValueError: If its reduction can never be exact.
    """
    spec = next((spec for spec in _SPECS if type(loss) is spec.module), None)
    if spec is None or loss._forward_hooks or loss._forward_pre_hooks or "forward" in vars(loss):
        return None  # A subclass, or a module with hooks, may compute anything.
    # A module keeps its settings under the names of the functional's parameters.
    parameters = inspect.signature(spec.functional).parameters
    options = [name for name in parameters if hasattr(loss, name)]

    # Read from the dictionaries: getattr looks for a buffer only after it has failed elsewhere.
    plain = [name for name in options if name not in loss._buffers]
    tensors = [name for name in options if name in loss._buffers]

    def settings() -> _Settings:
        own, buffers = vars(loss), loss._buffers
        found: dict[str, object] = {name: own[name] for name in plain}
        for name in tensors:
            found[name] = buffers[name]
        return found

    _refuse_reduction(spec, settings())
    return _BuiltinLoss(spec, settings)


def builtin_functional(loss: Callable[..., object]) -> Loss | None:
    """Return the ``Loss`` of a functional of torch or a partial of one; None for others.

    Raises:
        TypeError, ValueError: If its reduction can never be exact, or the partial cannot be called.
    """
    function, arguments = loss, 0
    settings: dict[str, object] = {}
    while isinstance(function, functools.partial):
        arguments += len(function.args)
        settings = {**function.keywords, **settings}
        function = function.func
    spec = next((spec for spec in _SPECS if function is spec.functional), None)
    if spec is None:
        return None
    name = spec.functional.__name__
    if arguments:
        raise TypeError(
            f"a partial of {name} may bind keyword arguments only, got {arguments} positional, "
            "which would replace outputs and targets"
        )
    try:
        inspect.signature(spec.functional).bind(None, None, **settings)
    except TypeError as error:
        raise TypeError(f"this partial of {name} cannot be called: {error}") from None
    _refuse_reduction(spec, settings)
    return _BuiltinLoss(spec, lambda: settings)


def _refuse_reduction(spec: _LossSpec, settings: _Settings) -> None:
    for name in ("size_average", "reduce"):
        if settings.get(name) is not None:
            raise TypeError(f'{name} overrides the reduction; pass reduction="mean" or "sum"')
    reduction = settings.get("reduction", "mean")
    if reduction == "none":
        raise TypeError(
            f'{spec.name} with reduction="none" gives no single loss; pass "mean" or "sum", or '
            "a callable that returns (sum, terms)"
        )
    if reduction not in spec.reductions:
        raise ValueError(
            f"the reduction of {spec.name} must be one of {spec.reductions}, got {reduction!r}"
        )


def _refuse_broadcast(spec: _LossSpec, output: Tensor, target: Tensor) -> None:
    if output.shape != target.shape:
        raise ValueError(
            f"{spec.name} needs outputs and targets of one shape, got {list(output.shape)} and "
            f"{list(target.shape)}: with broadcasting, each example would be compared with the "
            "others; reshape one of the two, or for classes pass integer targets"
        )


def _refuse_example_weights(spec: _LossSpec, target: Tensor, settings: _Settings) -> None:
    _refuse_scalar_target(spec, target)
    for name in ("weight", "pos_weight"):
        weight = settings.get(name)
        if isinstance(weight, Tensor) and weight.ndim == target.ndim and weight.shape[0] > 1:
            raise TypeError(
                f"{name} of shape {list(weight.shape)} differs between examples and cannot be cut "
                f"along with targets of shape {list(target.shape)}; put the weights into the "
                "batch, and pass a callable that returns (sum, terms)"
            )


def _count_elements(target: Tensor, settings: _Settings) -> float:  # noqa: ARG001  # All counters take both.
    return float(target.numel())


def _sum_element_weights(target: Tensor, settings: _Settings) -> Tensor | float:
    weight = settings.get("weight")  # Equal for all examples; other weights are refused.
    if isinstance(weight, Tensor):
        return _copy_beside(weight, target).mean() * target.numel()
    return float(target.numel())


_COPIES: Final = WeakTensorKeyDictionary()  # Copies of weights, with the version of each.


def _copy_beside(weight: Tensor, target: Tensor) -> Tensor:
    """Return the weight in the widest type, on the device of the target.

    Targets are on the host, and weights may be on the GPU with the model. The copy is kept, because
    a copy waits for the GPU.
    """
    if weight.device == target.device:
        return in_widest(weight.detach())
    kept: tuple[int, Tensor] | None = _COPIES.get(weight)
    if kept is None or kept[0] != weight._version or kept[1].device != target.device:
        kept = weight._version, in_widest(weight.detach().to(target.device))
        _COPIES[weight] = kept
    return kept[1]


def _sum_class_weights(target: Tensor, settings: _Settings) -> Tensor | float:
    # As a byte, -100 would be equal to 156.
    classes = target if target.dtype is torch.int64 else target.long()
    valid = torch.ne(classes, settings.get("ignore_index", -100))  # type: ignore[call-overload]  # An integer, as torch demands.
    weight = settings.get("weight")
    if isinstance(weight, Tensor):
        # A mask as an index would wait for the device, which has to report how many it picks.
        total: Tensor = (_copy_beside(weight, target)[torch.where(valid, classes, 0)] * valid).sum()
        return total
    return torch.count_nonzero(valid)


def _sum_class_terms(target: Tensor, settings: _Settings) -> Tensor | float:
    if not target.is_floating_point():
        return _sum_class_weights(target, settings)  # With or without smoothing.
    if target.ndim < 2:
        raise ValueError(
            "floating targets of CrossEntropyLoss are class probabilities of shape (examples, "
            f"classes, ...), got shape {list(target.shape)}; class indices are integers"
        )
    return float(math.prod((target.shape[0], *target.shape[2:])))


_SPECS: Final = (
    _LossSpec(nn.CrossEntropyLoss, F.cross_entropy, _sum_class_terms, elementwise=False),
    _LossSpec(nn.NLLLoss, F.nll_loss, _sum_class_weights, elementwise=False),
    _LossSpec(nn.BCELoss, F.binary_cross_entropy, _count_elements),
    _LossSpec(
        nn.BCEWithLogitsLoss,
        F.binary_cross_entropy_with_logits,
        _count_elements,
        weights=("weight", "pos_weight"),
    ),
    _LossSpec(nn.MSELoss, F.mse_loss, _sum_element_weights),
    _LossSpec(nn.L1Loss, F.l1_loss, _sum_element_weights),
    _LossSpec(nn.SmoothL1Loss, F.smooth_l1_loss, _count_elements),
    _LossSpec(nn.HuberLoss, F.huber_loss, _count_elements),  # Weighted too, unlike the two above.
    _LossSpec(nn.KLDivLoss, F.kl_div, _count_elements, reductions=("mean", "batchmean", "sum")),
)
_CROSS_ENTROPY: Final = _BuiltinLoss(_SPECS[0], dict)
_MEAN_SQUARED_ERROR: Final = _BuiltinLoss(_SPECS[4], dict)
