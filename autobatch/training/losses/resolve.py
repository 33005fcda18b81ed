"""From the user's loss to an objective: the only module that knows every kind of loss."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from torch import nn

from autobatch.training.losses.builtin import InferredLoss, builtin_functional, builtin_module
from autobatch.training.losses.callable import CallableLoss
from autobatch.training.losses.forward import Forward
from autobatch.training.losses.inferred import InferredObjective
from autobatch.training.losses.loss import Loss
from autobatch.training.losses.objective import Objective
from autobatch.training.losses.supervised import SupervisedObjective


@runtime_checkable
class LossKind(Protocol):
    """A loss that brings its own objective, as ``WholeBatch`` and ``BatchLoss`` do.

    A new kind of loss is a class with these two members, and an objective.
    """

    @property
    def module(self) -> nn.Module | None:
        """The module whose parameters and buffers belong to the loss, or None."""

    def objective(self, forward: Forward | None) -> Objective:
        """Return what training minimizes.

        Args:
            forward: The user's ``(model, batch) -> (outputs, targets)``, or None.

        Raises:
            TypeError: If the loss cannot be used with ``forward``.
        """


LossLike = Callable[..., object] | LossKind


def resolve_objective(loss: LossLike | None, forward: Forward | None) -> Objective:
    """Return a new objective for what the user passed.

    Args:
        loss: A loss of torch, any callable ``(outputs, targets)``, a ``LossKind``, or None.
        forward: The user's ``(model, batch) -> (outputs, targets)``, or None.

    Raises:
        TypeError, ValueError: If ``loss`` is no loss, or cannot be exact in parts.
    """
    if isinstance(loss, LossKind) and not isinstance(loss, type):
        return loss.objective(forward)
    supervised = SupervisedObjective(loss=resolve_loss(loss), forward=forward)
    if loss is None and forward is None:
        return InferredObjective(otherwise=supervised)
    return supervised


def loss_module(loss: LossLike | None) -> nn.Module | None:
    """Return the module whose parameters belong to a loss; None if there is none."""
    if isinstance(loss, nn.Module):
        return loss
    return loss.module if isinstance(loss, LossKind) and not isinstance(loss, type) else None


def resolve_loss(loss: object) -> Loss:
    """Return the ``Loss`` of what the user passed; None is inferred from the targets of each batch.

    The settings and buffers of a module are read at every use, the settings of a partial here.

    Raises:
        TypeError: If ``loss`` is not callable or can never be exact: ``reduction="none"``,
            ``size_average`` or ``reduce``, a partial that binds outputs or targets.
        ValueError: If torch does not know the reduction.
    """
    if loss is None:
        return InferredLoss()
    if isinstance(loss, type):
        raise TypeError(f"loss must be an instance, got the class {loss.__name__}: call it first")
    if not callable(loss):
        raise TypeError(f"loss must be a callable (outputs, targets) or None, got {loss!r}")
    known = builtin_module(loss) if isinstance(loss, nn.Module) else builtin_functional(loss)
    return known or CallableLoss(loss)
