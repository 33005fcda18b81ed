"""What the user calls a loss, resolved: torch's own, or any callable taken at its word.

Torch's own are recognised by identity: the targets give their terms. Every other callable is a
mean over examples or ``(sum, terms)`` by what it returns, which ``loss_check`` then tests.
"""

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

    @property
    def is_mean(self) -> bool:
        """Whether it has returned a mean, whose terms nobody counts."""
        return self._kind == "a mean"

    def denominator(self, targets: BatchTree, examples: int) -> float:  # noqa: ARG002  # The protocol's.
        """Return the example count, which is not the last word on ``(sum, terms)``."""
        return float(examples)

    def terms(self, targets: BatchTree, examples: int) -> Tensor | float:  # noqa: ARG002
        """Return the example count."""
        return float(examples)

    def summed(
        self, outputs: BatchTree, targets: BatchTree, examples: int
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
        return widened(_scalar("the loss", result)) * examples, None

    @property
    def module(self) -> nn.Module | None:
        """The module that the function is, or is a method or partial of."""
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
    """Return ``(sum, terms)`` as a loss may give it: scalars, terms without graph.

    Raises:
        TypeError, ValueError: If it is no such pair.
    """
    if len(pair) != 2:
        raise TypeError(f"{of} must return a mean or (sum, terms), got {describe(pair)}")
    summed, terms = _scalar("the sum", pair[0]), pair[1]
    if isinstance(terms, numbers.Real):
        return summed, float(terms)
    return summed, _scalar("the terms", terms).detach()


def _scalar(name: str, value: object) -> Tensor:
    way_out = "return a mean over examples or (sum, terms), as tensors without dimensions"
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {describe(value)}; {way_out}")
    if value.ndim:
        raise ValueError(f"{name} must be scalar, got shape {list(value.shape)}; {way_out}")
    return value
