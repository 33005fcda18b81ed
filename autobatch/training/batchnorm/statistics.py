"""BatchNorm's running statistics: taken before a window, put back, and filled."""

from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

STATISTICS: Final = ("running_mean", "running_var", "num_batches_tracked")

Buffers = Mapping[str, Tensor | None]


class Statistics:
    """What layers have seen so far, taken: to be put back, and for a pool to go on from.

    Args:
        layers: In training, with running statistics, on one device.

    Attributes:
        buffers: Each layer's running mean, running variance and number of batches.
        channels: Of each mean, and then of each variance.
        own: All the means, and then all the variances.
        values: Theirs, in one row.
        numbers: Of batches; a layer need not have one.
        counts: Theirs, in one row.
    """

    def __init__(self, layers: Sequence[_BatchNorm]) -> None:
        self.layers = layers
        self.buffers: list[dict[str, Tensor | None]] = [
            {name: layer._buffers[name] for name in STATISTICS} for layer in layers
        ]
        self.channels = tuple(layer.num_features for layer in layers) * 2
        pairs = list(map(mean_and_variance, self.buffers))
        self.own = [mean for mean, _ in pairs] + [variance for _, variance in pairs]
        self.values = torch.cat(self.own)
        numbers = map(number_of_batches, self.buffers)
        self.numbers = [number for number in numbers if number is not None]
        self.counts = torch.stack(self.numbers) if self.numbers else self.values[:0]

    def put_back(self) -> None:
        """Give the layers their own buffers back, as they were."""
        self.bind()
        self.put_counts_back()
        self.fill(self.values)

    def bind(self) -> None:
        """Give the layers their own buffers back; earlier versions of torch had new ones."""
        for layer, own in zip(self.layers, self.buffers, strict=True):
            layer._buffers.update(own)

    def are_bound(self) -> bool:
        """Whether the layers' means are still their own."""
        means = zip(self.layers, self.own, strict=False)  # The second half are variances.
        return all(layer._buffers["running_mean"] is mean for layer, mean in means)

    def put_counts_back(self) -> None:
        """Give the layers their numbers of batches back."""
        if self.numbers:
            torch._foreach_copy_(self.numbers, self.counts.unbind())

    def add_counts(self, calls: Sequence[int]) -> None:
        """Add each layer's calls to its number of batches."""
        if not self.numbers:
            return
        if len(set(calls)) == 1:
            torch._foreach_add_(self.numbers, calls[0])
        else:
            pairs = zip(calls, self.buffers, strict=True)
            counted = [n for n, own in pairs if number_of_batches(own) is not None]
            torch._foreach_add_(self.numbers, counted)

    def fill(self, values: Tensor) -> None:
        """Fill the layers' own buffers with these means and variances."""
        torch._foreach_copy_(self.own, values.split(self.channels))

    def versions(self) -> list[int]:
        """Return how often each layer's number of batches was written to."""
        numbers = map(number_of_batches, self.buffers)
        return [0 if number is None else number._version for number in numbers]

    def counted(self) -> list[int]:
        """Wait for how many batches each layer has counted since."""
        if not self.numbers:
            return [0] * len(self.layers)
        moved = iter((torch.stack(self.numbers) - self.counts).tolist())
        return [0 if number_of_batches(own) is None else next(moved) for own in self.buffers]


def number_of_batches(buffers: Buffers) -> Tensor | None:
    """Return the number of batches of a layer's buffers, if it has one."""
    return buffers["num_batches_tracked"]


def mean_and_variance(buffers: Buffers) -> tuple[Tensor, Tensor]:
    """Return the running mean and variance of a layer's buffers."""
    mean, variance = buffers["running_mean"], buffers["running_var"]
    assert mean is not None
    assert variance is not None
    return mean, variance
