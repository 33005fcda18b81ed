"""What a user should know of a search's memory: where it ran, and whether it is fragmented."""

from collections.abc import Iterator
from typing import Final

import torch

from autobatch.devices.factory import backend_of
from autobatch.results.search import SearchResult
from autobatch.units import format_bytes

_MUCH: Final = 0.2  # A share of the reserved bytes,
_WORTH_BYTES: Final = 256 * 2**20  # and at least so much: a small gap is rounding.


def advice(device: torch.device, search: SearchResult) -> Iterator[str]:
    """Yield a sentence for each thing that a user may want to know or change.

    Args:
        device: Where the trials ran.
        search: What the trials showed.
    """
    yield from backend_of(device).memory_notes()
    chosen = [trial for trial in search.trials if trial.fits and trial.size == search.size]
    if chosen:
        last = chosen[-1]
        yield from fragmented(device, last.peak_bytes, last.reserved_bytes, "the trial")


def fragmented(
    device: torch.device, peak_bytes: int | None, reserved_bytes: int | None, where: str
) -> Iterator[str]:
    """Yield what helps where the allocator reserved much more than its tensors took at once.

    Args:
        device: Whose memory it is.
        peak_bytes: The most in tensors at once; None where unknown.
        reserved_bytes: The most that the allocator held; None where nothing is cached.
        where: What held the memory, in words.
    """
    gap_bytes = (reserved_bytes or 0) - (peak_bytes or 0)
    if not peak_bytes or gap_bytes < max(_MUCH * (reserved_bytes or 0), _WORTH_BYTES):
        return
    remedy = backend_of(device).fragmentation_remedy()
    way_out = f"; {remedy} may join them" if remedy else ""
    yield (
        f"{where} held {format_bytes(gap_bytes)} more than its tensors ever took: the allocator's "
        f"memory is in pieces that are too small, as after batches of many lengths{way_out}"
    )
