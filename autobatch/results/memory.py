"""The breakdown of a device's memory at one batch size."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Final

from autobatch.units import format_bytes, format_share

_NAMES: Final = {
    "parameter_bytes": "parameters",
    "buffer_bytes": "buffers",
    "gradient_bytes": "gradients",
    "optimizer_state_bytes": "optimizer state",
    "named_bytes": "tensors in state",
    "activation_bytes": "activations and temporaries",
    "cached_bytes": "cached but unused",
    "outside_bytes": "outside the allocator",
    "other_process_bytes": "other processes",
    "headroom_bytes": "headroom",
    "free_bytes": "free",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Breakdown:
    """Where the memory of a device goes at one batch size, in bytes.

    The sum of the parts, minus ``missing_bytes``, is ``total_bytes``. At a size that fits,
    ``missing_bytes`` is 0. At a size that does not fit, ``activation_bytes`` and ``missing_bytes``
    are lower bounds.

    Attributes:
        parameter_bytes: Parameters of the model, and of the loss if it is a module.
        buffer_bytes: Buffers, such as the running statistics of BatchNorm.
        gradient_bytes: Gradients of all trained parameters.
        optimizer_state_bytes: State of the optimizer, such as the moments of Adam.
        named_bytes: Tensors in the argument ``state`` of ``find_largest``.
        activation_bytes: The rest of the peak: activations, batches, temporary tensors.
        cached_bytes: The most that the caching allocator held beyond the peak.
        outside_bytes: Memory outside this process's allocator: the driver's context, libraries,
            and other processes if the driver does not list them.
        other_process_bytes: Memory of other processes, if the driver lists them.
        headroom_bytes: Memory that is kept free, as ``headroom`` requests.
        free_bytes: Memory that a larger size could use.
        missing_bytes: How much more than ``total_bytes`` is needed, at least.
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
        """The parts that are not 0, by their names in the printed table."""
        return {name: part for key, name in _NAMES.items() if (part := getattr(self, key))}

    @property
    def total_bytes(self) -> int:
        """The memory of the device, or ``memory_limit`` if there is one."""
        return self.needed_bytes - self.missing_bytes

    @property
    def needed_bytes(self) -> int:
        """The memory that the size needs: ``total_bytes`` plus ``missing_bytes``."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        total, missing = self.total_bytes, self.missing_bytes
        rows = [*self.parts.items(), ("at least" if missing else "in all", self.needed_bytes)]
        if missing:
            rows += [("available", total), ("missing, at least", missing)]
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
    """Return the breakdown of the measured memory.

    Args:
        needs: Bytes that do not depend on the size, by the names of ``Breakdown.parts``:
            parameters, buffers, gradients, optimizer state, tensors in state.
        peak_bytes: The peak of allocated bytes; a lower bound for a size that does not fit.
        reserved_bytes: The most bytes that the caching allocator held; None without a cache.
        limit_bytes: The bytes that the allocator may hold; below 0 if other memory exceeds the
            total.
        total_bytes: The memory of the device, or ``memory_limit``.
        outside_bytes: Used memory of the device outside this process's allocator.
        others_bytes: The part of ``outside_bytes`` that other processes hold; None if unknown.
            A larger value than ``outside_bytes`` is ignored: in a container, the driver may list
            this process among the others.
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
    return f"   {format_share(part / total if total else 1.0):>6}"
