"""How a batch enters the model, and what the output is compared with."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from torch import Tensor, nn

from autobatch.data.tree import BatchTree, cut, describe, size_of
from autobatch.errors import InexactStepError

Forward = Callable[
    [nn.Module, Any], tuple[BatchTree, BatchTree]
]  # The batch is the user's structure.

_TARGET_KEYS: Final = ("labels", "target")


def targets_of(batch: BatchTree) -> BatchTree:
    """Return what the outputs for ``batch`` are compared with.

    That is the last of a tuple or list of two or more, and the key ``labels`` or ``target`` of a
    mapping.

    Raises:
        TypeError: If the batch is of another kind.
    """
    return _taken_apart(batch)[1]


def standard_forward(model: nn.Module, batch: BatchTree) -> tuple[BatchTree, BatchTree]:
    """Return the outputs for ``batch``, and its targets.

    ``(x, y)`` calls ``model(x)``, more items ``model(*batch[:-1])``, a mapping
    ``model(**batch)`` without its target.
    """
    if type(batch) is tuple and len(batch) == 2:  # The commonest, and done for every micro-batch.
        return model(batch[0]), batch[1]
    inputs, targets = _taken_apart(batch)
    if isinstance(inputs, dict):
        return model(**inputs), targets
    assert isinstance(inputs, tuple)
    return model(*inputs), targets


def run_forward(
    forward: Forward | None, model: nn.Module, batch: BatchTree
) -> tuple[BatchTree, BatchTree]:
    """Return outputs and targets by the user's ``forward``, or by the standard one if it is None.

    Raises:
        TypeError: If the user's returns something else.
    """
    if forward is None:
        return standard_forward(model, batch)
    made: object = forward(model, batch)
    if not isinstance(made, tuple | list) or len(made) != 2:
        raise TypeError(f"forward must return (outputs, targets), got {describe(made)}")
    return made[0], made[1]


def outputs_of(model: nn.Module, batch: BatchTree) -> BatchTree:
    """Return the outputs for a batch that may lack targets: then all of it is inputs."""
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Mapping) and not any(key in batch for key in _TARGET_KEYS):
        return model(**batch)
    if isinstance(batch, tuple | list) and len(batch) == 1:
        return model(*batch)
    return standard_forward(model, batch)[0]


def own_rows(
    forward: Forward | None, model: nn.Module, micro_batch: BatchTree, borrowed: int
) -> tuple[BatchTree, BatchTree]:
    """Return outputs and targets by the user's ``forward`` or the standard one.

    Args:
        forward: None for the standard one.
        model: Run once.
        micro_batch: On the device.
        borrowed: Examples at its beginning that are a neighbour's: their rows are left out. Only a
            single example borrows.

    Raises:
        InexactStepError: If nothing tells which rows those are.
    """
    outputs, targets = run_forward(forward, model, micro_batch)
    if not borrowed:
        return outputs, targets
    rows = size_of((outputs, targets))
    if rows != borrowed + 1:
        raise InexactStepError(
            f"a single example borrowed {borrowed} from its neighbour, for BatchNorm can do "
            f"nothing with one, and forward= returned {rows} rows for them: nothing tells whose "
            "they are; choose sizes that leave no example alone, drop_last=True, or "
            'batch_norm="frozen"'
        )
    return cut(outputs, (borrowed, 1))[1], cut(targets, (borrowed, 1))[1]


def _taken_apart(batch: BatchTree) -> tuple[BatchTree, BatchTree]:
    """Inputs (a tuple of arguments or a dict of keyword arguments) and targets."""
    if isinstance(batch, tuple | list) and len(batch) >= 2:  # First: the commonest.
        return tuple(batch[:-1]), batch[-1]
    if isinstance(batch, Mapping):
        present = [key for key in _TARGET_KEYS if key in batch]
        if len(present) == 1:
            return {k: v for k, v in batch.items() if k != present[0]}, batch[present[0]]
    what = f"a {type(batch).__name__}" if isinstance(batch, Tensor) else describe(batch)
    raise TypeError(
        f"a batch must be (inputs, ..., target) or a mapping with one of {_TARGET_KEYS}, "
        f"got {what}; pass forward=(model, batch) -> (outputs, targets) for any other"
    )
