"""Reference values for a tolerable batch: every size near it, and the prediction."""

import importlib.util
import math
import time
from collections.abc import Callable
from typing import Final

from torch import nn

from autobatch import AutobatchError, SearchResult, Trial, predict
from benchmarks.capacity.case import OPTIMIZERS, Case

_NEAR: Final = 0.01  # Sizes to scan, as a fraction of the size that was found.
_AT_LEAST: Final = 8


def scan(
    case: Case, trial: Callable[[int], Trial], found: SearchResult, until: float
) -> dict[str, object] | None:
    """Try every size above the one that was found, up to one percent and at least eight more.

    Returns None on the CPU, whose meter is exact, and where there is no time for eight sizes.
    """
    if case.device.type == "cpu" or found.size >= case.ceiling:
        return None
    above = found.size + max(math.ceil(_NEAR * found.size), _AT_LEAST)
    largest = through = found.size
    for size in range(found.size + 1, min(above, case.ceiling) + 1):
        if time.monotonic() > until:
            break
        through = size
        largest = size if trial(size).fits else largest
    if through - found.size < min(_AT_LEAST, case.ceiling - found.size):
        return None
    return {
        "largest": largest,
        "found_over_largest": found.size / largest,
        "through": through,
    }


def predicted(
    case: Case, model: nn.Module, found: SearchResult, until: float
) -> dict[str, object] | None:
    """Return the prediction for this card; None where there is none.

    Imitated cards are not predicted: the CPU's meter counts tensors, not an allocator's blocks.
    """
    if case.imitates or case.card is None or case.config.optimizer is None:
        return None
    if importlib.util.find_spec("cloudpickle") is None or time.monotonic() > until:
        return None
    try:
        said = predict(
            model,
            case.spec.data(case.ceiling),
            gpu=case.card,
            loss=case.spec.loss,
            optimizer=OPTIMIZERS[case.config.optimizer],
            precision=case.config.precision,
        )
    except AutobatchError:
        return None
    return {
        "tolerable_safe": said.tolerable,
        "tolerable_likely": said.largest,
        "peak_bytes_at_found": said.peak_bytes(found.size),
    }
