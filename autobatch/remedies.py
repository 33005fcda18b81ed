"""What would help a batch that does not fit, and by how much."""

import re
from dataclasses import dataclass
from typing import Final

from autobatch.breakdown import Breakdown
from autobatch.compat.platform import spilling_platform
from autobatch.units import format_bytes

_REQUEST: Final = re.compile(r"tried to allocate (\d+\.\d\d) ([KMGT])iB", re.IGNORECASE)
_ALLOCATED: Final = re.compile(r"(\d+\.\d\d) ([KMGT])iB is allocated by PyTorch", re.IGNORECASE)
_UNALLOCATED: Final = re.compile(
    r"(\d+\.\d\d) ([KMGT])iB is reserved by PyTorch but unallocated", re.IGNORECASE
)
_ROUNDED: Final = 0.005  # Of a unit: two decimals are told.

# Torch 2.11 and later, which alone are supported, know the setting by this name.
JOINED_PIECES: Final = "PYTORCH_ALLOC_CONF=expandable_segments:True, set before Python starts,"


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """Something to do about it.

    Attributes:
        action: What to do.
        effect: What that changes, and by how much.
        bytes: The figure in ``effect``.
    """

    action: str
    effect: str
    bytes: int

    def __str__(self) -> str:
        return f"{self.action}: {self.effect}"


def what_would_help(
    breakdown: Breakdown, message: str = "", *, predicted: bool = False
) -> tuple[Remedy, ...]:
    """Return what follows from the numbers: what frees most first, more memory last.

    Whether one of them is enough is not known: what is missing is known as a lower bound only, and
    so is the optimizer's state, which may not have fitted either.

    Args:
        breakdown: Of a size that does not fit.
        message: What its failure said.
        predicted: Whether it is of a GPU that is not here, where there is no limit to raise.
    """
    gradients, state = breakdown.gradient_bytes, breakdown.optimizer_state_bytes
    activations = breakdown.activation_bytes
    of_step = [
        _remedy(
            "SGD without momentum as the optimizer", state, "frees at least {} of optimizer state"
        ),
        # Momentum takes as many bytes as gradients do; Adam's two moments twice as many.
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
    # Where all of a step's own would not make up for what is missing, none of it is advice.
    known = of_step if breakdown.missing_bytes <= gradients + state + activations else []
    known += [
        _remedy("ending other processes", breakdown.other_process_bytes, "frees up to {}"),
        _remedy("headroom=0", breakdown.headroom_bytes, "frees {}"),
        _remedy(
            JOINED_PIECES.rstrip(","),
            torn_bytes(message),
            "may join {} that are reserved, in pieces too small for what was asked for",
        ),
    ]
    helpful = sorted((r for r in known if r.bytes > 0), key=lambda r: r.bytes, reverse=True)
    return (*helpful, _more_memory(breakdown, predicted=predicted))


def needed_bytes(message: str) -> int:
    """Return what a CUDA failure's text says was needed at that moment, or 0 where it does not.

    That is what tensors held and what was asked for, rounded down as far as two decimals allow.
    """
    figures = [_REQUEST.search(message), _ALLOCATED.search(message)]
    read = [_at_least(found[1], found[2]) for found in figures if found]
    return sum(read) if len(read) == len(figures) else 0


def torn_bytes(message: str) -> int:
    """Return what a CUDA failure's text says is reserved and unused, if it would have been enough.

    0 otherwise, and on Windows and WSL, where the allocator cannot join it (pytorch#192330).
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
