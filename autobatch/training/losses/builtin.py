"""Torch's own losses, recognised by identity: how each is summed, and the terms of its mean."""

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
class _Recipe:
    """How one of torch's losses is called, and the terms of its mean."""

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
    recipe: _Recipe
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

    def terms(self, targets: BatchTree, examples: int) -> Tensor | float:  # noqa: ARG002  # As the rest.
        target, settings = self._only_tensor("targets", targets), self.settings()
        if self.recipe.elementwise:
            _refuse_uncuttable(self.recipe, target, settings)
        else:
            _refuse_single(self.recipe, target)
        reduction = settings.get("reduction", "mean")
        if reduction == "sum":
            return 1.0
        if reduction == "batchmean":
            return float(target.shape[0])
        return self.recipe.terms(target, settings)

    def summed(
        self,
        outputs: BatchTree,
        targets: BatchTree,
        examples: int,  # noqa: ARG002  # The protocol's.
    ) -> tuple[Tensor, Tensor | float | None]:
        recipe, settings = self.recipe, {**self.settings(), "reduction": "sum"}
        output = widened(self._only_tensor("outputs", outputs))
        target = widened(self._only_tensor("targets", targets))
        if recipe.elementwise:
            _refuse_broadcast(recipe, output, target)
            _refuse_uncuttable(recipe, target, settings)
        for name in recipe.weights:
            weight = settings.get(name)
            if isinstance(weight, Tensor):  # The model may have been moved since it was made.
                own = widened(weight.to(output.device))
                settings[name] = own.expand_as(target) if recipe.elementwise else own
        return recipe.functional(output, target, **settings), None

    def _only_tensor(self, role: Literal["outputs", "targets"], nest: BatchTree) -> Tensor:
        if isinstance(nest, Tensor):
            return nest
        raise TypeError(
            f"{self.recipe.name} takes one tensor of {role}, got {describe(nest)}; pass a loss "
            "(outputs, targets) that picks it, or a forward that returns one tensor of each"
            + _way_out(nest)
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
        """Whether its word has to be tested: no."""
        return False

    @property
    def divides(self) -> bool:
        """Whether there is a denominator: yes."""
        return True

    def denominator(self, targets: BatchTree, examples: int) -> float:
        """Return the terms of the targets."""
        return _infer(targets).denominator(targets, examples)

    def terms(self, targets: BatchTree, examples: int) -> Tensor | float:
        """Return the same where the targets are."""
        return _infer(targets).terms(targets, examples)

    def summed(
        self, outputs: BatchTree, targets: BatchTree, examples: int
    ) -> tuple[Tensor, Tensor | float | None]:
        """Return the summed loss, and no terms."""
        known = _infer(targets)
        self.squares = known is _MEAN_SQUARED_ERROR
        return known.summed(outputs, targets, examples)

    def notes(self) -> Iterator[str]:
        """Yield what a user should know who wanted another loss for floating targets."""
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
        f"squared error one floating tensor, got {describe(targets)}; pass loss="
        + _way_out(targets)
    )


def _way_out(targets: BatchTree) -> str:
    """Say what to do about targets that are one example's."""
    is_one = not targets.ndim if isinstance(targets, Tensor) else isinstance(targets, int | float)
    return LIST_OF_EXAMPLES_HINT if is_one else ""


def _refuse_single(recipe: _Recipe, target: Tensor) -> None:
    if not target.ndim:
        raise ValueError(
            f"{recipe.name} needs targets with the examples along dimension 0, got shape []"
            + _way_out(target)
        )


def builtin_module(loss: nn.Module) -> Loss | None:
    """Return a loss module of torch's as the law needs it; None for any other.

    Raises:
        TypeError, ValueError: If its reduction can never be exact.
    """
    recipe = next((recipe for recipe in _RECIPES if type(loss) is recipe.module), None)
    if recipe is None or loss._forward_hooks or loss._forward_pre_hooks or "forward" in vars(loss):
        return None  # A subclass, or one that was altered, may compute anything.
    # A module keeps its settings under the names of the functional's parameters.
    parameters = inspect.signature(recipe.functional).parameters
    options = [name for name in parameters if hasattr(loss, name)]

    # Where they lie: getattr finds a module's buffers only after it has failed elsewhere.
    plain = [name for name in options if name not in loss._buffers]
    tensors = [name for name in options if name in loss._buffers]

    def settings() -> _Settings:
        own, buffers = vars(loss), loss._buffers
        found: dict[str, object] = {name: own[name] for name in plain}
        for name in tensors:
            found[name] = buffers[name]
        return found

    _refuse_reduction(recipe, settings())
    return _BuiltinLoss(recipe, settings)


def builtin_functional(loss: Callable[..., object]) -> Loss | None:
    """Return a functional of torch's, or a partial of one, as the law needs it; None for any other.

    Raises:
        TypeError, ValueError: If its reduction can never be exact, or the partial cannot be called.
    """
    function, arguments = loss, 0
    settings: dict[str, object] = {}
    while isinstance(function, functools.partial):
        arguments += len(function.args)
        settings = {**function.keywords, **settings}
        function = function.func
    recipe = next((recipe for recipe in _RECIPES if function is recipe.functional), None)
    if recipe is None:
        return None
    name = recipe.functional.__name__
    if arguments:
        raise TypeError(
            f"a partial of {name} may bind keyword arguments only, got {arguments} positional, "
            "which would take the place of outputs and targets"
        )
    try:
        inspect.signature(recipe.functional).bind(None, None, **settings)
    except TypeError as error:
        raise TypeError(f"this partial of {name} cannot be called: {error}") from None
    _refuse_reduction(recipe, settings)
    return _BuiltinLoss(recipe, lambda: settings)


def _refuse_reduction(recipe: _Recipe, settings: _Settings) -> None:
    for name in ("size_average", "reduce"):
        if settings.get(name) is not None:
            raise TypeError(f'{name} overrides the reduction; say reduction="mean" or "sum"')
    reduction = settings.get("reduction", "mean")
    if reduction == "none":
        raise TypeError(
            f'{recipe.name} with reduction="none" gives no single loss; say "mean" or "sum", or '
            "pass a callable that returns (sum, terms)"
        )
    if reduction not in recipe.reductions:
        raise ValueError(
            f"the reduction of {recipe.name} must be one of {recipe.reductions}, got {reduction!r}"
        )


def _refuse_broadcast(recipe: _Recipe, output: Tensor, target: Tensor) -> None:
    if output.shape != target.shape:
        raise ValueError(
            f"{recipe.name} needs outputs and targets of one shape, got {list(output.shape)} and "
            f"{list(target.shape)}: broadcast, examples would be compared with one another; "
            "reshape one of the two, or for classes pass integer targets"
        )


def _refuse_uncuttable(recipe: _Recipe, target: Tensor, settings: _Settings) -> None:
    _refuse_single(recipe, target)
    for name in ("weight", "pos_weight"):
        weight = settings.get(name)
        if isinstance(weight, Tensor) and weight.ndim == target.ndim and weight.shape[0] > 1:
            raise TypeError(
                f"{name} of shape {list(weight.shape)} differs between examples and cannot be cut "
                f"along with targets of shape {list(target.shape)}; put the weights into the "
                "batch, and pass a callable that returns (sum, terms)"
            )


def _count_elements(target: Tensor, settings: _Settings) -> float:  # noqa: ARG001  # As the others.
    return float(target.numel())


def _sum_element_weights(target: Tensor, settings: _Settings) -> Tensor | float:
    weight = settings.get("weight")  # The same for every example, or it would have been refused.
    if isinstance(weight, Tensor):
        return _beside(weight, target).mean() * target.numel()
    return float(target.numel())


_COPIES: Final = WeakTensorKeyDictionary()  # Of weights, with the version that was copied.


def _beside(weight: Tensor, target: Tensor) -> Tensor:
    """The weight, in the widest type, where the target is.

    Fetching it waits for its device, so it is kept. Targets wait on the host, and weights may be on
    the GPU with the model.
    """
    if weight.device == target.device:
        return in_widest(weight.detach())
    kept: tuple[int, Tensor] | None = _COPIES.get(weight)
    if kept is None or kept[0] != weight._version or kept[1].device != target.device:
        kept = weight._version, in_widest(weight.detach().to(target.device))
        _COPIES[weight] = kept
    return kept[1]


def _sum_class_weights(target: Tensor, settings: _Settings) -> Tensor | float:
    # A byte of 156 would count as -100.
    classes = target if target.dtype is torch.int64 else target.long()
    valid = torch.ne(classes, settings.get("ignore_index", -100))  # type: ignore[call-overload]  # An integer, as torch demands.
    weight = settings.get("weight")
    if isinstance(weight, Tensor):
        # No mask as an index: how many it picks would have to be waited for.
        total: Tensor = (_beside(weight, target)[torch.where(valid, classes, 0)] * valid).sum()
        return total
    return torch.count_nonzero(valid)


def _sum_class_terms(target: Tensor, settings: _Settings) -> Tensor | float:
    if not target.is_floating_point():
        return _sum_class_weights(target, settings)  # Smoothed or not.
    if target.ndim < 2:
        raise ValueError(
            "floating targets of CrossEntropyLoss are class probabilities of shape (examples, "
            f"classes, ...), got shape {list(target.shape)}; class indices are integers"
        )
    return float(math.prod((target.shape[0], *target.shape[2:])))


_RECIPES: Final = (
    _Recipe(nn.CrossEntropyLoss, F.cross_entropy, _sum_class_terms, elementwise=False),
    _Recipe(nn.NLLLoss, F.nll_loss, _sum_class_weights, elementwise=False),
    _Recipe(nn.BCELoss, F.binary_cross_entropy, _count_elements),
    _Recipe(
        nn.BCEWithLogitsLoss,
        F.binary_cross_entropy_with_logits,
        _count_elements,
        weights=("weight", "pos_weight"),
    ),
    _Recipe(nn.MSELoss, F.mse_loss, _sum_element_weights),
    _Recipe(nn.L1Loss, F.l1_loss, _sum_element_weights),
    _Recipe(nn.SmoothL1Loss, F.smooth_l1_loss, _count_elements),
    _Recipe(nn.HuberLoss, F.huber_loss, _count_elements),  # Weighted too, unlike the two above.
    _Recipe(nn.KLDivLoss, F.kl_div, _count_elements, reductions=("mean", "batchmean", "sum")),
)
_CROSS_ENTROPY: Final = _BuiltinLoss(_RECIPES[0], dict)
_MEAN_SQUARED_ERROR: Final = _BuiltinLoss(_RECIPES[4], dict)
