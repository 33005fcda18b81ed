"""What else is to be known of a search's memory: where it ran, and in how many pieces it lies."""

from collections.abc import Iterator
from typing import Final

import torch

from autobatch.compat.platform import spilling_platform
from autobatch.remedies import JOINED_PIECES
from autobatch.results import SearchResult
from autobatch.units import format_bytes

_MUCH: Final = 0.2  # Of what is reserved,
_WORTH_BYTES: Final = 256 * 2**20  # and at least so much: a small gap is rounding.


def advice(device: torch.device, search: SearchResult) -> Iterator[str]:
    """Yield a sentence for each thing that a user may want to know or change.

    Args:
        device: Where the trials ran.
        search: What they showed.
    """
    if device.type != "cuda":  # The others' torch reads nothing of this.
        return
    spilling = spilling_platform()
    if spilling:
        yield (
            f"on {spilling} the driver may keep in the host's memory what the GPU cannot hold, and "
            "slow down instead of running out; the limit and twice the headroom keep away from that"
        )
    if torch.backends.cudnn.benchmark:
        yield (
            "cudnn.benchmark is on: cuDNN chooses algorithms, and the workspaces that they need, "
            "at each shape anew, so a smaller size may need more memory; those that ran are known"
        )
    chosen = [trial for trial in search.trials if trial.fits and trial.size == search.size]
    if chosen:
        yield from torn(chosen[-1].peak_bytes, chosen[-1].reserved_bytes, "the trial")


def torn(peak_bytes: int | None, reserved_bytes: int | None, where: str) -> Iterator[str]:
    """Yield what helps where much is reserved in pieces that did not serve what was asked for."""
    gap_bytes = (reserved_bytes or 0) - (peak_bytes or 0)
    if not peak_bytes or gap_bytes < max(_MUCH * (reserved_bytes or 0), _WORTH_BYTES):
        return
    way_out = "" if spilling_platform() or _expands() else f"; {JOINED_PIECES} may join them"
    yield (
        f"{where} held {format_bytes(gap_bytes)} more than its tensors ever took: the allocator's "
        f"memory is torn into pieces, as batches of many lengths do{way_out}"
    )


def _expands() -> bool:
    """Whether the allocator joins pieces already; False where it does not tell."""
    try:
        settings = torch.cuda.memory._snapshot()["allocator_settings"]
        return bool(settings["expandable_segments"])
    except Exception:  # noqa: BLE001  # It is private: it may be gone, or not speak of it.
        return False
