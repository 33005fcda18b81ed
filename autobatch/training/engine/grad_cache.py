"""The gradient of a loss over all outputs, in two forward passes (gradient caching)."""

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

Prefetcher = Callable[[], Iterable[MicroBatch]]


def accumulate_cached(
    prefetcher: Prefetcher,
    encode: Encode,
    loss: FullBatchLoss,
    *,
    start: Callable[[], WindowSnapshot],
    random: Callable[[], Restore],
    ledger: LossRecord,
    scaled: Callable[[Tensor], Tensor] | None = None,
    after_backward: Callable[[], None] | None = None,
    second_pass: Callable[[], object] = lambda: None,
) -> None:
    """Add the gradient of ``loss`` over all outputs to every ``.grad``.

    Args:
        prefetcher: Begins the micro-batches, each on the device; called twice.
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
    pairs, depends = _first_pass(feed, encode)
    # What autocast kept of the weights may know no gradient (pytorch#48049).
    torch.clear_autocast_cache()
    shapes = [[found.shape for found in tensors(pair)] for pair in pairs]
    gradients = _gradients(pairs, depends, loss, ledger, scaled)
    at_the_end = random()
    before.model()
    before.random()  # And not the scaler: it has scaled, and keeps what it made for that.
    second_pass()
    for place, micro_batch in enumerate(feed()):
        found = list(tensors(encode(micro_batch)))
        del micro_batch
        _refuse_another_pass(found, shapes[place], depends)
        _backward(found, gradients[place], first=place == 0)
        del found
        if after_backward is not None:
            after_backward()
    at_the_end()


def _first_pass(
    prefetcher: Prefetcher, encode: Encode
) -> tuple[list[tuple[BatchTree, BatchTree]], list[bool]]:
    """Outputs and targets of every micro-batch; which of their tensors depend on a parameter."""
    pairs: list[tuple[BatchTree, BatchTree]] = []
    depends: list[bool] = []
    for micro_batch in feed():
        # The graph of the first one says it: a forward may make the targets of parameters too.
        with torch.set_grad_enabled(not pairs):
            outputs, targets = encode(micro_batch)
        if not pairs:
            depends = [tensor.requires_grad for tensor in tensors((outputs, targets))]
        pairs.append((map_tensors(Tensor.detach, outputs), map_tensors(Tensor.detach, targets)))
        del micro_batch, outputs, targets
    return pairs, depends


def _refuse_another_pass(
    found: Sequence[Tensor], shapes: Sequence[torch.Size], depends: Sequence[bool]
) -> None:
    now = [tensor.shape for tensor in found]
    depend = [tensor.requires_grad for tensor in found]
    unknown = any(more and not known for more, known in zip_longest(depend, depends))
    if now != shapes or unknown:
        raise InexactStepError(
            f"a WholeBatch runs the model twice, and its outputs differ: shapes {shapes} first, "
            f"{now} then{', and others depend on parameters' if unknown else ''}; it must depend "
            "on nothing but its inputs, its buffers and random numbers"
        )


def _gradients(
    pairs: list[tuple[BatchTree, BatchTree]],
    depends: Sequence[bool],
    loss: FullBatchLoss,
    ledger: LossRecord,
    scaled: Callable[[Tensor], Tensor] | None,
) -> list[list[Tensor | None]]:
    """By micro-batch, the loss's gradient for each tensor; None where none is needed."""
    leaves: list[Tensor | None] = []

    def grown(tensor: Tensor) -> Tensor:
        if len(leaves) < len(depends):
            wanted = depends[len(leaves)]
            leaves.append(tensor.detach().requires_grad_() if wanted else None)
            return tensor if leaves[-1] is None else leaves[-1]
        return tensor

    outputs, targets = joined(pairs)
    sizes = [size_of(pair) for pair in pairs]
    pairs.clear()  # Joined, they lie here once more.
    value = loss(map_tensors(grown, outputs), map_tensors(grown, targets))
    ledger.add(value.detach(), None)
    if value.requires_grad:
        seed = torch.ones_like(value)
        # Into .grad, for the loss may have parameters of its own.
        value.backward(gradient=seed if scaled is None else scaled(seed))
    found = [_by_part(None if leaf is None else leaf.grad, sizes) for leaf in leaves]
    return [[row[place] for row in found] for place in range(len(sizes))]


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


def _by_part(gradient: Tensor | None, sizes: Sequence[int]) -> Sequence[Tensor | None]:
    if gradient is None or not gradient.ndim:
        return [gradient] * len(sizes)
    return list(gradient.split(list(sizes)))


def _backward(found: Sequence[Tensor], gradients: Sequence[Tensor | None], *, first: bool) -> None:
    """Take the gradients of one micro-batch's outputs back to the parameters."""
    pairs = [
        (output, gradient)
        for output, gradient in zip(found, gradients, strict=False)  # Not of targets from the data.
        # A scalar is one for all micro-batches: its gradient counts once.
        if gradient is not None and output.requires_grad and (first or output.ndim)
    ]
    if pairs:
        torch.autograd.backward([output for output, _ in pairs], [g for _, g in pairs])
