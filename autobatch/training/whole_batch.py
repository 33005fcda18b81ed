"""Losses that compare examples with one another, exact in pieces: two forward passes.

The outputs of all micro-batches are made without a graph and joined, the loss of the whole gives
their gradient, and a second forward pass of each micro-batch, with the random numbers and the
buffers of the first, takes that gradient back to the parameters (Gao et al., 2021, "Scaling deep
contrastive learning batch size under memory limited setup").
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autobatch.batches.nest import Nest, cut, describe, join, map_tensors, size_of, tensors
from autobatch.errors import InexactStepError
from autobatch.randomness import Restore
from autobatch.training.accumulate import Terms
from autobatch.training.forward import Forward, standard_forward
from autobatch.training.ledger import Ledger
from autobatch.training.objective import Move, Witness
from autobatch.training.replay import Start

LossOfAll = Callable[[Nest, Nest], object]


class WholeBatch:
    """A loss ``(outputs, targets) -> scalar`` that is given the whole logical batch at once.

    Exact for any loss of outputs: contrastive, batch-hard, correlation. It costs a second forward
    pass, and memory for the outputs of all examples, wherever the batch is cut::

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

    def __call__(self, outputs: Nest, targets: Nest) -> Tensor:
        """Return the loss of the whole.

        Raises:
            TypeError: If it is no tensor without dimensions.
        """
        value = self.loss(outputs, targets)
        if not isinstance(value, Tensor) or value.ndim:
            raise TypeError(f"the loss of a whole batch must be a scalar, got {describe(value)}")
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """The objective of a ``WholeBatch``; ``accumulate_whole`` takes its gradient.

    Attributes:
        loss: Of all outputs and targets.
        forward: The user's, or None for the standard one.
    """

    loss: WholeBatch
    forward: Forward | None

    def settle(self, model: nn.Module, batch: Nest, move: Move, *, cut: bool) -> None:
        """Do nothing."""

    def denominator(self, batch: Nest) -> float:  # noqa: ARG002  # The protocol's.
        """Return 1: the loss is what it is."""
        return 1

    def encode(self, model: nn.Module, micro_batch: Nest, borrowed: int) -> tuple[Nest, Nest]:
        """Return outputs and targets, without those that are borrowed."""
        outputs, targets = (self.forward or standard_forward)(model, micro_batch)
        if not borrowed:
            return outputs, targets
        rows = (borrowed, size_of(micro_batch) - borrowed)
        return cut(outputs, rows)[1], cut(targets, rows)[1]

    def share(
        self,
        model: nn.Module,
        micro_batch: Nest,
        *,
        host: Nest,  # noqa: ARG002  # The protocol's.
        borrowed: int,
        witness: Witness | None,  # noqa: ARG002
    ) -> tuple[Tensor, Terms]:
        """Return the loss of a micro-batch that is the whole batch."""
        return self.loss(*self.encode(model, micro_batch, borrowed)), None


Feed = Callable[[], Iterable[tuple[Nest, int]]]


def accumulate_whole(
    feed: Feed,
    encode: Callable[[Nest, int], tuple[Nest, Nest]],
    loss: Callable[[Nest, Nest], Tensor],
    *,
    start: Callable[[], Start],
    random: Callable[[], Restore],
    ledger: Ledger,
    scaled: Callable[[Tensor], Tensor] | None = None,
    after_backward: Callable[[], None] | None = None,
    second_pass: Callable[[], object] = lambda: None,
) -> None:
    """Add the gradient of ``loss`` over all outputs to every ``.grad``.

    Args:
        feed: Begins the micro-batches, each on the device and with what it borrows; called twice.
        encode: Returns a micro-batch's outputs and targets.
        loss: Of all of them.
        start: Takes what a forward pass moves, so that it can be put back.
        random: The same for random generators only.
        ledger: Is told the loss.
        scaled: Multiplies what a backward pass begins with, as a GradScaler does.
        after_backward: Called after each backward pass.
        second_pass: Called when the passes that count begin.
    """
    before = start()
    with torch.no_grad():
        pairs = [encode(micro_batch, borrowed) for micro_batch, borrowed in feed()]
    # What autocast kept of the weights knows no gradient (pytorch#48049).
    torch.clear_autocast_cache()
    shapes = [[tensor.shape for tensor in _floating(outputs)] for outputs, _ in pairs]
    gradients = _gradients(pairs, loss, ledger, scaled, after_backward)
    at_the_end = random()
    before.put_back()
    second_pass()
    for place, (micro_batch, borrowed) in enumerate(feed()):
        outputs = _floating(encode(micro_batch, borrowed)[0])
        del micro_batch
        if [tensor.shape for tensor in outputs] != shapes[place]:
            raise InexactStepError(
                "a WholeBatch runs the model twice, and its outputs differ: shapes "
                f"{shapes[place]} first, {[t.shape for t in outputs]} then; it must depend on "
                "nothing but its inputs, its buffers and random numbers"
            )
        _backward(outputs, gradients[place], first=place == 0)
        del outputs
        if after_backward is not None:
            after_backward()
    at_the_end()


def _gradients(
    pairs: list[tuple[Nest, Nest]],
    loss: Callable[[Nest, Nest], Tensor],
    ledger: Ledger,
    scaled: Callable[[Tensor], Tensor] | None,
    after_backward: Callable[[], None] | None,
) -> list[list[Tensor | None]]:
    """The loss's gradient for each floating tensor of the outputs, by micro-batch."""
    sizes = [size_of(outputs) for outputs, _ in pairs]
    leaves: list[Tensor] = []

    def grown(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        leaves.append(tensor.detach().requires_grad_())
        return leaves[-1]

    outputs, targets = _joined(pairs)
    pairs.clear()  # Joined, they lie here once more.
    value = loss(map_tensors(grown, outputs), targets)
    ledger.add(value.detach(), None)
    if value.requires_grad:
        seed = torch.ones_like(value)
        # Into .grad, for the loss may have parameters of its own.
        value.backward(gradient=seed if scaled is None else scaled(seed))
        if after_backward is not None:
            after_backward()
    found = [_by_part(leaf.grad, sizes) for leaf in leaves]
    return [[row[place] for row in found] for place in range(len(sizes))]


def _joined(pairs: Sequence[tuple[Nest, Nest]]) -> tuple[Nest, Nest]:
    try:
        joined = join(pairs)
    except ValueError as error:
        raise InexactStepError(
            f"the outputs or targets of a WholeBatch cannot be joined: {error}; return from "
            "forward= only what the loss needs, one row an example"
        ) from error
    assert isinstance(joined, tuple), "outputs and targets were joined as pairs"
    return joined[0], joined[1]


def _by_part(gradient: Tensor | None, sizes: Sequence[int]) -> Sequence[Tensor | None]:
    if gradient is None or not gradient.ndim:
        return [gradient] * len(sizes)
    return list(gradient.split(list(sizes)))


def _floating(nest: Nest) -> list[Tensor]:
    return [tensor for tensor in tensors(nest) if tensor.is_floating_point()]


def _backward(
    outputs: Sequence[Tensor], gradients: Sequence[Tensor | None], *, first: bool
) -> None:
    """Take the gradients of one micro-batch's outputs back to the parameters."""
    pairs = [
        (output, gradient.to(output.dtype))
        for output, gradient in zip(outputs, gradients, strict=True)
        # A scalar is one for all micro-batches: its gradient counts once.
        if gradient is not None and output.requires_grad and (first or output.ndim)
    ]
    if pairs:
        torch.autograd.backward([output for output, _ in pairs], [g for _, g in pairs])
