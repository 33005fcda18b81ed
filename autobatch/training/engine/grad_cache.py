"""The gradient of a loss over all outputs of a logical batch, by gradient caching.

Gao et al., 2021: a forward pass without a graph computes the outputs of all micro-batches, the loss
of all outputs gives their gradients, and a second forward pass takes these back to the parameters.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest

import torch
from torch import Tensor

from autobatch.data.tree import BatchTree, join, map_tensors, size_of, tensors
from autobatch.errors import InexactStepError
from autobatch.state.rng import Restore
from autobatch.training.engine.loss_record import LossRecord
from autobatch.training.losses.objective import Encode, FullBatchLoss, MicroBatch
from autobatch.training.model_state.window_snapshot import WindowSnapshot

MicroBatches = Callable[[], Iterable[MicroBatch]]


def accumulate_cached(
    micro_batches: MicroBatches,
    encode: Encode,
    loss: FullBatchLoss,
    *,
    snapshot: Callable[[], WindowSnapshot],
    random_state: Callable[[], Restore],
    losses: LossRecord,
    scale: Callable[[Tensor], Tensor] | None = None,
    after_backward: Callable[[], None] | None = None,
    before_second_pass: Callable[[], object] = lambda: None,
) -> None:
    """Add the gradient of ``loss`` over all outputs to every ``.grad``.

    Args:
        micro_batches: Returns the micro-batches on the device; called once for each pass.
        encode: Returns the outputs and the targets of a micro-batch.
        loss: Returns the loss of all outputs and all targets.
        snapshot: Copies what a forward pass changes.
        random_state: Copies the state of the random generators only.
        losses: Records the loss.
        scale: Multiplies the gradient that a backward pass starts with, as a GradScaler does.
        after_backward: Called after each backward pass.
        before_second_pass: Called before the second pass.
    """
    before = snapshot()
    pairs, depends = _first_pass(micro_batches, encode)
    # Autocast may have cached casts of the weights that have no graph (pytorch#48049).
    torch.clear_autocast_cache()
    shapes = [[tensor.shape for tensor in tensors(pair)] for pair in pairs]
    gradients = _output_gradients(pairs, depends, loss, losses, scale)
    restore_random_after_loss = random_state()
    # The scaler is not restored: it keeps what it has made for scaling the loss.
    before.restore_model()
    before.restore_random()
    before_second_pass()
    for index, micro_batch in enumerate(micro_batches()):
        outputs = list(tensors(encode(micro_batch)))
        del micro_batch
        _check_outputs(outputs, shapes[index], depends)
        _backward(outputs, gradients[index], first=index == 0)
        del outputs
        if after_backward is not None:
            after_backward()
    restore_random_after_loss()


def _first_pass(
    micro_batches: MicroBatches, encode: Encode
) -> tuple[list[tuple[BatchTree, BatchTree]], list[bool]]:
    """Return the outputs and targets of each micro-batch, and which tensors need a gradient."""
    pairs: list[tuple[BatchTree, BatchTree]] = []
    depends: list[bool] = []
    for micro_batch in micro_batches():
        # Only the first graph is built, to see which tensors depend on parameters; targets may too.
        with torch.set_grad_enabled(not pairs):
            outputs, targets = encode(micro_batch)
        if not pairs:
            depends = [tensor.requires_grad for tensor in tensors((outputs, targets))]
        pairs.append((map_tensors(Tensor.detach, outputs), map_tensors(Tensor.detach, targets)))
        del micro_batch, outputs, targets
    return pairs, depends


def _check_outputs(
    outputs: Sequence[Tensor], first_shapes: Sequence[torch.Size], depends: Sequence[bool]
) -> None:
    """Refuse outputs of the second pass that differ in kind from those of the first pass."""
    shapes = [tensor.shape for tensor in outputs]
    depends_now = [tensor.requires_grad for tensor in outputs]
    more_depend = any(now and not first for now, first in zip_longest(depends_now, depends))
    if shapes != first_shapes or more_depend:
        others = ", and others depend on parameters" if more_depend else ""
        raise InexactStepError(
            f"a WholeBatch runs the model twice, and its outputs differ: shapes {first_shapes} "
            f"first, {shapes} then{others}; it must depend on nothing but its inputs, its buffers "
            "and random numbers"
        )


def _output_gradients(
    pairs: list[tuple[BatchTree, BatchTree]],
    depends: Sequence[bool],
    loss: FullBatchLoss,
    losses: LossRecord,
    scale: Callable[[Tensor], Tensor] | None,
) -> list[list[Tensor | None]]:
    """Return the loss's gradients for the tensors of each micro-batch; None where none is needed.

    ``pairs`` is emptied, to save memory.
    """
    leaves: list[Tensor | None] = []

    def leaf(tensor: Tensor) -> Tensor:
        if len(leaves) < len(depends):
            needs_gradient = depends[len(leaves)]
            leaves.append(tensor.detach().requires_grad_() if needs_gradient else None)
            return tensor if leaves[-1] is None else leaves[-1]
        return tensor

    outputs, targets = joined(pairs)
    sizes = [size_of(pair) for pair in pairs]
    pairs.clear()  # The joined tensors are copies.
    value = loss(map_tensors(leaf, outputs), map_tensors(leaf, targets))
    losses.add(value.detach(), None)
    if value.requires_grad:
        start = torch.ones_like(value)
        # backward(), not autograd.grad(), because the loss may have parameters of its own.
        value.backward(gradient=start if scale is None else scale(start))
    rows = [_by_micro_batch(None if one is None else one.grad, sizes) for one in leaves]
    return [[row[index] for row in rows] for index in range(len(sizes))]


def joined(pairs: Sequence[tuple[BatchTree, BatchTree]]) -> tuple[BatchTree, BatchTree]:
    """Return the outputs and the targets of all micro-batches.

    Raises:
        InexactStepError: If they cannot be joined.
    """
    try:
        both = join(pairs)
    except ValueError as error:
        raise InexactStepError(
            f"the outputs or targets of a WholeBatch cannot be joined: {error}; return from "
            "forward= only what the loss needs, one row an example"
        ) from error
    assert isinstance(both, tuple), "outputs and targets were joined as pairs"
    return both[0], both[1]


def _by_micro_batch(gradient: Tensor | None, sizes: Sequence[int]) -> Sequence[Tensor | None]:
    if gradient is None or not gradient.ndim:
        return [gradient] * len(sizes)
    return list(gradient.split(list(sizes)))


def _backward(
    outputs: Sequence[Tensor], gradients: Sequence[Tensor | None], *, first: bool
) -> None:
    """Backpropagate the gradients of one micro-batch's outputs to the parameters."""
    pairs = [
        (output, gradient)
        # There are fewer gradients than tensors where targets come from the data.
        for output, gradient in zip(outputs, gradients, strict=False)
        # A scalar is the same for all micro-batches, so its gradient counts once.
        if gradient is not None and output.requires_grad and (first or output.ndim)
    ]
    if pairs:
        torch.autograd.backward([output for output, _ in pairs], [g for _, g in pairs])
