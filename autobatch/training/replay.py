"""Running a window again, from its beginning, with smaller micro-batches."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from autobatch.randomness import Restore, random_state
from autobatch.state import attributes_of, reachable


def window_start(model: nn.Module, generators: Iterable[object] = ()) -> Restore:
    """Take what a forward pass may move: buffers, plain attributes and random generators.

    The copies lie beside the originals, on the device: a window starts often.

    Args:
        model: Parameters are left out: only the optimizer moves them, after the window.
        generators: The model's own ones.

    Returns:
        A function that puts everything back.
    """
    modules = list(model.modules())
    attributes = [attributes_of(module) for module in modules]
    tensors = [
        (tensor, tensor.detach().clone())
        for module in modules
        for tensor in reachable(vars(module).values())
        if isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter)
    ]
    put_generators_back = random_state(generators)

    @torch.no_grad()
    def put_back() -> None:
        for restore in attributes:
            restore()
        for tensor, values in tensors:
            tensor.copy_(values)
        put_generators_back()

    return put_back


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
