"""From a batch to the model's outputs and the targets that they are compared with."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from torch import Tensor, nn

from autobatch.data.tree import BatchTree, cut, describe, size_of
from autobatch.errors import InexactStepError

# The user's own batch goes in; outputs and targets come out.
Forward = Callable[[nn.Module, Any], tuple[BatchTree, BatchTree]]

TARGET_KEYS: Final = ("labels", "target")
"""The keys under which a mapping may hold its targets."""


def targets_of(batch: BatchTree) -> BatchTree:
    """Return the targets of a batch.

    The targets are the last item of a tuple or list of two or more, or the value of the key
    ``labels`` or ``target`` of a mapping.

    Raises:
        TypeError: If the batch has another structure.
    """
    return _split_batch(batch)[1]


def standard_forward(model: nn.Module, batch: BatchTree) -> tuple[BatchTree, BatchTree]:
    """Return the model's outputs for a batch, and the targets of the batch.

    The inputs are all items but the last, ``model(*batch[:-1])``, or all keys of a mapping but the
    targets', ``model(**inputs)``.
    """
    if (
        type(batch) is tuple and len(batch) == 2
    ):  # The most common batch, on the path of each micro-batch.
        return model(batch[0]), batch[1]
    inputs, targets = _split_batch(batch)
    if isinstance(inputs, dict):
        return model(**inputs), targets
    assert isinstance(inputs, tuple)
    return model(*inputs), targets


def run_forward(
    forward: Forward | None, model: nn.Module, batch: BatchTree
) -> tuple[BatchTree, BatchTree]:
    """Return outputs and targets from the user's ``forward``, or the standard one if it is None.

    Raises:
        TypeError: If the user's function returns no pair.
    """
    if forward is None:
        return standard_forward(model, batch)
    result: object = forward(model, batch)
    if not isinstance(result, tuple | list) or len(result) != 2:
        raise TypeError(f"forward must return (outputs, targets), got {describe(result)}")
    return result[0], result[1]


def outputs_of(model: nn.Module, batch: BatchTree) -> BatchTree:
    """Return the model's outputs for a batch; without targets, the whole batch is inputs."""
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Mapping) and not any(key in batch for key in TARGET_KEYS):
        return model(**batch)
    if isinstance(batch, tuple | list) and len(batch) == 1:
        return model(*batch)
    return standard_forward(model, batch)[0]


def own_rows(
    forward: Forward | None, model: nn.Module, micro_batch: BatchTree, context: int
) -> tuple[BatchTree, BatchTree]:
    """Return outputs and targets of a micro-batch without the rows of its context examples.

    Args:
        forward: The user's function, or None for the standard one.
        model: Run once.
        micro_batch: On the device.
        context: Examples at the beginning that belong to another micro-batch. Only a micro-batch
            with a single example of its own has any.

    Raises:
        InexactStepError: If the number of rows does not show which rows belong to these examples.
    """
    outputs, targets = run_forward(forward, model, micro_batch)
    if not context:
        return outputs, targets
    rows = size_of((outputs, targets))
    if rows != context + 1:
        raise InexactStepError(
            "BatchNorm cannot normalize a single example, so the last example of a batch ran "
            f"together with {context} of the previous micro-batch. forward= returned {rows} rows "
            f"for these {context + 1} examples, so autobatch cannot tell which rows belong to the "
            "last example; choose sizes that leave no single example, drop_last=True, or "
            'batch_norm="frozen"'
        )
    return cut(outputs, (context, 1))[1], cut(targets, (context, 1))[1]


def _split_batch(batch: BatchTree) -> tuple[BatchTree, BatchTree]:
    """Return inputs (a tuple of arguments or a dict of keyword arguments) and targets."""
    if isinstance(batch, tuple | list) and len(batch) >= 2:  # The most common first.
        return tuple(batch[:-1]), batch[-1]
    if isinstance(batch, Mapping):
        present = [key for key in TARGET_KEYS if key in batch]
        if len(present) == 1:
            return {k: v for k, v in batch.items() if k != present[0]}, batch[present[0]]
    kind = f"a {type(batch).__name__}" if isinstance(batch, Tensor) else describe(batch)
    raise TypeError(
        f"a batch must be (inputs, ..., target) or a mapping with one of {TARGET_KEYS}, "
        f"got {kind}; pass forward=(model, batch) -> (outputs, targets) for any other"
    )
