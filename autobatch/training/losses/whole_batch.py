"""Losses that compare examples with one another, exact in pieces: two forward passes.

The outputs of all micro-batches are made without a graph and joined, the loss of the whole gives
their gradient, and a second forward pass of each micro-batch, with the random numbers and the
buffers of the first, takes that gradient back to the parameters (Gao et al., 2021, "Scaling deep
contrastive learning batch size under memory limited setup").
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from autobatch.data.tree import BatchTree, describe
from autobatch.training.losses.forward import Forward, own_rows
from autobatch.training.losses.objective import Objective, Passes, Record

LossOfAll = Callable[..., object]


class WholeBatch:
    """A loss ``(outputs, targets) -> scalar`` that is given the whole logical batch at once.

    Exact for any loss of outputs: contrastive, batch-hard, correlation. It costs a second forward
    pass, and memory for the outputs of all examples, wherever the batch is cut. The outputs hold
    one row an example, embeddings say, not a matrix that compares them: that is the loss's part. A
    tensor without dimensions, such as a temperature, may go with them::

        find_and_train(model, pairs, desired=4096, loss=WholeBatch(info_nce))

    Args:
        loss: Its value is what is minimised; nothing is divided. A module may have parameters.

    Raises:
        TypeError: If it is not callable.
    """

    def __init__(self, loss: LossOfAll) -> None:
        if isinstance(loss, type) or not callable(loss):
            raise TypeError(
                f"WholeBatch needs a callable (outputs, targets) -> scalar, got {loss!r}"
            )
        self.loss = loss

    @property
    def module(self) -> nn.Module | None:
        """The loss, where it is a module."""
        return self.loss if isinstance(self.loss, nn.Module) else None

    def objective(self, forward: Forward | None) -> "WholeBatchObjective":
        """Return what training minimizes."""
        return WholeBatchObjective(loss=self, forward=forward)

    def __call__(self, outputs: BatchTree, targets: BatchTree) -> Tensor:
        """Return the loss of the whole.

        Raises:
            TypeError: If it is no tensor without dimensions.
        """
        value = self.loss(outputs, targets)
        if not isinstance(value, Tensor) or value.ndim:
            raise TypeError(f"the loss of a whole batch must be a scalar, got {describe(value)}")
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeBatchObjective(Objective):
    """The objective of a ``WholeBatch``; ``accumulate_cached`` takes its gradient.

    Attributes:
        loss: Of all outputs and targets.
        forward: The user's, or None for the standard one.
    """

    loss: WholeBatch
    forward: Forward | None

    @property
    def needs_full_batch(self) -> bool:
        """True: the loss compares the outputs of all examples."""
        return True

    @property
    def takes_context(self) -> bool:
        """True: rows of context can be left out of outputs and targets."""
        return True

    def denominator(self, batch: BatchTree) -> float:  # noqa: ARG002  # The protocol's.
        """Return 1: the loss is what it is."""
        return 1

    def run(
        self,
        passes: Passes,
        model: nn.Module,
        record: Record | None = None,  # noqa: ARG002  # The passes see the outputs themselves.
    ) -> None:
        """Compute all outputs before the loss."""
        passes.outputs_first(
            lambda mb: own_rows(self.forward, model, mb.batch, mb.context), self.loss
        )
