"""BatchNorm's running statistics over a window that is cut: pooled, and moved once.

Left alone, a layer would move its running statistics once a micro-batch, with its full momentum
each time. Watched, it leaves in its buffers the mean and the unbiased variance of what each forward
pass saw. They are pooled (Chan et al., 1979: the variance between micro-batches belongs to it), and
move what the buffers held before, once, with the layer's own momentum. For a layer whose inputs are
the undivided batch's that is what the undivided batch would have done.
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
from autobatch.training.batchnorm.forward_hooks import ForwardTracker
from autobatch.training.batchnorm.statistics import Statistics, mean_and_variance

_UNCALLED: Final = -1  # A call may be on no values.
_Array = TypeVar("_Array", Tensor, NDArray[np.floating[Any]])
_Call = tuple[int, Tensor, Tensor]  # Values of a channel; mean and unbiased variance they left.


@contextmanager
def pooled_statistics(taken: Statistics) -> Iterator["StatisticsPool"]:
    """Pool the layers' running statistics inside; apply them at the end.

    After an error the layers are as they were.

    Args:
        taken: What their statistics are before.
    """
    pool = StatisticsPool(taken)
    try:
        with pool.watch.over_layers(pool.note):
            yield pool
        pool.apply()
    except BaseException:
        taken.put_back()
        raise


@dataclass(slots=True)
class _Calls:
    """The layers' n-th calls, one entry a micro-batch.

    Attributes:
        counts: Values of a channel, for each layer; 0 where it was not called.
        rows: What they left, of shape ``(2 * channels,)``: the means of all layers' channels, and
            then the unbiased variances.
    """

    counts: list[tuple[int, ...]] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)


class StatisticsPool:
    """What the layers' calls have seen, pooled over micro-batches. The n-th calls belong together.

    A micro-batch that makes fewer calls than others has no part in the later ones.

    Args:
        taken: What their statistics were before the window.

    Attributes:
        watch: Over the layers.
    """

    def __init__(self, taken: Statistics) -> None:
        self.watch = ForwardTracker(taken)
        self._taken = taken
        self._open = False
        self._borrowed = self._examples = 0
        self._calls: list[_Calls] = []
        self._most = [0] * len(taken.layers)  # Calls in the forward pass that made most.
        self._forget()

    def begin(self, borrowed: int = 0, own: int = 1) -> None:
        """Say that a micro-batch's forward pass begins: calls count from here.

        Args:
            borrowed: So many examples, the first of this forward pass, are a neighbour's and
                already counted. Where a layer sees several rows an example, they must come
                example by example.
            own: Examples after them. Of no interest where none is borrowed.
        """
        self._open = True
        self._borrowed, self._examples = borrowed, borrowed + own
        self.watch.begin()

    def end(self) -> None:
        """Say that it has ended, and keep a copy of what it left.

        Activation checkpointing runs forward passes again during the backward pass. They see the
        same examples, and no longer count.
        """
        self._open = False
        if self._earlier or _UNCALLED in self._counts:
            self._end_unlike()
        else:  # The commonest: each was called once, and has left it in its own.
            self._keep(0, tuple(self._counts), self._taken.own)
            self._most = [most or 1 for most in self._most]
        self._forget()

    def note(self, place: int, values: Tensor) -> None:
        """Note a call, if the forward pass counts, and keep what the layer's buffers cannot.

        Args:
            place: The layer's.
            values: What it is called on, of shape ``(examples, channels, ...)``.
        """
        if not self._open:
            return
        channels = self._taken.channels[place]
        if self._borrowed:
            values = values[len(values) * self._borrowed // self._examples :]
            call = (values.numel() // channels, *_moments_of(values))
            self._earlier.setdefault(place, []).append(call)
            return
        if self._counts[place] != _UNCALLED:  # The call before, which this one overwrites.
            mean, variance = mean_and_variance(self._taken.buffers[place])
            before = (self._counts[place], mean.clone(), variance.clone())
            self._earlier.setdefault(place, []).append(before)
        self._counts[place] = values.numel() // channels

    def apply(self) -> None:
        """Move every layer's statistics once for each of its calls, from where they were.

        Raises:
            InexactStepError: If one moved them in a call that was not noted.
        """
        taken, most = self._taken, self._most
        counted = self.watch.refuse_unseen()
        taken.bind()
        if counted:
            taken.put_counts_back()
        taken.add_counts(most)
        moved = _widened(taken.values)
        for place, calls in enumerate(self._calls):
            left = zip(taken.layers, most, strict=True)
            momenta = tuple([_momentum(layer, n - place) for layer, n in left])
            moved = _moved(moved, calls, momenta, taken.channels)
        taken.fill(moved)

    def _forget(self) -> None:
        """Have no calls of a forward pass."""
        # Values of a channel in the last call of each layer, unless that one is kept below.
        self._counts = [_UNCALLED] * len(self._taken.layers)
        self._earlier: dict[int, list[_Call]] = {}  # Calls before those, by place.

    def _end_unlike(self) -> None:
        """Keep what was left where layers were called several times, or not at all."""
        every: list[list[_Call]] = []
        for place, count in enumerate(self._counts):
            calls = self._earlier.get(place, [])
            if count != _UNCALLED:
                calls.append((count, *mean_and_variance(self._taken.buffers[place])))
            every.append(calls)
        made = list(map(len, every))
        self._most = list(map(max, self._most, made))
        for n in range(max(made)):
            calls = [c[n] if n < len(c) else self._none(place) for place, c in enumerate(every)]
            counts, means, variances = zip(*calls, strict=True)
            self._keep(n, counts, [*means, *variances])

    def _none(self, place: int) -> _Call:
        mean, variance = mean_and_variance(self._taken.buffers[place])
        return 0, torch.zeros_like(mean), torch.zeros_like(variance)

    def _keep(self, place: int, counts: tuple[int, ...], statistics: Sequence[Tensor]) -> None:
        """Keep what the layers' calls at this place have left."""
        if place == len(self._calls):
            self._calls.append(_Calls())
        self._calls[place].counts.append(counts)
        self._calls[place].rows.append(_widened(torch.cat(list(statistics))))


def _moved(
    before: Tensor, calls: _Calls, momenta: tuple[float, ...], channels: tuple[int, ...]
) -> Tensor:
    """Return running means, and then variances, that the pooled calls have moved.

    Cold behind a whole window each kind of operation costs 20 to 40 microseconds, and what it works
    on next to nothing: so they are few, the weights are made before, and on the CPU they are
    NumPy's, which cost half.

    Args:
        before: Of shape ``(2 * channels,)``.
        calls: Of all layers.
        momenta: Of each layer.
        channels: Of each mean, and then of each variance.
    """
    weights = _weights(tuple(calls.counts), momenta, channels, before.itemsize)
    if type(before) is Tensor and on_host(before):
        rows = np.array([row.numpy() for row in calls.rows])
        return torch.from_numpy(_pooled(before.numpy(), rows, *weights))
    there = (torch.from_numpy(weight).to(before) for weight in weights)
    return _pooled(before, torch.stack(calls.rows), *there)


def _pooled(
    before: _Array, left: _Array, inside: _Array, between: _Array, moving: _Array
) -> _Array:
    """Pool what calls have left, and move what was before; tensors and arrays do the same.

    Args:
        before: Means, and then variances.
        left: The same of each micro-batch.
        inside: What each of these weighs.
        between: What the square of how far each mean is off weighs.
        moving: What the pooled ones weigh beside those before.
    """
    pooled: _Array = (left * inside).sum(0)
    means = len(pooled) // 2
    off = left[:, :means] - pooled[:means]
    off *= off
    off *= between
    pooled[means:] += off.sum(0)
    pooled *= moving
    pooled += before * (1 - moving)
    return pooled


@functools.lru_cache(8)  # Windows are alike. No tensor: a trial would find it in its memory.
def _weights(
    every: tuple[tuple[int, ...], ...],
    momenta: tuple[float, ...],
    channels: tuple[int, ...],
    itemsize: int,
) -> tuple[NDArray[np.floating[Any]], ...]:
    """Return by channel what each call's statistics weigh, how far its mean is off, and momenta.

    Args:
        every: Values of a channel, in each micro-batch's calls, for each layer.
        momenta: Of each layer.
        channels: Of each mean, and then of each variance.
        itemsize: Bytes of a weight.

    Returns:
        Of shapes ``(len(every), sum(channels))``, half as wide, for the means alone, and
        ``(sum(channels),)``.
    """
    totals = list(map(sum, zip(*every, strict=True)))
    inside, between = [], []  # The weights of what each left, and of how far its mean is off.
    for counts in every:
        pairs = list(zip(counts, totals, strict=True))
        shares = [n / max(total, 1) for n, total in pairs]
        inside.append(shares + [max(n - 1, 0) / max(total - 1, 1) for n, total in pairs])
        between.append([n / max(total - 1, 1) for n, total in pairs])
    # One value has no unbiased variance. Undivided, torch would refuse it.
    own = [
        m if n > least else 0.0 for least in (0, 1) for m, n in zip(momenta, totals, strict=True)
    ]
    dtype = np.float64 if itemsize == 8 else np.float32
    return tuple(
        np.repeat(np.array(weights, dtype), channels[: np.shape(weights)[-1]], axis=-1)
        for weights in (inside, between, own)
    )


def _momentum(layer: _BatchNorm, remaining: int) -> float:
    """Return the momentum with which torch would add a call; so many, this one too, are counted."""
    if remaining <= 0:
        return 0.0
    if layer.momentum is not None:
        return layer.momentum
    # The average over batches. Where none are counted, torch moves nothing.
    number = layer.num_batches_tracked
    return 0.0 if number is None else 1 / (float(number) - remaining + 1)


@torch.no_grad()
def _moments_of(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return each channel's mean and unbiased variance; of a single value 0, of none anything."""
    dimensions = [0, *range(2, values.dim())]
    several = values.numel() > values.shape[1]
    variance, mean = torch.var_mean(_widened(values), dimensions, correction=int(several))
    return mean, variance


def _widened(tensor: Tensor) -> Tensor:
    """In 16 bits the squares of 70,000 values are infinite."""
    return tensor.float() if tensor.itemsize < 4 else tensor
