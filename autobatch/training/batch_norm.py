"""BatchNorm in a window that is cut: its running statistics pooled over it, or frozen through it.

Left alone, a layer would move its running statistics once a micro-batch, with its full momentum
each time. Here its momentum is 1 while the window runs: each forward pass leaves in its buffers the
mean and the unbiased variance of what it saw. They are pooled (Chan et al., 1979: the variance
between micro-batches belongs to it), and move what the buffers held before, once, with the layer's
own momentum. For a layer whose inputs are the undivided batch's that is what the undivided batch
would have done.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from autobatch.errors import InexactStepError

STATISTICS: Final = ("running_mean", "running_var", "num_batches_tracked")
BatchNormMode = Literal["micro", "frozen", "refuse"]
_MODES: Final[tuple[BatchNormMode, ...]] = ("micro", "frozen", "refuse")


def check_batch_norm(mode: object) -> BatchNormMode:
    """Return the mode, or refuse it.

    Raises:
        ValueError: If it is none of the three.
    """
    for known in _MODES:
        if mode == known:
            return known
    raise ValueError(f"batch_norm must be one of {', '.join(map(repr, _MODES))}, got {mode!r}")


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Normalise by the running statistics inside, which do not move; weights and biases train.

    Then no example sees another, and any split is exact. InstanceNorm is left alone: it normalises
    each example by itself, so frozen it would only compute something else.

    Args:
        model: In the mode in which it trains.

    Raises:
        ValueError: If a layer keeps no running statistics. Nothing was touched.
    """
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            kind = type(module).__name__
            raise ValueError(
                f"{kind} {name!r} keeps no running statistics (track_running_stats=False), so it "
                "always normalises by the batch and cannot be frozen; build it with "
                "track_running_stats=True"
            )
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training]
    try:
        for layer in layers:  # Not eval(), which would reach layers that others put inside it.
            layer.training = False
        yield
    finally:
        for layer in layers:
            layer.training = True


@contextmanager
def pooled_statistics(taken: "Statistics") -> Iterator["Pool"]:
    """Pool the layers' running statistics inside; apply them at the end.

    After an error the layers are as they were.

    Args:
        taken: What their statistics are before.
    """
    pool = Pool(taken)
    try:
        with _noted(taken.layers, pool):
            yield pool
        pool.apply()
    except BaseException:
        taken.put_back()
        raise


@contextmanager
def _noted(layers: Sequence[_BatchNorm], pool: "Pool") -> Iterator[None]:
    """Have the pool told of the layers' calls inside, and their buffers take what those see.

    Each layer has a forward pass of its own for this: a hook would take six times as long.
    """
    kept = [(layer, layer.momentum, vars(layer).get("forward")) for layer in layers]
    try:
        for layer in layers:
            # A module's own way of setting looks at all it has first.
            vars(layer).update(forward=pool.watched(layer), momentum=1.0)
        yield
    finally:
        for layer, momentum, forward in kept:
            own = vars(layer)
            own["momentum"] = momentum
            own.pop("forward", None) if forward is None else own.update(forward=forward)


def normalises_by_batch(modules: Iterable[nn.Module]) -> bool:
    """Return whether one of them normalises with the statistics of the batch that it sees."""
    return any(
        isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)
        for module in modules
    )


def moving_layers(modules: Iterable[nn.Module]) -> list[_BatchNorm]:
    """Return the BatchNorm layers whose running statistics a forward pass moves."""
    return [module for module in modules if isinstance(module, _BatchNorm) and _moves(module)]


def _moves(layer: _BatchNorm) -> bool:
    # track_running_stats may have been set to False later: the buffers are there, and stay.
    return layer.training and layer.track_running_stats and layer.running_mean is not None


@dataclass(slots=True)
class _Track:
    """One layer in a window.

    Attributes:
        own: Its running mean, running variance and number of batches.
        place: Among the layers.
        calls: How often it was called in the forward pass that called it most.
        counts: Values of a channel in each of its calls in this forward pass.
        left: The mean and the unbiased variance that those calls left. The last one's may still
            be in ``own``.
    """

    own: dict[str, Tensor | None]
    place: int
    calls: int = 0
    counts: list[int] = field(default_factory=list)
    left: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def call(self, place: int) -> tuple[int, Tensor, Tensor]:
        """Return the count, mean and variance of a call; zeros if there was none."""
        mean, variance = self.left[place] if place < len(self.left) else _statistics(self.own)
        if place < len(self.counts):
            return self.counts[place], mean, variance
        return 0, torch.zeros_like(mean), torch.zeros_like(variance)


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
        pairs = list(map(_statistics, self.buffers))
        self.own = [mean for mean, _ in pairs] + [variance for _, variance in pairs]
        self.values = torch.cat(self.own)
        numbers = (own["num_batches_tracked"] for own in self.buffers)
        self.numbers = [number for number in numbers if number is not None]
        self.counts = torch.stack(self.numbers) if self.numbers else self.values[:0]

    @torch.no_grad()
    def put_back(self) -> None:
        """Give the layers their own buffers back, as they were."""
        self.put_buffers(self.counts)
        self.fill(self.values)

    def put_buffers(self, counts: Tensor) -> None:
        """Give the layers their own buffers back, with these numbers of batches."""
        for layer, own in zip(self.layers, self.buffers, strict=True):
            layer._buffers.update(own)
        if self.numbers:
            torch._foreach_copy_(self.numbers, counts.unbind())

    def fill(self, values: Tensor) -> None:
        """Fill the layers' own buffers with these means and variances."""
        torch._foreach_copy_(self.own, values.split(self.channels))


class Pool:
    """What the layers' calls have seen, pooled over micro-batches. The n-th calls belong together.

    A micro-batch that makes fewer calls than others has no part in the later ones.

    Args:
        taken: What their statistics were before the window.
    """

    def __init__(self, taken: Statistics) -> None:
        self._taken = taken
        self._open = False
        self._borrowed = self._examples = 0
        self._calls: list[_Calls] = []
        self._tracks: dict[_BatchNorm, _Track] = {
            layer: _Track(own, place)
            for place, (layer, own) in enumerate(zip(taken.layers, taken.buffers, strict=True))
        }
        self._versions: list[int] = []
        self._once = [1] * len(self._tracks)

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
        self._versions = [number._version for number in self._taken.numbers]

    @torch.no_grad()
    def end(self) -> None:
        """Say that it has ended, and keep a copy of what it left.

        Activation checkpointing runs forward passes again during the backward pass. They see the
        same examples, and no longer count.
        """
        self._open = False
        tracks = self._tracks.values()
        made = [len(track.counts) for track in tracks]
        if 0 in made:
            self._refuse_unseen()
        if not self._borrowed and made == self._once:  # The commonest: each has left it in its own.
            self._keep(0, tuple([track.counts[0] for track in tracks]), self._taken.own)
        else:
            for place in range(max(made, default=0)):
                counts, means, variances = zip(*(t.call(place) for t in tracks), strict=True)
                self._keep(place, counts, [*means, *variances])
        for track, count in zip(tracks, made, strict=True):
            if count > track.calls:
                track.calls = count
            track.counts = []
            if track.left:
                track.left = []

    def watched(self, layer: _BatchNorm) -> Callable[..., Tensor]:
        """Return the layer's forward pass, of which this pool is told."""
        track, run = self._tracks[layer], layer.forward

        def forward(*inputs: Tensor, **named: Tensor) -> Tensor:
            self._about_to_run(layer, track, inputs[0] if inputs else named["input"])
            return run(*inputs, **named)

        return forward

    def _about_to_run(self, layer: _BatchNorm, track: _Track, values: Tensor) -> None:
        """Note a call."""
        if not (layer.training and layer.track_running_stats):
            layer._buffers.update(self._as_before(track))  # For this call, which moves nothing.
            return
        layer._buffers.update(track.own)
        if not self._open:
            return
        if self._borrowed:
            values = values[len(values) * self._borrowed // self._examples :]
            track.left.append(_moments_of(values))
        elif track.counts:  # Called again: what the call before left would be overwritten.
            mean, variance = _statistics(track.own)
            track.left.append((mean.clone(), variance.clone()))
        track.counts.append(values.numel() // layer.num_features)

    @torch.no_grad()
    def apply(self) -> None:
        """Move every layer's statistics once for each of its calls, from where they were."""
        taken, tracks = self._taken, self._tracks.values()
        called = [t.calls for t in tracks if t.own["num_batches_tracked"] is not None]
        if len(set(called)) == 1:
            more: int | Tensor = called[0]
        else:
            more = torch.tensor(called, dtype=torch.int64).to(taken.counts.device)
        taken.put_buffers(taken.counts + more)
        moved = _widened(taken.values)
        for place, calls in enumerate(self._calls):
            momenta = tuple(_momentum(layer, t.calls - place) for layer, t in self._tracks.items())
            moved = _moved(moved, calls, momenta, taken.channels)
        taken.fill(moved)

    def _refuse_unseen(self) -> None:
        """Refuse layers that have run, and were not noted."""
        versions = {
            id(number): version
            for number, version in zip(self._taken.numbers, self._versions, strict=True)
        }
        for track in self._tracks.values():
            number = track.own["num_batches_tracked"]
            if number is None or track.counts:  # Torch counts no other writing than this one's.
                continue
            if number._version != versions[id(number)]:
                raise InexactStepError(
                    "a BatchNorm layer moved its running statistics unseen (its class's forward "
                    "called by hand, or compiled before the batch was cut), so they cannot be "
                    'pooled; call it as a module, or pass batch_norm="frozen"'
                )

    def _as_before(self, track: _Track) -> dict[str, Tensor | None]:
        """Return a layer's buffers with the values that they had before the window."""
        parts = self._taken.values.split(self._taken.channels)
        mean, variance = _statistics(track.own)
        return track.own | {
            "running_mean": parts[track.place].to(mean.dtype),
            "running_var": parts[track.place + len(self._tracks)].to(variance.dtype),
        }

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

    Each kind of operation on tensors costs 20 microseconds here, cold behind a whole window, and
    what it works on next to nothing: so they are few, and the weights are made before.

    Args:
        before: Of shape ``(2 * channels,)``.
        calls: Of all layers.
        momenta: Of each layer.
        channels: Of each mean, and then of each variance.
    """
    by_channel = _weights(tuple(calls.counts), momenta, channels, before.itemsize)
    weights = torch.from_numpy(by_channel).to(before)
    rows, left = len(calls.rows), torch.stack(calls.rows)
    pooled = (left * weights[:rows]).sum(0)
    off = (left - pooled).square_().mul_(weights[rows:-1]).sum(0)
    means = len(before) // 2
    pooled[means:] += off[:means]
    return before.lerp(pooled, weights[-1])


@functools.lru_cache(8)  # Windows are alike. On the host, where no trial's memory is measured.
def _weights(
    every: tuple[tuple[int, ...], ...],
    momenta: tuple[float, ...],
    channels: tuple[int, ...],
    itemsize: int,
) -> NDArray[np.floating[Any]]:
    """Return by channel what each call's statistics weigh, how far its mean is off, and momenta.

    Args:
        every: Values of a channel, in each micro-batch's calls, for each layer.
        momenta: Of each layer.
        channels: Of each mean, and then of each variance.
        itemsize: Bytes of a weight.

    Returns:
        Of shape ``(2 * len(every) + 1, sum(channels))``.
    """
    totals = list(map(sum, zip(*every, strict=True)))
    none = [0.0] * len(totals)
    inside, between = [], []  # The weights of what each left, and of how far its mean is off.
    for counts in every:
        pairs = list(zip(counts, totals, strict=True))
        shares = [n / max(total, 1) for n, total in pairs]
        inside.append(shares + [max(n - 1, 0) / max(total - 1, 1) for n, total in pairs])
        between.append([n / max(total - 1, 1) for n, total in pairs] + none)
    # One value has no unbiased variance. Undivided, torch would refuse it.
    own = [
        m if n > least else 0.0 for least in (0, 1) for m, n in zip(momenta, totals, strict=True)
    ]
    by_channel = np.repeat([*inside, *between, own], channels, axis=1)
    return by_channel.astype(np.float64 if itemsize == 8 else np.float32)


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


def _statistics(buffers: Mapping[str, Tensor | None]) -> tuple[Tensor, Tensor]:
    mean, variance = buffers["running_mean"], buffers["running_var"]
    assert mean is not None
    assert variance is not None
    return mean, variance
