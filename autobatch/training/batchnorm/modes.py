"""BatchNorm in a window that is cut: which layers move, and how they are kept from moving."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Final, Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

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
    has_some = layer._buffers["running_mean"] is not None  # Asked for by name it takes a search.
    return has_some and layer.training and layer.track_running_stats
