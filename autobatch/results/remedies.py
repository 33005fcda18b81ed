"""Remedies for a batch that does not fit, with the bytes that each frees."""

import re
from dataclasses import dataclass
from typing import Final

from autobatch.compat.platform import spilling_platform
from autobatch.results.memory import Breakdown
from autobatch.units import format_bytes

_REQUEST: Final = re.compile(r"tried to allocate (\d+\.\d\d) ([KMGT])iB", re.IGNORECASE)
_ALLOCATED: Final = re.compile(r"(\d+\.\d\d) ([KMGT])iB is allocated by PyTorch", re.IGNORECASE)
_UNALLOCATED: Final = re.compile(
    r"(\d+\.\d\d) ([KMGT])iB is reserved by PyTorch but unallocated", re.IGNORECASE
)
_ROUNDED: Final = 0.005  # The rounding error of a figure: the text has two decimals.

# The name of the setting since torch 2.11, the oldest version that is supported.
EXPANDABLE_SEGMENTS: Final = (
    "PYTORCH_ALLOC_CONF=expandable_segments:True, set before Python starts,"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """A change that the user can make to free memory.

    Attributes:
        action: The change, in words.
        effect: The effect of the change, in words, with its figure.
        bytes: The figure in ``effect``, in bytes.
    """

    action: str
    effect: str
    bytes: int

    def __str__(self) -> str:
        return f"{self.action}: {self.effect}"


def what_would_help(
    breakdown: Breakdown, message: str = "", *, predicted: bool = False
) -> tuple[Remedy, ...]:
    """Return the remedies for a size that does not fit, sorted by the bytes that each frees.

    The last remedy is more memory. One remedy alone may not be enough: the missing bytes and the
    optimizer state are lower bounds.

    Args:
        breakdown: The memory of a size that does not fit.
        message: The text of the error.
        predicted: Whether the memory was predicted for a GPU of another machine, where no limit
            can be raised.
    """
    gradients, state = breakdown.gradient_bytes, breakdown.optimizer_state_bytes
    activations = breakdown.activation_bytes
    of_step = [
        _remedy(
            "SGD without momentum as the optimizer", state, "frees at least {} of optimizer state"
        ),
        # Momentum takes as many bytes as the gradients; Adam's two moments take twice as many.
        _remedy(
            "SGD with momentum as the optimizer",
            state - gradients,
            "frees at least {} of optimizer state",
        ),
        _remedy(
            "freezing parameters before the optimizer is made",
            gradients + state,
            "frees gradients and optimizer state, which take at least {}",
        ),
        _remedy(
            'smaller inputs, checkpointed activations or precision="bf16"',
            activations,
            "lowers activations and temporaries, which take at least {}",
        ),
    ]
    # None of these helps if all bytes of the step are less than the missing bytes.
    known = of_step if breakdown.missing_bytes <= gradients + state + activations else []
    known += [
        _remedy("ending other processes", breakdown.other_process_bytes, "frees up to {}"),
        _remedy("headroom=0", breakdown.headroom_bytes, "frees {}"),
        _remedy(
            EXPANDABLE_SEGMENTS.rstrip(","),
            fragmented_bytes(message),
            "may make {} usable that are reserved but fragmented",
        ),
    ]
    helpful = sorted((r for r in known if r.bytes > 0), key=lambda r: r.bytes, reverse=True)
    return (*helpful, _more_memory(breakdown, predicted=predicted))


def needed_bytes(message: str) -> int:
    """Return the needed bytes from the text of a CUDA error; 0 if the text holds no figures.

    The needed bytes are those of all tensors and of the failed request, at the lower end of the
    rounding of the text.
    """
    figures = [_REQUEST.search(message), _ALLOCATED.search(message)]
    read = [_at_least(found[1], found[2]) for found in figures if found]
    return sum(read) if len(read) == len(figures) else 0


def fragmented_bytes(message: str) -> int:
    """Return the reserved but unallocated bytes from the text of a CUDA error.

    Returns 0 if they are fewer than the failed request, so that fragmentation is not the cause, and
    on Windows and WSL, where the allocator has no expandable segments (pytorch#192330).
    """
    unused, request = _UNALLOCATED.search(message), _REQUEST.search(message)
    if unused is None or request is None or spilling_platform():
        return 0
    unused_bytes = _at_least(unused[1], unused[2])
    return unused_bytes if unused_bytes >= _at_least(request[1], request[2]) else 0


def _remedy(action: str, count: int, effect: str) -> Remedy:
    return Remedy(action=action, effect=effect.format(format_bytes(count)), bytes=count)


def _more_memory(breakdown: Breakdown, *, predicted: bool) -> Remedy:
    action = "a GPU with more memory" if predicted else "a larger memory_limit or device"
    effect = "at least {} in all" if breakdown.missing_bytes else "{} are not enough"
    return _remedy(action, breakdown.needed_bytes, effect)


def _at_least(number: str, letter: str) -> int:
    unit = 1024 ** ("KMGT".index(letter.upper()) + 1)
    return int((float(number) - _ROUNDED) * unit)
