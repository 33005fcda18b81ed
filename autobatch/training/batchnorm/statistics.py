"""BatchNorm's running statistics: copied before a logical batch, restored, and filled."""

from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

STATISTICS: Final = ("running_mean", "running_var", "num_batches_tracked")

Buffers = Mapping[str, Tensor | None]


class RunningStatistics:
    """A copy of the layers' running statistics, from which they are restored or updated.

    Args:
        layers: In training mode, with running statistics, all on one device.

    Attributes:
        layers: As passed.
        buffers: Each layer's running mean, running variance and number of batches.
        channels: The length of each tensor in ``tensors``.
        tensors: The running means of all layers, then the running variances: the buffers
            themselves.
        values: A copy of ``tensors``, concatenated; of shape ``(sum(channels),)``.
        count_tensors: The buffers ``num_batches_tracked`` of the layers that have one.
        counts: A copy of ``count_tensors``, stacked.
    """

    def __init__(self, layers: Sequence[_BatchNorm]) -> None:
        self.layers = layers
        self.buffers: list[dict[str, Tensor | None]] = [
            {name: layer._buffers[name] for name in STATISTICS} for layer in layers
        ]
        self.channels = tuple(layer.num_features for layer in layers) * 2
        pairs = list(map(mean_and_variance, self.buffers))
        self.tensors = [mean for mean, _ in pairs] + [variance for _, variance in pairs]
        self.values = torch.cat(self.tensors)
        counts = map(number_of_batches, self.buffers)
        self.count_tensors = [count for count in counts if count is not None]
        self.counts = torch.stack(self.count_tensors) if self.count_tensors else self.values[:0]

    def restore(self) -> None:
        """Give the layers their own buffers again, with the values of the copy."""
        self.rebind()
        self.restore_counts()
        self.fill(self.values)

    def rebind(self) -> None:
        """Give the layers their own buffers again; older versions of torch replaced them."""
        for layer, buffers in zip(self.layers, self.buffers, strict=True):
            layer._buffers.update(buffers)

    def are_bound(self) -> bool:
        """Return whether every layer still has its own running mean."""
        means = zip(self.layers, self.tensors, strict=False)  # The second half are variances.
        return all(layer._buffers["running_mean"] is mean for layer, mean in means)

    def restore_counts(self) -> None:
        """Restore the layers' numbers of batches."""
        if self.count_tensors:
            torch._foreach_copy_(self.count_tensors, self.counts.unbind())

    def add_counts(self, calls: Sequence[int]) -> None:
        """Add each layer's calls to its number of batches."""
        if not self.count_tensors:
            return
        if len(set(calls)) == 1:
            torch._foreach_add_(self.count_tensors, calls[0])
        else:
            pairs = zip(calls, self.buffers, strict=True)
            counted = [n for n, own in pairs if number_of_batches(own) is not None]
            torch._foreach_add_(self.count_tensors, counted)

    def fill(self, values: Tensor) -> None:
        """Fill the layers' buffers with means and variances, laid out as ``self.values``."""
        torch._foreach_copy_(self.tensors, values.split(self.channels))

    def versions(self) -> list[int]:
        """Return how often each layer's number of batches was written to."""
        counts = map(number_of_batches, self.buffers)
        return [0 if count is None else count._version for count in counts]

    def counted(self) -> list[int]:
        """Return how many batches each layer has counted since the copy; waits for the device."""
        if not self.count_tensors:
            return [0] * len(self.layers)
        added = iter((torch.stack(self.count_tensors) - self.counts).tolist())
        return [0 if number_of_batches(own) is None else next(added) for own in self.buffers]


def number_of_batches(buffers: Buffers) -> Tensor | None:
    """Return the number of batches among a layer's buffers, if the layer counts them."""
    return buffers["num_batches_tracked"]


def mean_and_variance(buffers: Buffers) -> tuple[Tensor, Tensor]:
    """Return the running mean and the running variance among a layer's buffers."""
    mean, variance = buffers["running_mean"], buffers["running_var"]
    assert mean is not None
    assert variance is not None
    return mean, variance
