"""Pool BatchNorm's statistics over the micro-batches of a logical batch, and update them once.

By itself a layer would update its running statistics once a micro-batch, with its full momentum
each time. Tracked (``forward_hooks``), its buffers hold the mean and the unbiased variance of the
last forward pass. The pool combines these over all micro-batches, with the variance between
micro-batches (Chan et al., 1979), and updates the layer's earlier statistics once, with the layer's
own momentum. If the layer's inputs are those of the undivided batch, the result is the undivided
batch's.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from autobatch.devices.base import on_host
from autobatch.training.batchnorm.forward_hooks import BatchNormTracker
from autobatch.training.batchnorm.statistics import RunningStatistics, mean_and_variance

_NOT_CALLED: Final = -1  # Not 0: a call may be on an empty tensor.
_Array = TypeVar("_Array", Tensor, NDArray[np.floating[Any]])
_Call = tuple[int, Tensor, Tensor]  # Values per channel; their mean and unbiased variance.


@contextmanager
def pooled_statistics(statistics: RunningStatistics) -> Iterator["StatisticsPool"]:
    """Pool the layers' statistics inside the block; update them at its end.

    After an error the layers are as before.

    Args:
        statistics: The layers, with a copy of their statistics from before the logical batch.
    """
    pool = StatisticsPool(statistics)
    try:
        with pool.tracker.tracking(pool.record_call):
            yield pool
        pool.apply()
    except BaseException:
        statistics.restore()
        raise


@dataclass(slots=True)
class _Calls:
    """The n-th calls of all layers, one entry for each micro-batch.

    Attributes:
        counts: Values per channel, for each layer; 0 if the layer was not called.
        rows: The statistics, of shape ``(2 * channels,)``: the means of all layers' channels, then
            the unbiased variances.
    """

    counts: list[tuple[int, ...]] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)


class StatisticsPool:
    """Pools the statistics of the layers' calls over the micro-batches of a logical batch.

    The n-th calls of all micro-batches are pooled together. A micro-batch with fewer calls than
    others has no part in the later ones.

    Args:
        statistics: The layers, with a copy of their statistics from before the logical batch.

    Attributes:
        tracker: Tracks the layers' calls.
    """

    def __init__(self, statistics: RunningStatistics) -> None:
        self.tracker = BatchNormTracker(statistics)
        self._statistics = statistics
        self._active = False
        self._context = self._examples = 0
        self._calls: list[_Calls] = []
        self._most_calls = [0] * len(statistics.layers)  # The most in one forward pass, by layer.
        self._clear_calls()

    def begin(self, context: int = 0, own: int = 1) -> None:
        """Begin the forward pass of a micro-batch; from here calls count.

        Args:
            context: The first examples of this forward pass, which belong to another micro-batch
                and are already counted. If a layer sees several rows per example, the rows must be
                ordered by example.
            own: Examples after the context. Not used if ``context`` is 0.
        """
        self._active = True
        self._context, self._examples = context, context + own
        self.tracker.begin()

    def end(self) -> None:
        """End the forward pass, and copy the statistics of its calls.

        Activation checkpointing runs forward passes again during the backward pass. These see the
        same examples and do not count.
        """
        self._active = False
        if self._earlier_calls or _NOT_CALLED in self._counts:
            self._add_uneven_calls()
        else:  # The usual case: each layer was called once, and its buffers hold the statistics.
            self._add_calls(0, tuple(self._counts), self._statistics.tensors)
            self._most_calls = [most or 1 for most in self._most_calls]
        self._clear_calls()

    def record_call(self, index: int, values: Tensor) -> None:
        """Record a call, and copy what the layer's buffers will not hold.

        Args:
            index: The layer's.
            values: The layer's input, of shape ``(examples, channels, ...)``.
        """
        if not self._active:
            return
        channels = self._statistics.channels[index]
        if self._context:
            values = values[len(values) * self._context // self._examples :]
            call = (values.numel() // channels, *_moments_of(values))
            self._earlier_calls.setdefault(index, []).append(call)
            return
        if self._counts[index] != _NOT_CALLED:  # This call will overwrite the earlier one.
            mean, variance = mean_and_variance(self._statistics.buffers[index])
            earlier = (self._counts[index], mean.clone(), variance.clone())
            self._earlier_calls.setdefault(index, []).append(earlier)
        self._counts[index] = values.numel() // channels

    def apply(self) -> None:
        """Update every layer's earlier statistics once for each of its pooled calls.

        Raises:
            InexactStepError: If a layer updated its statistics in a call that was not tracked.
        """
        statistics, most_calls = self._statistics, self._most_calls
        counted = self.tracker.check()
        statistics.rebind()
        if counted:
            statistics.restore_counts()
        statistics.add_counts(most_calls)
        values = _at_least_float32(statistics.values)
        for n, calls in enumerate(self._calls):
            layers = zip(statistics.layers, most_calls, strict=True)
            momenta = tuple([_momentum(layer, most - n) for layer, most in layers])
            values = _updated(values, calls, momenta, statistics.channels)
        statistics.fill(values)

    def _clear_calls(self) -> None:
        """Forget the calls of the last forward pass."""
        # Values per channel in the last call of each layer, whose statistics its buffers hold.
        self._counts = [_NOT_CALLED] * len(self._statistics.layers)
        self._earlier_calls: dict[int, list[_Call]] = {}  # Earlier calls, by layer index.

    def _add_uneven_calls(self) -> None:
        """Add the calls of a forward pass that called a layer several times, or not at all."""
        calls_by_layer: list[list[_Call]] = []
        for index, count in enumerate(self._counts):
            calls = self._earlier_calls.get(index, [])
            if count != _NOT_CALLED:
                calls.append((count, *mean_and_variance(self._statistics.buffers[index])))
            calls_by_layer.append(calls)
        numbers = list(map(len, calls_by_layer))
        self._most_calls = list(map(max, self._most_calls, numbers))
        for n in range(max(numbers)):
            calls = [
                own[n] if n < len(own) else self._no_call(index)
                for index, own in enumerate(calls_by_layer)
            ]
            counts, means, variances = zip(*calls, strict=True)
            self._add_calls(n, counts, [*means, *variances])

    def _no_call(self, index: int) -> _Call:
        mean, variance = mean_and_variance(self._statistics.buffers[index])
        return 0, torch.zeros_like(mean), torch.zeros_like(variance)

    def _add_calls(self, n: int, counts: tuple[int, ...], statistics: Sequence[Tensor]) -> None:
        """Add the n-th calls of all layers in one micro-batch."""
        if n == len(self._calls):
            self._calls.append(_Calls())
        self._calls[n].counts.append(counts)
        self._calls[n].rows.append(_at_least_float32(torch.cat(list(statistics))))


def _updated(
    before: Tensor, calls: _Calls, momenta: tuple[float, ...], channels: tuple[int, ...]
) -> Tensor:
    """Return running means, then variances, updated with the pooled calls.

    With cold caches after a whole window each operation costs 20 to 40 microseconds, however small
    its tensors. The operations are therefore few, the weights are cached, and on the CPU NumPy
    computes them, which takes half as long.

    Args:
        before: The running means, then the variances, of shape ``(sum(channels),)``.
        calls: The n-th calls of all layers.
        momenta: One for each layer.
        channels: The length of each layer's mean, then of each layer's variance.
    """
    weights = _weights(tuple(calls.counts), momenta, channels, before.itemsize)
    if type(before) is Tensor and on_host(before):
        rows = np.array([row.numpy() for row in calls.rows])
        return torch.from_numpy(_pooled(before.numpy(), rows, *weights))
    on_device = (torch.from_numpy(weight).to(before) for weight in weights)
    return _pooled(before, torch.stack(calls.rows), *on_device)


def _pooled(
    before: _Array, rows: _Array, within: _Array, between: _Array, momentum: _Array
) -> _Array:
    """Pool the rows of all micro-batches and update ``before``; for tensors and for arrays.

    Args:
        before: The running means, then the variances, of shape ``(2 * channels,)``.
        rows: The same of each micro-batch, of shape ``(micro_batches, 2 * channels)``.
        within: The weights of the rows, of the same shape.
        between: The weights of each mean's squared deviation from the pooled mean, of shape
            ``(micro_batches, channels)``.
        momentum: The weight of the pooled statistics beside ``before``, of shape
            ``(2 * channels,)``.
    """
    pooled: _Array = (rows * within).sum(0)
    means = len(pooled) // 2
    deviation = rows[:, :means] - pooled[:means]
    deviation *= deviation
    deviation *= between
    pooled[means:] += deviation.sum(0)
    pooled *= momentum
    pooled += before * (1 - momentum)
    return pooled


@functools.lru_cache(8)  # Arrays, because cached tensors would count in a trial's memory.
def _weights(
    counts_by_micro_batch: tuple[tuple[int, ...], ...],
    momenta: tuple[float, ...],
    channels: tuple[int, ...],
    itemsize: int,
) -> tuple[NDArray[np.floating[Any]], ...]:
    """Return the arguments ``within``, ``between`` and ``momentum`` of ``_pooled``.

    Args:
        counts_by_micro_batch: Values per channel, for each micro-batch and each layer.
        momenta: One for each layer.
        channels: The length of each layer's mean, then of each layer's variance.
        itemsize: Bytes of a weight.

    Returns:
        Arrays of shapes ``(micro_batches, sum(channels))``, half as wide for the means alone, and
        ``(sum(channels),)``.
    """
    totals = list(map(sum, zip(*counts_by_micro_batch, strict=True)))
    within, between = [], []
    for counts in counts_by_micro_batch:
        pairs = list(zip(counts, totals, strict=True))
        means = [n / max(total, 1) for n, total in pairs]
        within.append(means + [max(n - 1, 0) / max(total - 1, 1) for n, total in pairs])
        between.append([n / max(total - 1, 1) for n, total in pairs])
    # One value has no unbiased variance; torch refuses it in an undivided batch.
    momentum = [
        m if n > least else 0.0 for least in (0, 1) for m, n in zip(momenta, totals, strict=True)
    ]
    dtype = np.float64 if itemsize == 8 else np.float32
    return tuple(
        np.repeat(np.array(weights, dtype), channels[: np.shape(weights)[-1]], axis=-1)
        for weights in (within, between, momentum)
    )


def _momentum(layer: _BatchNorm, remaining: int) -> float:
    """Return the momentum with which torch would update the statistics for one call.

    Args:
        layer: Whose number of batches already includes all of its calls.
        remaining: Calls to apply, with this one.
    """
    if remaining <= 0:
        return 0.0
    if layer.momentum is not None:
        return layer.momentum
    # momentum=None averages over batches; a layer that counts no batches updates nothing.
    number = layer.num_batches_tracked
    return 0.0 if number is None else 1 / (float(number) - remaining + 1)


@torch.no_grad()
def _moments_of(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return each channel's mean and unbiased variance: 0 for one value, undefined for none."""
    dimensions = [0, *range(2, values.dim())]
    several = values.numel() > values.shape[1]
    variance, mean = torch.var_mean(_at_least_float32(values), dimensions, correction=int(several))
    return mean, variance


def _at_least_float32(tensor: Tensor) -> Tensor:
    """Return 16-bit values in float32: a sum of squares overflows float16 at 65,504."""
    return tensor.float() if tensor.itemsize < 4 else tensor
