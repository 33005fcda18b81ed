"""The optimizer's step, taken whole or not at all."""

from collections.abc import Iterator, Mapping

from torch import Tensor
from torch.optim import Optimizer

from autobatch.devices.base import MemoryDevice
from autobatch.devices.failures import verdict_of
from autobatch.errors import StepInterruptedError
from autobatch.results import Verdict


def take_step(optimizer: Optimizer, device: MemoryDevice) -> None:
    """Take one optimizer step; if memory runs out before anything moved, try once more.

    Raises:
        StepInterruptedError: If memory ran out after a parameter or its state had moved.
    """
    if _stepped(optimizer):
        return
    device.release_cached()  # The failed attempt's temporaries are gone only now.
    if not _stepped(optimizer):
        raise StepInterruptedError(
            "memory ran out twice in the optimizer's step, before any parameter moved; its "
            "temporaries do not depend on the micro-batch: choose fused=True or foreach=False, or "
            "raise the limit"
        )


def _stepped(optimizer: Optimizer) -> bool:
    """Whether the step was taken. False: memory ran out, and everything is as it was."""
    before = _versions(optimizer)
    entries = {key: set(entry) for key, entry in optimizer.state.items()}
    try:
        optimizer.step()
    except Exception as error:
        if verdict_of(error) is not Verdict.OUT_OF_MEMORY:
            raise
    else:
        return True
    _forget_new_entries(optimizer, entries)
    if _versions(optimizer) != before:
        raise StepInterruptedError(
            "memory ran out with the optimizer's step half done: some parameters, or their "
            "state in the optimizer, have moved and others have not; go back to the last checkpoint"
        )
    return False


def _versions(optimizer: Optimizer) -> list[int]:
    """How often each parameter, and each tensor of its state, was written to."""
    return [tensor._version for tensor in _moving(optimizer)]


def _moving(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield parameter
            # .get: looking a missing one up would create it.
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor):
                    yield value


def _forget_new_entries(optimizer: Optimizer, entries: Mapping[Tensor, set[str]]) -> None:
    """Delete the state that the failed step had begun to make."""
    for key in list(optimizer.state):
        if key not in entries:
            del optimizer.state[key]
            continue
        for name in set(optimizer.state[key]) - entries[key]:
            del optimizer.state[key][name]
