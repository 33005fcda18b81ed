"""Running a window again, from its beginning, with smaller micro-batches."""

import torch
from torch import nn

from autobatch.randomness import Restore, random_state


def window_start(model: nn.Module) -> Restore:
    """Take what a forward pass moves, buffers and random generators.

    Returns:
        A function that puts them back.
    """
    buffers = [
        (child, name, buffer, buffer.clone())
        for child in model.modules()
        for name, buffer in child._buffers.items()
        if buffer is not None
    ]
    put_generators_back = random_state()

    @torch.no_grad()
    def put_back() -> None:
        for child, name, buffer, values in buffers:
            buffer.copy_(values)
            child._buffers[name] = buffer
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
