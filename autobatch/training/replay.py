"""Running a window again, from its beginning, with smaller micro-batches."""

from collections.abc import Iterable
from typing import Final

import torch
from torch import Tensor, nn

from autobatch.randomness import Restore, random_state
from autobatch.state import contents_of, reachable

# What every module has; of these a forward pass moves only buffers.
_STANDARD: Final = frozenset(vars(nn.Module()))
_FIXED: Final = frozenset({int, float, bool, str, type(None), torch.Size, torch.dtype})


def window_start(model: nn.Module, generators: Iterable[object] = ()) -> Restore:
    """Take what a forward pass may move: buffers, plain attributes and random generators.

    The copies lie beside the originals, on the device. A window starts often: for a layer of torch
    this costs a look at its attributes.

    Args:
        model: Parameters are left out: only the optimizer moves them, after the window.
        generators: The model's own ones.

    Returns:
        A function that puts everything back.
    """
    attributes = []
    containers: list[object] = []
    for module in model.modules():
        own = vars(module)
        attributes.append((own, dict(own)))
        if own.get("_buffers"):
            containers.append(own["_buffers"])
        containers += [
            value
            for name, value in own.items()
            if type(value) not in _FIXED and name not in _STANDARD
        ]
    moving = reachable(containers)
    put_contents_back = contents_of(moving)
    tensors = [
        found
        for found in moving
        if isinstance(found, Tensor) and not isinstance(found, nn.Parameter)
    ]
    values = _copies(tensors)
    put_generators_back = random_state(generators)

    @torch.no_grad()
    def put_back() -> None:
        for own, before in attributes:
            own.clear()
            own.update(before)
        put_contents_back()
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)
        put_generators_back()

    return put_back


@torch.no_grad()
def _copies(tensors: list[Tensor]) -> list[Tensor]:
    """A copy of each, bit for bit; most are BatchNorm's, and are copied in one call."""
    alike = [t for t in tensors if t.dtype is torch.float32 and t.layout is torch.strided]
    copied = iter(torch._foreach_mul(alike, 1.0) if alike else ())
    chosen = {id(tensor) for tensor in alike}
    return [next(copied) if id(t) in chosen else t.detach().clone() for t in tensors]


def smaller_size(examples: int, size: int, failures: int) -> int:
    """Return the size to try after ``size`` did not fit: a smaller one, or 1 again after 1.

    The first failure in a window adds one micro-batch to it, the next two, then four: the step is
    small where memory is just short, and a size far too large still comes down in a few replays.

    Args:
        examples: In the logical batch.
        size: The micro-batch size that failed.
        failures: In this window, this one counted.
    """
    steps = -(-examples // size) + (1 << (failures - 1))
    return max(1, min(size - 1, -(-examples // steps)))
