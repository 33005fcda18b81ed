"""A loss that is any callable: what it returns tells whether it is a mean or ``(sum, terms)``."""

import functools
import numbers
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from autobatch.data.tree import BatchTree, describe
from autobatch.training.losses.loss import Loss, widened


@dataclass(slots=True)
class CallableLoss(Loss):
    """Any callable that returns a mean over examples or ``(sum, terms)``.

    Attributes:
        function: Takes outputs and targets.
    """

    function: Callable[..., object]
    _kind: Literal["a mean", "(sum, terms)"] | None = field(default=None, init=False)

    @property
    def checked(self) -> bool:
        """True: the loss is user code whose additivity must be verified."""
        return True

    @property
    def divides(self) -> bool:
        """True: the sum is divided by examples or terms."""
        return True

    @property
    def is_mean(self) -> bool:
        """True if the function has returned a mean, whose terms nothing counts."""
        return self._kind == "a mean"

    def denominator(self, targets: BatchTree, examples: int) -> float:  # noqa: ARG002  # The protocol's.
        """Return the number of examples; with ``(sum, terms)``, the gradient is rescaled later."""
        return float(examples)

    def terms(self, targets: BatchTree, examples: int) -> Tensor | float:  # noqa: ARG002
        """Return the number of examples."""
        return float(examples)

    def summed(
        self, outputs: BatchTree, targets: BatchTree, examples: int
    ) -> tuple[Tensor, Tensor | float | None]:
        """Return the mean times the examples and None, or the sum and its terms.

        Raises:
            TypeError: If the function returns no tensor, or a mean in one call and ``(sum, terms)``
                in another.
            ValueError: If a returned tensor has dimensions.
        """
        result = self.function(outputs, targets)
        if isinstance(result, tuple):
            self._remember("(sum, terms)")
            return read_pair(result)
        self._remember("a mean")
        return widened(require_scalar("the loss", result)) * examples, None

    @property
    def module(self) -> nn.Module | None:
        """The module that the function is, or of which it is a method or partial."""
        function: object = self.function
        while isinstance(function, functools.partial):
            function = function.func
        owner = getattr(function, "__self__", function)
        return owner if isinstance(owner, nn.Module) else None

    def _remember(self, kind: Literal["a mean", "(sum, terms)"]) -> None:
        if self._kind not in {None, kind}:
            raise TypeError(
                f"the loss returned {self._kind} before and {kind} now; always return the same"
            )
        self._kind = kind


def read_pair(pair: tuple[object, ...], of: str = "the loss") -> tuple[Tensor, Tensor | float]:
    """Return the sum and the terms of a pair; terms that are a tensor lose their graph.

    Args:
        pair: What a loss or a metric returned.
        of: What returned it, for messages.

    Raises:
        TypeError: If the tuple has another length or holds no such numbers.
        ValueError: If a tensor has dimensions.
    """
    if len(pair) != 2:
        raise TypeError(f"{of} must return a mean or (sum, terms), got {describe(pair)}")
    summed, terms = require_scalar("the sum", pair[0]), pair[1]
    if isinstance(terms, numbers.Real):
        return summed, float(terms)
    return summed, require_scalar("the terms", terms).detach()


def require_scalar(name: str, value: object) -> Tensor:
    """Return a value that is a tensor without dimensions.

    Args:
        name: What the value is, for messages.
        value: What user code returned.

    Raises:
        TypeError: If the value is no tensor.
        ValueError: If the tensor has dimensions.
    """
    way_out = "return a mean over examples or (sum, terms), as tensors without dimensions"
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {describe(value)}; {way_out}")
    if value.ndim:
        raise ValueError(f"{name} must be scalar, got shape {list(value.shape)}; {way_out}")
    return value
