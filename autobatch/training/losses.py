"""The loss of a micro-batch as a sum, and what the sums of a logical batch are divided by.

Torch's own losses are recognised by identity: the targets give their terms. Every other callable
is taken at its word, a mean over examples or ``(sum, terms)``, which ``loss_check`` then tests.
"""

import functools
import inspect
import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from autobatch.batches.nest import Nest, describe

_Settings = Mapping[str, object]  # The keyword arguments of one of torch's functionals.


class Loss(Protocol):
    """A loss as the law needs it: a sum, and what it is divided by."""

    @property
    def checked(self) -> bool:
        """Whether the loss was not recognised, so that its word has to be tested."""

    @property
    def divides(self) -> bool:
        """Whether there is a denominator: False for ``reduction="sum"``."""

    def denominator(self, targets: Nest, examples: int) -> float:
        """Return what the summed loss of a logical batch is divided by; 0 if no term is valid.

        Args:
            targets: Those of the whole logical batch.
            examples: Examples in the logical batch.
        """

    def terms(self, targets: Nest, examples: int) -> Tensor | float:
        """Return the same for a micro-batch, where its targets are: nothing waits for a device."""

    def summed(
        self, outputs: Nest, targets: Nest, examples: int
    ) -> tuple[Tensor, Tensor | float | None]:
        """Return the summed loss of one micro-batch, and its terms where only the loss knows them.

        Terms come from a ``(sum, terms)`` callable alone: its sums are divided by the example
        count, and every ``.grad`` is rescaled by examples / terms at the end.
        """


def resolve_loss(loss: Callable[..., object] | None) -> Loss:
    """Return how ``loss`` sums and divides; None is inferred from the targets of each batch.

    The settings and buffers of a module are read at every use, those of a partial here.

    Raises:
        TypeError: If it is no callable, or one that can never be exact: ``reduction="none"``,
            ``size_average`` or ``reduce`` given, a partial that binds outputs or targets.
        ValueError: If its reduction is none of torch's.
    """
    if loss is None:
        return _InferredLoss()
    if isinstance(loss, type):
        raise TypeError(f"loss must be an instance, got the class {loss.__name__}: call it first")
    if not callable(loss):
        raise TypeError(f"loss must be a callable (outputs, targets) or None, got {loss!r}")
    known = _known_module(loss) if isinstance(loss, nn.Module) else _known_functional(loss)
    return known or UnrecognisedLoss(loss)


@dataclass(slots=True)
class UnrecognisedLoss:
    """Any callable: a mean over examples or ``(sum, terms)``, for as long as the check agrees."""

    function: Callable[..., object]
    _kind: Literal["a mean", "(sum, terms)"] | None = field(default=None, init=False)

    @property
    def checked(self) -> bool:
        """Whether its word has to be tested: yes."""
        return True

    @property
    def divides(self) -> bool:
        """Whether there is a denominator: yes."""
        return True

    def denominator(self, targets: Nest, examples: int) -> float:  # noqa: ARG002  # The protocol's.
        """Return the example count, which is not the last word on ``(sum, terms)``."""
        return float(examples)

    def terms(self, targets: Nest, examples: int) -> Tensor | float:  # noqa: ARG002
        """Return the example count."""
        return float(examples)

    def summed(
        self, outputs: Nest, targets: Nest, examples: int
    ) -> tuple[Tensor, Tensor | float | None]:
        """Return a mean times the examples and None, or the sum and its terms.

        Raises:
            TypeError: If it returns no tensor, or now a mean and then ``(sum, terms)``.
            ValueError: If what it returns is not scalar.
        """
        result = self.function(outputs, targets)
        if isinstance(result, tuple):
            self._remember("(sum, terms)")
            return read_pair(result)
        self._remember("a mean")
        return _widened(_scalar("the loss", result)) * examples, None

    def _remember(self, kind: Literal["a mean", "(sum, terms)"]) -> None:
        if self._kind not in {None, kind}:
            raise TypeError(
                f"the loss returned {self._kind} before and {kind} now; always return the same"
            )
        self._kind = kind


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
class _KnownLoss:
    recipe: _Recipe
    settings: Callable[[], _Settings]

    @property
    def checked(self) -> bool:
        return False

    @property
    def divides(self) -> bool:
        return self.settings().get("reduction", "mean") != "sum"

    def denominator(self, targets: Nest, examples: int) -> float:
        return float(self.terms(targets, examples))

    def terms(self, targets: Nest, examples: int) -> Tensor | float:  # noqa: ARG002  # As the rest.
        target, settings = self._only_tensor("targets", targets), self.settings()
        if self.recipe.elementwise:
            _refuse_uncuttable(self.recipe, target, settings)
        reduction = settings.get("reduction", "mean")
        if reduction == "sum":
            return 1.0
        if reduction == "batchmean":
            return float(target.shape[0])
        return self.recipe.terms(target, settings)

    def summed(
        self,
        outputs: Nest,
        targets: Nest,
        examples: int,  # noqa: ARG002  # The protocol's.
    ) -> tuple[Tensor, Tensor | float | None]:
        recipe = self.recipe
        output, target = outputs, targets
        if type(output) is not Tensor or output.dtype is torch.float16:
            output = _widened(self._only_tensor("outputs", outputs))
        if type(target) is not Tensor or target.dtype is torch.float16:
            target = _widened(self._only_tensor("targets", targets))
        settings = dict(self.settings())
        if recipe.elementwise:
            _refuse_broadcast(recipe, output, target)
            _refuse_uncuttable(recipe, target, settings)
        for name in recipe.weights:
            value = settings.get(name)
            if isinstance(value, Tensor):  # The model may have been moved since it was made.
                weight = _widened(value.to(output.device))
                settings[name] = weight.expand_as(target) if recipe.elementwise else weight
        settings["reduction"] = "sum"
        return recipe.functional(output, target, **settings), None

    def _only_tensor(self, role: Literal["outputs", "targets"], nest: Nest) -> Tensor:
        if isinstance(nest, Tensor):
            return nest
        raise TypeError(
            f"{self.recipe.name} takes one tensor of {role}, got {describe(nest)}; pass a loss "
            "(outputs, targets) that picks it, or a forward that returns one tensor of each"
        )


@dataclass(frozen=True, slots=True)
class _InferredLoss:
    @property
    def checked(self) -> bool:
        return False

    @property
    def divides(self) -> bool:
        return True

    def denominator(self, targets: Nest, examples: int) -> float:
        return _infer(targets).denominator(targets, examples)

    def terms(self, targets: Nest, examples: int) -> Tensor | float:
        return _infer(targets).terms(targets, examples)

    def summed(
        self, outputs: Nest, targets: Nest, examples: int
    ) -> tuple[Tensor, Tensor | float | None]:
        return _infer(targets).summed(outputs, targets, examples)


def _infer(targets: Nest) -> _KnownLoss:
    if isinstance(targets, Tensor) and targets.dtype is not torch.bool and not targets.is_complex():
        return _MEAN_SQUARED_ERROR if targets.is_floating_point() else _CROSS_ENTROPY
    raise TypeError(
        "no loss can be inferred from these targets: cross-entropy needs one integer tensor, mean "
        f"squared error one floating tensor, got {describe(targets)}; pass loss="
    )


def _known_module(loss: nn.Module) -> Loss | None:
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
    return _KnownLoss(recipe, settings)


def _known_functional(loss: Callable[..., object]) -> Loss | None:
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
    return _KnownLoss(recipe, lambda: settings)


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
            "reshape one of the two"
        )


def _refuse_uncuttable(recipe: _Recipe, target: Tensor, settings: _Settings) -> None:
    if not target.ndim:
        raise ValueError(
            f"{recipe.name} needs targets with the examples along dimension 0, got shape []"
        )
    for name in ("weight", "pos_weight"):
        weight = settings.get(name)
        if isinstance(weight, Tensor) and weight.ndim == target.ndim and weight.shape[0] > 1:
            raise TypeError(
                f"{name} of shape {list(weight.shape)} differs between examples and cannot be cut "
                f"along with targets of shape {list(target.shape)}; put the weights into the "
                "batch, and pass a callable that returns (sum, terms)"
            )


def _widened(tensor: Tensor) -> Tensor:
    """In float32 where it was float16: a sum there overflows above 65504, where its mean fits."""
    return tensor.float() if tensor.dtype is torch.float16 else tensor


def read_pair(pair: tuple[object, ...]) -> tuple[Tensor, Tensor | float]:
    """Return ``(sum, terms)`` as a loss may give it: scalars, terms without graph.

    Raises:
        TypeError, ValueError: If it is no such pair.
    """
    if len(pair) != 2:
        raise TypeError(f"the loss must return a mean or (sum, terms), got {describe(pair)}")
    summed, terms = _scalar("the sum", pair[0]), pair[1]
    if isinstance(terms, numbers.Real):
        return summed, float(terms)
    return summed, _scalar("the terms", terms).detach()


def read_mean(value: object, examples: int) -> tuple[Tensor, float]:
    """Return sum and terms of a metric that gives a mean over examples, or ``(sum, terms)``.

    Raises:
        TypeError, ValueError: If it gives neither.
    """
    if isinstance(value, tuple):
        total, terms = value if len(value) == 2 else (None, None)
        if isinstance(total, numbers.Real):
            total = torch.tensor(float(total), dtype=torch.float64)
        summed, count = read_pair((total, terms))
        return summed.double(), float(count)
    mean = (
        torch.tensor(float(value), dtype=torch.float64)
        if isinstance(value, numbers.Real)
        else value
    )
    return _scalar("the metric", mean).double() * examples, float(examples)


def _scalar(name: str, value: object) -> Tensor:
    way_out = "return a mean over examples or (sum, terms), as tensors without dimensions"
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {describe(value)}; {way_out}")
    if value.ndim:
        raise ValueError(f"{name} must be scalar, got shape {list(value.shape)}; {way_out}")
    return value


def _count_elements(target: Tensor, settings: _Settings) -> float:  # noqa: ARG001  # As the others.
    return float(target.numel())


def _sum_element_weights(target: Tensor, settings: _Settings) -> Tensor | float:
    weight = settings.get("weight")  # The same for every example, or it would have been refused.
    if isinstance(weight, Tensor):
        return _beside(weight, target).mean() * target.numel()
    return float(target.numel())


_COPIES: Final = WeakTensorKeyDictionary()  # Of weights, with the version that was copied.


def _beside(weight: Tensor, target: Tensor) -> Tensor:
    """The weight in float64 where the target is. Fetching it waits for its device, so it is kept.

    Targets wait on the host, and weights may be on the GPU with the model.
    """
    if weight.device == target.device:
        return weight.detach().double()
    kept: tuple[int, Tensor] | None = _COPIES.get(weight)
    if kept is None or kept[0] != weight._version or kept[1].device != target.device:
        kept = weight._version, weight.detach().to(target.device).double()
        _COPIES[weight] = kept
    return kept[1]


def _sum_class_weights(target: Tensor, settings: _Settings) -> Tensor | float:
    classes = target.long()  # A byte of 156 would count as -100.
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
_CROSS_ENTROPY: Final = _KnownLoss(_RECIPES[0], dict)
_MEAN_SQUARED_ERROR: Final = _KnownLoss(_RECIPES[4], dict)
