"""BatchNorm's running statistics over a window that is cut: those of the whole batch, moved once.

Left alone, a layer would move its running statistics once a micro-batch, with its full momentum
each time. Here its momentum is 1 while the window runs, so that each forward pass hands out the
mean and the unbiased variance of what it saw. They are pooled (Chan et al., 1979: the variance
between micro-batches belongs to it), and applied once with the layer's own momentum. For a layer
whose inputs are the undivided batch's that is what the undivided batch would have done.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def pooled_statistics(model: nn.Module, micro_batches: int) -> Iterator["Pool"]:
    """Pool the running statistics of every BatchNorm in training inside; apply them at the end.

    After an error nothing is applied: momentum is put back, the statistics are the caller's to
    restore. A window of one micro-batch is left to the layers themselves.

    Args:
        model: In the mode in which it trains.
        micro_batches: Micro-batches in the window.
    """
    layers = moving_layers(model) if micro_batches > 1 else []
    pool = Pool(layers)
    momenta = [layer.momentum for layer in layers]
    hooks = [layer.register_forward_pre_hook(pool.about_to_run, prepend=True) for layer in layers]
    try:
        for layer in layers:
            layer.momentum = 1.0
        yield pool
    finally:
        for hook in hooks:
            hook.remove()
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
    pool.apply()


def normalises_by_batch(model: nn.Module) -> bool:
    """Return whether a layer normalises with the statistics of the batch that it sees."""
    return any(
        isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)
        for module in model.modules()
    )


def moving_layers(model: nn.Module) -> list[_BatchNorm]:
    """Return the BatchNorm layers whose running statistics a forward pass moves."""
    return [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.training and module.running_mean is not None
    ]


@dataclass(slots=True)
class _Moments:
    """Of one call of one layer, over the micro-batches so far."""

    count: int
    mean: Tensor
    squares: Tensor  # The sum of squared distances from the mean.


class Pool:
    """What the layers' calls have seen, pooled over micro-batches. The n-th calls belong together.

    Args:
        layers: In training, with running statistics.
    """

    def __init__(self, layers: Sequence[_BatchNorm]) -> None:
        self._layers = layers
        self._before = [[tensor.clone() for tensor in _statistics(layer)] for layer in layers]
        self._open = False
        self._moments: dict[_BatchNorm, list[_Moments]] = defaultdict(list)
        self._seen: dict[_BatchNorm, list[int]] = defaultdict(list)
        self._earlier: dict[_BatchNorm, list[tuple[Tensor, Tensor]]] = defaultdict(list)

    def begin(self) -> None:
        """Say that a micro-batch's forward pass begins: calls count from here."""
        self._open = bool(self._layers)

    def end(self) -> None:
        """Say that it has ended, and pool what it left.

        Activation checkpointing runs forward passes again during the backward pass. They see the
        same examples, and no longer count.
        """
        self._open = False
        pooled: list[_Moments] = []
        counts: list[int] = []
        moments: list[tuple[Tensor, Tensor]] = []
        for layer, own_counts in self._seen.items():
            mean, variance, _ = _statistics(layer)
            known = self._moments[layer]
            while len(known) < len(own_counts):
                known.append(_Moments(0, torch.zeros_like(mean), torch.zeros_like(variance)))
            pooled += known[: len(own_counts)]
            counts += own_counts
            moments += [*self._earlier[layer], (mean, variance)]
        if pooled:
            _add(pooled, counts, moments)
        self._seen.clear()
        self._earlier.clear()

    def about_to_run(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Note a call; a hook of the layer."""
        if not self._open:
            return
        assert isinstance(layer, _BatchNorm)
        if self._seen[layer]:  # Called again: what the call before left would be overwritten.
            mean, variance, _ = _statistics(layer)
            self._earlier[layer].append((mean.clone(), variance.clone()))
        self._seen[layer].append(inputs[0].numel() // layer.num_features)

    @torch.no_grad()
    def apply(self) -> None:
        """Move every layer's statistics once for each of its calls, from where they were."""
        for layer, before in zip(self._layers, self._before, strict=True):
            statistics = _statistics(layer)
            for tensor, value in zip(statistics, before, strict=True):
                tensor.copy_(value)
            running_mean, running_variance, batches = statistics
            for moments in self._moments.get(layer, []):
                batches += 1
                weight = 1 / float(batches) if layer.momentum is None else layer.momentum
                running_mean.lerp_(moments.mean, weight)
                running_variance.lerp_(moments.squares / (moments.count - 1), weight)


@torch.no_grad()
def _add(
    pooled: Sequence[_Moments], counts: Sequence[int], moments: Sequence[tuple[Tensor, Tensor]]
) -> None:
    """Add the mean and unbiased variance of so many values to each, all layers in one call."""
    means, variances = ([pair[which] for pair in moments] for which in (0, 1))
    before = [known.count for known in pooled]
    after = [known.count + count for known, count in zip(pooled, counts, strict=True)]
    ratios = [count / total for count, total in zip(counts, after, strict=True)]
    between = [count * ratio for count, ratio in zip(before, ratios, strict=True)]
    distances = torch._foreach_sub(means, [known.mean for known in pooled])
    squares = [known.squares for known in pooled]
    torch._foreach_add_(squares, torch._foreach_mul(variances, [float(n - 1) for n in counts]))
    squared = torch._foreach_mul(distances, distances)
    torch._foreach_add_(squares, torch._foreach_mul(squared, between))
    torch._foreach_add_([known.mean for known in pooled], torch._foreach_mul(distances, ratios))
    for known, total in zip(pooled, after, strict=True):
        known.count = total


def _statistics(layer: _BatchNorm) -> tuple[Tensor, Tensor, Tensor]:
    """Running mean, running variance, number of batches: tensors that exist where they move."""
    mean, variance, batches = layer.running_mean, layer.running_var, layer.num_batches_tracked
    assert mean is not None
    assert variance is not None
    assert batches is not None
    return mean, variance, batches
