"""Where a device's memory goes at one size."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Final

from autobatch.units import format_bytes

_NAMES: Final = {
    "parameter_bytes": "parameters",
    "buffer_bytes": "buffers",
    "gradient_bytes": "gradients",
    "optimizer_state_bytes": "optimizer state",
    "named_bytes": "what state names",
    "activation_bytes": "activations and temporaries",
    "cached_bytes": "cached but unused",
    "outside_bytes": "outside the allocator",
    "other_process_bytes": "other processes",
    "headroom_bytes": "headroom",
    "free_bytes": "free",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Breakdown:
    """Where memory goes at one size, in bytes: the parts, less what is missing, are the total.

    At a size that fits, nothing is missing. At one that does not, ``activation_bytes`` and
    ``missing_bytes`` are what is known to be needed at least.

    Attributes:
        parameter_bytes: The model's, and the loss's where it is a module.
        buffer_bytes: BatchNorm's statistics, say.
        gradient_bytes: One for each parameter that is trained, counted as alive at the peak.
        optimizer_state_bytes: Adam's moments, say.
        named_bytes: The tensors that ``find_largest`` was told of as ``state``.
        activation_bytes: The rest of the peak: activations, batches, temporaries.
        cached_bytes: The most that the caching allocator held, less the peak.
        outside_bytes: Held, but not by this process's allocator: the driver's context, libraries,
            and other processes where they are not told apart.
        other_process_bytes: What other processes hold, where the driver names them.
        headroom_bytes: Kept free.
        free_bytes: What a larger size could have had.
        missing_bytes: How much more than the total is needed, at least.
    """

    parameter_bytes: int = 0
    buffer_bytes: int = 0
    gradient_bytes: int = 0
    optimizer_state_bytes: int = 0
    named_bytes: int = 0
    activation_bytes: int = 0
    cached_bytes: int = 0
    outside_bytes: int = 0
    other_process_bytes: int = 0
    headroom_bytes: int = 0
    free_bytes: int = 0
    missing_bytes: int = 0

    def __post_init__(self) -> None:
        for item in fields(self):
            if (part := getattr(self, item.name)) < 0:
                raise ValueError(f"{item.name} must not be negative, got {part}")

    @property
    def parts(self) -> dict[str, int]:
        """Every part that is not empty, by its name for people."""
        return {name: part for key, name in _NAMES.items() if (part := getattr(self, key))}

    @property
    def total_bytes(self) -> int:
        """What the device has, or what a ``memory_limit`` leaves of it."""
        return self.needed_bytes - self.missing_bytes

    @property
    def needed_bytes(self) -> int:
        """How much of it there must be: the total, or at least so much where some is missing."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        total, missing = self.total_bytes, self.missing_bytes
        rows = [*self.parts.items(), ("at least" if missing else "in all", self.needed_bytes)]
        if missing:
            rows += [("there is", total), ("missing, at least", missing)]
        width = max(len(name) for name, _ in rows)
        return "\n".join(
            f"{name:<{width}}   {format_bytes(part):>10}" + ("" if missing else _share(part, total))
            for name, part in rows
        )


def break_down(
    needs: Mapping[str, int],
    *,
    peak_bytes: int,
    reserved_bytes: int | None,
    limit_bytes: int,
    total_bytes: int,
    outside_bytes: int,
    others_bytes: int | None = None,
) -> Breakdown:
    """Return where the memory goes.

    Args:
        needs: What lives on the device whatever the size, by the names of ``Breakdown.parts``:
            parameters, buffers, gradients, optimizer state, what state names.
        peak_bytes: The most bytes allocated; of a size that does not fit, what it needs at least.
        reserved_bytes: The most bytes the caching allocator held; None where nothing is cached.
        limit_bytes: What the allocator may hold; below zero where nothing is left.
        total_bytes: What the device has, or a ``memory_limit``.
        outside_bytes: Held on it, but not by this process's allocator.
        others_bytes: What other processes hold of that, or None where it is not known. More
            than ``outside_bytes`` cannot be true (in a container the driver may not know us, and
            name us among the others), and is not believed.
    """
    fixed = {key: max(needs.get(name, 0), 0) for key, name in _NAMES.items()}
    fixed_bytes = sum(fixed.values())
    used = max(peak_bytes, fixed_bytes, 0)
    outside, total = max(outside_bytes, 0), max(total_bytes, 0)
    others = others_bytes if others_bytes is not None and 0 <= others_bytes <= outside else 0
    headroom = max(total - outside - max(limit_bytes, 0), 0)
    left = total - outside - headroom - used
    cached = min(max((reserved_bytes or 0) - used, 0), max(left, 0))
    return Breakdown(
        **fixed
        | {
            "activation_bytes": used - fixed_bytes,
            "cached_bytes": cached,
            "outside_bytes": outside - others,
            "other_process_bytes": others,
            "headroom_bytes": headroom,
            "free_bytes": max(left - cached, 0),
            "missing_bytes": max(-left, 0),
        }
    )


def _share(part: int, total: int) -> str:
    percent = 100 * part / total if total else 100.0
    told = "<0.1" if 0 < percent < 0.1 else f"{percent:.1f}"
    return f"   {told + '%':>6}"
