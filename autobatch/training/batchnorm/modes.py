"""The three modes of BatchNorm, and which layers update their running statistics."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Final, Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

BatchNormMode = Literal["micro", "frozen", "refuse"]
_MODES: Final[tuple[BatchNormMode, ...]] = ("micro", "frozen", "refuse")


def check_batch_norm(mode: object) -> BatchNormMode:
    """Return the mode if it is one of the three.

    Raises:
        ValueError: With the value that was passed.
    """
    for known in _MODES:
        if mode == known:
            return known
    raise ValueError(f"batch_norm must be one of {', '.join(map(repr, _MODES))}, got {mode!r}")


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Normalise by the running statistics inside, and do not update them; weights still train.

    No example depends on another then, so any split is exact. InstanceNorm stays as it is: it
    normalises each example by itself already.

    Args:
        model: In the mode in which it trains.

    Raises:
        ValueError: If a layer keeps no running statistics. Nothing was changed.
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
        for layer in layers:  # Not eval(), which would also reach submodules.
            layer.training = False
        yield
    finally:
        for layer in layers:
            layer.training = True


def normalises_by_batch(modules: Iterable[nn.Module]) -> bool:
    """Return whether a module among them normalises by the statistics of its input."""
    return any(
        isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)
        for module in modules
    )


def updating_layers(modules: Iterable[nn.Module]) -> list[_BatchNorm]:
    """Return the BatchNorm layers whose running statistics a forward pass updates."""
    return [module for module in modules if isinstance(module, _BatchNorm) and _updates(module)]


def _updates(layer: _BatchNorm) -> bool:
    # track_running_stats may have become False later: then the buffers exist, and stay unchanged.
    has_statistics = layer._buffers["running_mean"] is not None  # Faster than getattr.
    return has_statistics and layer.training and layer.track_running_stats
