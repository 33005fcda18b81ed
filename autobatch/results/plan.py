"""The plan of how a logical batch is cut into micro-batches."""

from dataclasses import dataclass

from autobatch.validation import check_size


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """How a logical batch is cut into micro-batches that fit into memory.

    Example::

        plan = BatchPlan(desired=256, tolerable=100)
        assert plan.accumulation_steps == 3
        assert plan.micro_batch_sizes == (86, 85, 85)

    Attributes:
        desired: Examples per optimizer step: the size of the logical batch.
        tolerable: The most examples that fit into one forward and backward pass.
        multiple_of: The size of every micro-batch but the last is a multiple of this.

    Raises:
        TypeError, ValueError: If a size is no integer of at least 1.
    """

    desired: int
    tolerable: int
    multiple_of: int = 1

    def __post_init__(self) -> None:
        for name in ("desired", "tolerable", "multiple_of"):
            object.__setattr__(self, name, check_size(name, getattr(self, name)))

    @property
    def accumulation_steps(self) -> int:
        """The number of micro-batches per logical batch: as few as ``tolerable`` allows."""
        return len(self.micro_batch_sizes)

    @property
    def micro_batch_sizes(self) -> tuple[int, ...]:
        """The sizes of the micro-batches, as even as possible: 10 by 4 is ``(4, 3, 3)``."""
        return even_sizes(self.desired, self.tolerable, self.multiple_of)

    @property
    def micro_batch(self) -> int:
        """The size of the largest micro-batch."""
        return self.micro_batch_sizes[0]

    def __str__(self) -> str:
        steps = self.accumulation_steps
        return (
            f"{self.desired} = {self._sum()}: {steps} accumulation step{'s' * (steps > 1)}, "
            f"tolerable batch {self.tolerable}"
        )

    def _sum(self) -> str:
        sizes = self.micro_batch_sizes
        if len(sizes) <= 4:
            return " + ".join(map(str, sizes))
        larger = sizes.count(sizes[0])
        parts = [(larger, sizes[0]), (len(sizes) - larger, sizes[-1])]
        return " + ".join(f"{count} x {size}" for count, size in parts if count)


def even_sizes(desired: int, tolerable: int, multiple_of: int = 1) -> tuple[int, ...]:
    """Return the sizes of the micro-batches of a logical batch: as few and as even as possible.

    Args:
        desired: The sum of the sizes.
        tolerable: The largest allowed size.
        multiple_of: Every size but the last is a multiple of this, unless ``tolerable`` or
            ``desired`` is smaller.

    Example:
        >>> even_sizes(256, 100, multiple_of=8)
        (88, 88, 80)
    """
    if multiple_of > min(tolerable, desired):
        multiple_of = 1
    units = -(-desired // multiple_of)
    steps = -(-units // (tolerable // multiple_of))
    size, larger = divmod(units, steps)
    sizes = (size + 1,) * larger + (size,) * (steps - larger)
    if multiple_of == 1:  # A fast path: training calls this for every logical batch.
        return sizes
    beyond = units * multiple_of - desired
    return (*(size * multiple_of for size in sizes[:-1]), sizes[-1] * multiple_of - beyond)


def useful_sizes(desired: int, multiple_of: int = 1) -> tuple[int, ...]:
    """Return the tolerable batches worth a trial, ascending: ``ceil(desired / k)`` for every ``k``.

    A size between two of them needs as many micro-batches as the lower of the two. For a logical
    batch of 256 only 31 sizes are left; there are at most ``2 * sqrt(desired)``.

    Args:
        desired: Examples in the logical batch.
        multiple_of: Every returned size but ``desired`` is a multiple of this.
    """
    desired = check_size("desired", desired)
    if multiple_of > 1:
        units = useful_sizes(-(-desired // multiple_of))
        return tuple(min(unit * multiple_of, desired) for unit in units)
    sizes = [desired]
    while sizes[-1] > 1:
        steps = -(-desired // (sizes[-1] - 1))  # The fewest steps with a smaller size.
        sizes.append(-(-desired // steps))
    return tuple(reversed(sizes))
