"""One window: the gradient of one logical batch, from its micro-batches."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import _disable_current_modes

from autobatch.batches.nest import Nest, describe, map_tensors, part, size_of, tensors
from autobatch.devices.base import MemoryDevice
from autobatch.errors import InexactStepError
from autobatch.training.accumulate import Accumulated, Terms, accumulate, rescale
from autobatch.training.batch_norm import pooled_statistics
from autobatch.training.forward import Forward, standard_forward, targets_of
from autobatch.training.loss_check import check_splits
from autobatch.training.losses import Loss

NO_GRADIENT: Final = "no parameter received a gradient: the loss does not depend on the model"
CHECKED_BYTES: Final = 4 * 2**20  # The loss check keeps at most so many bytes of a window,
LARGEST_ROW_BYTES: Final = 2**29  # and one example of the first two micro-batches if not larger.

Witness = Callable[[Nest, Nest], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What a training step is made of. A trial and training follow the same one.

    Attributes:
        model: In training mode.
        optimizer: Over some or all of the model's parameters.
        loss: Resolved.
        forward: The user's, or None for the standard one.
        device: Where the model is.
    """

    model: nn.Module
    optimizer: Optimizer
    loss: Loss
    forward: Forward | None
    device: MemoryDevice

    def denominator(self, batch: Nest) -> float:
        """Return what the logical batch's summed loss is divided by before the backward passes.

        Zero means that no term is valid. Where a ``forward`` makes the targets they are not known
        yet, and it is the examples: the gradient is rescaled at the end.
        """
        examples = size_of(batch)
        if self.forward is not None:
            return examples if self.loss.divides else 1
        return self.loss.denominator(targets_of(batch), examples)

    def parameters(self) -> list[Tensor]:
        """Return every tensor whose ``.grad`` a step owns."""
        held = list(self.model.parameters())
        for group in self.optimizer.param_groups:
            held += group["params"]
        return list({id(parameter): parameter for parameter in held}.values())

    def gradients(self) -> Iterator[Tensor]:
        """Yield every gradient there is."""
        return (p.grad for p in self.parameters() if p.grad is not None)

    def clear(self) -> None:
        """Let go of every gradient."""
        for parameter in self.parameters():
            parameter.grad = None

    def accumulate(
        self, parts: Sequence[Nest], denominator: float, witness: Witness | None = None
    ) -> Accumulated:
        """Leave the logical batch's gradient in ``.grad``, which must be empty.

        Args:
            parts: The micro-batches, on the host.
            denominator: The logical batch's.
            witness: Is shown each micro-batch's detached outputs and its targets.
        """
        finite: list[Tensor] = []

        def share(micro_batch: Nest) -> tuple[Tensor, Terms]:
            pool.begin()
            outputs, targets = (self.forward or standard_forward)(self.model, micro_batch)
            pool.end()
            if witness is not None:
                witness(outputs, targets)
            examples = size_of(micro_batch)
            loss_sum, terms = self.loss.summed(outputs, targets, examples)
            if self.loss.checked:
                finite.append(loss_sum.detach().isfinite())
            if self.forward is not None and terms is None and self.loss.divides:
                terms = self.loss.denominator(targets, examples)
            return loss_sum, terms

        with pooled_statistics(self.model, len(parts)) as pool:
            done = accumulate(map(self.moved, parts), share, denominator=denominator)
        if finite:
            _refuse_partly_finite(torch.stack(finite))
        if done.terms is not None:
            terms = float(done.terms)  # An integer tensor would divide in single precision.
            if terms not in (0.0, denominator):
                rescale(list(self.gradients()), denominator / terms)
        return done

    def moved(self, nest: Nest) -> Nest:
        """Return a copy on the device: a model that works in place must not reach the original."""
        device = self.device.torch_device
        return map_tensors(lambda t: t.to(device, non_blocking=True, copy=True), nest)


@dataclass(slots=True)
class LossCheck:
    """Gathers a window's outputs, a bounded part of them, and holds the loss to the law.

    Attributes:
        recipe: Whose loss it is.
        micro_batches: How many the window has.
    """

    recipe: Recipe
    micro_batches: int
    outputs: list[Nest] = field(default_factory=list)
    targets: list[Nest] = field(default_factory=list)

    def witness(self, outputs: Nest, targets: Nest) -> None:
        """Keep the first rows of one micro-batch on the host, and off the device's meter."""
        examples = _common_length(outputs, targets)
        row_bytes = sum(t.nbytes for t in (*tensors(outputs), *tensors(targets))) / examples
        rows = int(CHECKED_BYTES / self.micro_batches / max(row_bytes, 1))
        if len(self.outputs) < 2 and row_bytes <= LARGEST_ROW_BYTES:
            rows = max(rows, 1)
        if rows:
            with _disable_current_modes():
                self.outputs.append(_on_host(part(outputs, 0, min(rows, examples))))
                self.targets.append(_on_host(part(targets, 0, min(rows, examples))))

    def settled(self) -> bool:
        """Return whether the loss was shown to be exact; False if it could not be judged.

        Called when the activations are gone and no limit holds: no search has rehearsed it.

        Raises:
            InexactStepError: If splitting changes the loss.
        """
        if len(self.outputs) < 2:
            return False
        try:
            outputs = list(map(self.recipe.moved, self.outputs))
            targets = list(map(self.recipe.moved, self.targets))
        except (torch.OutOfMemoryError, MemoryError):
            return False
        return check_splits(self.recipe.loss, outputs, targets)


def _refuse_partly_finite(finite: Tensor) -> None:
    """Refuse an unknown loss that is a number for some micro-batches only."""
    if bool(finite.any()) and not bool(finite.all()):
        raise InexactStepError(
            f"the loss is not finite for {int((~finite).sum())} of {len(finite)} micro-batches, as "
            "a mean over valid terms is where a micro-batch has none; return (sum, terms)"
        )


def _common_length(outputs: Nest, targets: Nest) -> int:
    try:
        return size_of((outputs, targets))
    except ValueError:
        raise InexactStepError(
            "a loss that autobatch does not know can be split only where outputs and targets hold "
            "one row an example along dimension 0, got outputs "
            f"{describe(outputs)} and targets {describe(targets)}; return such outputs from the "
            "model or from forward=, or use a loss of torch"
        ) from None


def _on_host(nest: Nest) -> Nest:
    return map_tensors(lambda t: t.detach().to("cpu", copy=True), nest)
