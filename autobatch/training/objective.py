"""How a micro-batch becomes a summed loss, and what a logical batch's sums are divided by."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from autobatch.batches.nest import Nest, size_of
from autobatch.batches.pieces import pieces_of
from autobatch.training.accumulate import Terms
from autobatch.training.forward import Forward, own_rows, run_forward, targets_of
from autobatch.training.mixing import MixingCheck
from autobatch.training.summed import Loss

Move = Callable[[Nest], Nest]
Witness = Callable[[Nest, Nest], None]
Share = Callable[[tuple[Nest, Nest, int]], tuple[Tensor, Terms]]  # On the device, host, borrowed.


class Objective(Protocol):
    """What is made smaller: a sum for each micro-batch, and the logical batch's denominator.

    Those that derive from it learn nothing, unless they say otherwise.
    """

    def apart(self) -> "Objective":
        """Return one that knows the same, and whatever it learns does not reach this one."""
        return self

    def learnt(self) -> dict[str, object]:
        """Return what ``relearn`` takes: plain values."""
        return {}

    def relearn(self, learnt: Mapping[str, Any]) -> None:  # noqa: ARG002  # Nothing was learnt.
        """Know what was learnt before a checkpoint was written."""
        return

    def settle(self, model: nn.Module, batch: Nest, move: Move, *, cut: bool) -> None:
        """Learn from a logical batch what has to be known before its first backward pass.

        Args:
            model: On the device.
            batch: On the host, or wherever it is.
            move: Returns a copy on the device.
            cut: Whether it is to be cut.
        """

    def denominator(self, batch: Nest) -> float:
        """Return what the logical batch's summed loss is divided by; 0 if no term is valid.

        Where only the loss knows, it is the examples: the gradient is rescaled at the end.
        """

    def share(
        self,
        model: nn.Module,
        micro_batch: Nest,
        *,
        host: Nest,
        borrowed: int,
        witness: Witness | None,
    ) -> tuple[Tensor, Terms]:
        """Return the summed loss of a micro-batch, and its terms where only the loss knows them.

        Args:
            model: Run forward once.
            micro_batch: On the device.
            host: The same where it came from, so that counting it waits for nothing.
            borrowed: Examples at its beginning that have been counted before: they are there for
                a layer that normalises by the batch.
            witness: Is shown the outputs and targets, if there are some.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared(Objective):
    """Outputs of the model, compared with targets by a loss.

    Attributes:
        loss: Resolved.
        forward: The user's, or None for the standard one.
        mixing: Whether the model mixes examples; None does not ask.
    """

    loss: Loss
    forward: Forward | None
    mixing: MixingCheck | None = field(default_factory=MixingCheck)

    @property
    def reads_targets(self) -> bool:
        """Whether a loss of torch's compares what the standard forward gives."""
        return self.forward is None and not self.loss.checked

    @property
    def may_widen(self) -> bool:
        """Whether a loss of torch's takes the mean of what a ``forward`` makes, however wide."""
        return self.forward is not None and not self.loss.checked and self.loss.divides

    def apart(self) -> "Compared":
        """Return one that asks nothing of the model."""
        return Compared(loss=self.loss, forward=self.forward, mixing=None)

    def settle(self, model: nn.Module, batch: Nest, move: Move, *, cut: bool) -> None:
        """Hold the model to treating each example by itself, where that matters."""
        if not cut or self.mixing is None:
            return
        self.mixing.ask(model, lambda nest: run_forward(self.forward, model, move(nest))[0], batch)

    def denominator(self, batch: Nest) -> float:
        """Return what the loss divides by; the examples where a ``forward`` makes the targets."""
        if not self.loss.divides:
            return 1
        if self.forward is not None:
            return size_of(batch)
        pieces = pieces_of(batch)
        return sum(self.loss.denominator(targets_of(piece), size_of(piece)) for piece in pieces)

    def share(
        self,
        model: nn.Module,
        micro_batch: Nest,
        *,
        host: Nest,
        borrowed: int,
        witness: Witness | None,
    ) -> tuple[Tensor, Terms]:
        """Return the summed loss of the outputs."""
        outputs, targets = own_rows(self.forward, model, micro_batch, borrowed)
        known = self.forward is None and not self.loss.checked  # It does not ask how many.
        examples = 0 if known else size_of(host) - borrowed  # There, what is shared is marked.
        if self.forward is not None and self.loss.checked:
            examples = _rows(outputs, targets, examples)
        if witness is not None:
            witness(outputs, targets)
        loss_sum, terms = self.loss.summed(outputs, targets, examples)
        if self.forward is not None and terms is None and self.loss.divides:
            terms = self.loss.terms(targets, examples)
        return loss_sum, terms

    def quick_share(self, model: nn.Module) -> Share | None:
        """Return ``share`` for one window, with what does not change in it looked up once.

        A small net's micro-batch takes 70 microseconds: what it does not need is not asked. None
        where something is.
        """
        if not self.reads_targets:
            return None
        summed = self.loss.for_window()

        def share(micro_batch: tuple[Nest, Nest, int]) -> tuple[Tensor, Terms]:
            nest, host, borrowed = micro_batch
            if borrowed or type(nest) is not tuple or len(nest) != 2:
                return self.share(model, nest, host=host, borrowed=borrowed, witness=None)
            return summed(model(nest[0]), nest[1], 0)

        return share


def _rows(outputs: Nest, targets: Nest, examples: int) -> int:
    """What a mean is over, of what a ``forward`` returns: its rows.

    Those need not be the examples: ``outputs[mask]`` has one for each valid token. Where nothing
    has rows, they are.
    """
    try:
        return size_of((outputs, targets))
    except ValueError:
        return examples
