"""BatchNorm in a window that is cut: its running statistics pooled over it, or frozen through it.

Left alone, a layer would move its running statistics once a micro-batch, with its full momentum
each time. Here its momentum is 1 while the window runs, and it moves other buffers than its own:
each forward pass leaves there the mean and the unbiased variance of what it saw. They are pooled
(Chan et al., 1979: the variance between micro-batches belongs to it), and move the layer's own
once, with its own momentum. For a layer whose inputs are the undivided batch's that is what the
undivided batch would have done.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from autobatch.errors import InexactStepError

_NAMES: Final = ("running_mean", "running_var", "num_batches_tracked")
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
def pooled_statistics(model: nn.Module, micro_batches: int) -> Iterator["Pool"]:
    """Pool the running statistics of every BatchNorm in training inside; apply them at the end.

    After an error the layers are as they were. A window of one micro-batch is left to the layers
    themselves.

    Args:
        model: In the mode in which it trains.
        micro_batches: Micro-batches in the window.
    """
    layers = moving_layers(model) if micro_batches > 1 else []
    pool = Pool(layers)
    momenta = [layer.momentum for layer in layers]
    # Last among the hooks that a layer has: it is to see what the layer sees.
    hooks = [
        layer.register_forward_pre_hook(pool.about_to_run, with_kwargs=True) for layer in layers
    ]
    try:
        for layer in layers:
            layer.momentum = 1.0
        yield pool
    finally:
        for hook in hooks:
            hook.remove()
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        pool.put_back()
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
        module for module in model.modules() if isinstance(module, _BatchNorm) and _moves(module)
    ]


def _moves(layer: _BatchNorm) -> bool:
    # track_running_stats may have been set to False later: the buffers are there, and stay.
    return layer.training and layer.track_running_stats and layer.running_mean is not None


@dataclass(slots=True)
class _Track:
    """One layer in a window.

    Attributes:
        own: Its running mean, running variance and number of batches.
        lent: What it moves instead meanwhile.
        calls: How often it was called in the forward pass that called it most.
        counts: Values of a channel in each of its calls in this forward pass.
        left: The mean and the unbiased variance that those calls left. The last one's may still
            be in ``lent``.
    """

    own: dict[str, Tensor | None]
    lent: dict[str, Tensor | None]
    calls: int = 0
    counts: list[int] = field(default_factory=list)
    left: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def batches(self) -> int:
        """Return how often the number of batches was written to: torch counts no other writing."""
        counted = self.lent["num_batches_tracked"]
        return 0 if counted is None else counted._version

    def call(self, place: int) -> tuple[int, Tensor, Tensor]:
        """Return the count, mean and variance of a call; the count is 0 if there was none."""
        count = self.counts[place] if place < len(self.counts) else 0
        mean, variance = self.left[place] if place < len(self.left) else _statistics(self.lent)
        return count, mean, variance


@dataclass(slots=True)
class _Moments:
    """Of the layers' n-th calls, one entry a micro-batch.

    Attributes:
        counts: Values of a channel, for each layer.
        means: All layers' channels in a row, as in the next: shape ``(channels,)``.
        variances: The unbiased ones.
    """

    counts: list[Sequence[int]] = field(default_factory=list)
    means: list[Tensor] = field(default_factory=list)
    variances: list[Tensor] = field(default_factory=list)


class Pool:
    """What the layers' calls have seen, pooled over micro-batches. The n-th calls belong together.

    A micro-batch that makes fewer calls than others has no part in the later ones.

    Args:
        layers: In training, with running statistics, on one device. They are lent other buffers.
    """

    def __init__(self, layers: Sequence[_BatchNorm]) -> None:
        self._open = False
        self._borrowed = self._examples = 0
        self._before: list[int] = []
        self._pooled: list[_Moments] = []
        self._tracks: dict[_BatchNorm, _Track] = {}
        for layer in layers:
            own = {name: layer._buffers[name] for name in _NAMES}
            lent = {name: None if t is None else torch.zeros_like(t) for name, t in own.items()}
            self._tracks[layer] = _Track(own, lent)
            layer._buffers.update(lent)
        self._channels = [layer.num_features for layer in layers]
        self._repeats = torch.tensor(self._channels)

    def begin(self, borrowed: int = 0, own: int = 1) -> None:
        """Say that a micro-batch's forward pass begins: calls count from here.

        Args:
            borrowed: So many examples, the first of this forward pass, are a neighbour's and
                already counted. Where a layer sees several rows an example, they must come
                example by example.
            own: Examples after them. Of no interest where none is borrowed.
        """
        self._open = True
        self._before = [track.batches() for track in self._tracks.values()]
        self._borrowed, self._examples = borrowed, borrowed + own

    def end(self) -> None:
        """Say that it has ended, and pool what it left.

        Activation checkpointing runs forward passes again during the backward pass. They see the
        same examples, and no longer count.
        """
        self._open = False
        tracks = self._tracks.values()
        for track, before in zip(tracks, self._before, strict=True):
            if not track.counts and track.batches() != before:
                raise InexactStepError(
                    "a BatchNorm layer moved its running statistics without its hooks (forward() "
                    "called by hand, or compiled before the batch was cut), so they cannot be "
                    'pooled; call it as a module, or pass batch_norm="frozen"'
                )
        for place in range(max((len(track.counts) for track in tracks), default=0)):
            self._add(place, [track.call(place) for track in tracks])
        for track in tracks:
            track.calls = max(track.calls, len(track.counts))
            track.counts.clear()
            track.left.clear()

    def about_to_run(
        self, layer: nn.Module, inputs: tuple[Tensor, ...], named: Mapping[str, Tensor]
    ) -> None:
        """Note a call; a hook of the layer."""
        assert isinstance(layer, _BatchNorm)
        track = self._tracks[layer]
        if not (layer.training and layer.track_running_stats):
            layer._buffers.update(track.own)  # For this call, which moves nothing.
            return
        layer._buffers.update(track.lent)
        if not self._open:
            return
        values = inputs[0] if inputs else named["input"]
        if self._borrowed:
            values = values[len(values) * self._borrowed // self._examples :]
            track.left.append(_moments_of(values))
        elif track.counts:  # Called again: what the call before left would be overwritten.
            mean, variance = _statistics(track.lent)
            track.left.append((mean.clone(), variance.clone()))
        track.counts.append(values.numel() // layer.num_features)

    @torch.no_grad()
    def _add(self, place: int, seen: Sequence[tuple[int, Tensor, Tensor]]) -> None:
        """Keep what the layers' calls at this place have seen: a copy, in two operations."""
        if place == len(self._pooled):
            self._pooled.append(_Moments())
        pooled = self._pooled[place]
        counts, means, variances = zip(*seen, strict=True)
        pooled.counts.append(counts)
        pooled.means.append(_joined(means))
        pooled.variances.append(_joined(variances))

    def _together(self, pooled: _Moments) -> tuple[list[int], Tensor, Tensor]:
        """Return counts, means and sums of squared distances over all micro-batches."""
        totals = [sum(column) for column in zip(*pooled.counts, strict=True)]
        shares = [
            [count / max(total, 1) for count, total in zip(row, totals, strict=True)]
            for row in pooled.counts
        ]
        within = [[max(count - 1, 0) for count in row] for row in pooled.counts]
        rows = len(shares)
        weights = self._for_channels([*shares, *within, *pooled.counts], pooled.means[0])
        share, inside, count = (weights[n * rows : (n + 1) * rows] for n in range(3))
        means, variances = torch.stack(pooled.means), torch.stack(pooled.variances)
        means = torch.where(count > 0, means, 0)  # What was not called left anything there.
        variances = torch.where(inside > 0, variances, 0)
        mean = (means * share).sum(0)
        squares = (variances * inside).sum(0) + ((means - mean).square_() * count).sum(0)
        return totals, mean, squares

    def _for_channels(self, weights: Sequence[Sequence[float]], like: Tensor) -> Tensor:
        """Return each list, one number a layer, as a row, one number a channel, without waiting."""
        numbers = torch.tensor(weights, dtype=like.dtype).to(like.device, non_blocking=True)
        repeats = self._repeats = self._repeats.to(like.device, non_blocking=True)
        return numbers.repeat_interleave(repeats, dim=1, output_size=len(like))

    def put_back(self) -> None:
        """Give the layers their own buffers back."""
        for layer, track in self._tracks.items():
            layer._buffers.update(track.own)

    @torch.no_grad()
    def apply(self) -> None:
        """Move every layer's own statistics once for each of its calls."""
        for place, pooled in enumerate(self._pooled):
            counts, mean, squares = self._together(pooled)
            momenta = [
                _next_momentum(layer) if place < track.calls else 0.0
                for layer, track in self._tracks.items()
            ]
            # One value has no unbiased variance. Undivided, torch would refuse it.
            weights = (
                [m if n > 0 else 0.0 for m, n in zip(momenta, counts, strict=True)],
                [m if n > 1 else 0.0 for m, n in zip(momenta, counts, strict=True)],
                [max(n - 1, 1) for n in counts],
            )
            for_mean, for_variance, degrees = self._for_channels(weights, mean)
            own = [_statistics(track.own) for track in self._tracks.values()]
            self._move([one for one, _ in own], mean, for_mean)
            self._move([variance for _, variance in own], squares / degrees, for_variance)

    def _move(self, own: list[Tensor], pooled: Tensor, weights: Tensor) -> None:
        moved = _joined(own).lerp_(pooled, weights)
        torch._foreach_copy_(own, moved.split(self._channels))


def _next_momentum(layer: _BatchNorm) -> float:
    """Count one more batch, and return the momentum with which torch would add it."""
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
    if layer.momentum is not None:
        return layer.momentum
    # The average over batches. Where none are counted, torch moves nothing.
    return 0.0 if layer.num_batches_tracked is None else 1 / float(layer.num_batches_tracked)


@torch.no_grad()
def _moments_of(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return each channel's mean and unbiased variance; of a single value 0, of none anything."""
    dimensions = [0, *range(2, values.dim())]
    several = values.numel() > values.shape[1]
    variance, mean = torch.var_mean(_widened(values), dimensions, correction=int(several))
    return mean, variance


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return _widened(torch.cat(list(tensors)))


def _widened(tensor: Tensor) -> Tensor:
    """In 16 bits the squares of 70,000 values are infinite."""
    return tensor.float() if tensor.itemsize < 4 else tensor


def _statistics(buffers: Mapping[str, Tensor | None]) -> tuple[Tensor, Tensor]:
    mean, variance = buffers["running_mean"], buffers["running_var"]
    assert mean is not None
    assert variance is not None
    return mean, variance
