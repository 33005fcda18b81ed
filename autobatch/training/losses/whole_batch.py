"""Losses that compare examples with one another, exact in micro-batches by gradient caching.

The first forward pass computes the outputs of all micro-batches without a graph. The loss of the
joined outputs gives their gradient. A second forward pass of each micro-batch, with the random
numbers and the buffers of the first, propagates that gradient to the parameters (Gao et al., 2021,
"Scaling deep contrastive learning batch size under memory limited setup").
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from autobatch.data.tree import BatchTree, describe
from autobatch.training.losses.forward import Forward, own_rows
from autobatch.training.losses.objective import Objective, Passes, Record

LossOfAll = Callable[..., object]


class WholeBatch:
    """Train with a loss ``(outputs, targets) -> scalar`` of the whole logical batch.

    ``WholeBatch`` makes any loss that compares examples exact in micro-batches: contrastive,
    batch-hard triplet, correlation. A batch that is cut costs a second forward pass, and memory for
    the outputs of all examples.

    Args:
        loss: Takes the outputs and targets of the whole logical batch and returns the value to
            minimize, a tensor without dimensions; nothing divides it. Outputs have one row an
            example, for example embeddings ``(examples, features)``; the loss itself compares the
            rows. A scalar output, such as a temperature, is allowed too. A module may have
            parameters, which are trained.

    Raises:
        TypeError: ``loss`` is not callable.

    Example::

        def info_nce(outputs, targets):
            image, text = (F.normalize(rows) for rows in outputs)
            return F.cross_entropy(image @ text.T / 0.07, torch.arange(len(image)))

        find_and_train(model, pairs, desired=4096, loss=WholeBatch(info_nce))
    """

    def __init__(self, loss: LossOfAll) -> None:
        if isinstance(loss, type) or not callable(loss):
            raise TypeError(
                f"WholeBatch needs a callable (outputs, targets) -> scalar, got {loss!r}"
            )
        self.loss = loss

    @property
    def module(self) -> nn.Module | None:
        """The loss if it is a module, otherwise None."""
        return self.loss if isinstance(self.loss, nn.Module) else None

    def objective(self, forward: Forward | None) -> "WholeBatchObjective":
        """Return what training minimizes."""
        return WholeBatchObjective(loss=self, forward=forward)

    def __call__(self, outputs: BatchTree, targets: BatchTree) -> Tensor:
        """Return the loss of the whole logical batch.

        Raises:
            TypeError: If the loss is no tensor without dimensions.
        """
        value = self.loss(outputs, targets)
        if not isinstance(value, Tensor) or value.ndim:
            raise TypeError(f"the loss of a whole batch must be a scalar, got {describe(value)}")
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeBatchObjective(Objective):
    """The objective of a ``WholeBatch``; the engine computes its gradient by gradient caching.

    Attributes:
        loss: The loss of all outputs and targets.
        forward: The user's ``(model, batch) -> (outputs, targets)``, or None for the standard one.
    """

    loss: WholeBatch
    forward: Forward | None

    @property
    def needs_full_batch(self) -> bool:
        """True: the loss compares the outputs of all examples."""
        return True

    @property
    def takes_context(self) -> bool:
        """True: the rows of context examples can be removed from outputs and targets."""
        return True

    def denominator(self, batch: BatchTree) -> float:  # noqa: ARG002  # The protocol has it.
        """Return 1: nothing divides the loss."""
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
