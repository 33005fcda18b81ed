"""The plan by which a desired batch is cut into micro-batches."""

from dataclasses import dataclass

from autobatch.validation import check_size


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """How a desired batch is cut into micro-batches that the device tolerates.

    Attributes:
        desired: Examples per optimizer step.
        tolerable: The most examples that one forward and backward can hold.
        multiple_of: What every micro-batch but the last is a multiple of.
    """

    desired: int
    tolerable: int
    multiple_of: int = 1

    def __post_init__(self) -> None:
        for name in ("desired", "tolerable", "multiple_of"):
            object.__setattr__(self, name, check_size(name, getattr(self, name)))

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches per logical batch: as few as ``tolerable`` allows."""
        return len(self.micro_batch_sizes)

    @property
    def micro_batch_sizes(self) -> tuple[int, ...]:
        """Sizes as even as can be: 10 by 4 is ``(4, 3, 3)``."""
        return even_sizes(self.desired, self.tolerable, self.multiple_of)

    @property
    def micro_batch(self) -> int:
        """The largest micro-batch of the plan."""
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
    """Return the fewest sizes of at most ``tolerable`` that add up, as even as can be.

    All but the last are multiples of ``multiple_of``: 256 by 100 in eights is ``(88, 88, 80)``. Not
    where ``tolerable`` is below it.
    """
    if multiple_of > min(tolerable, desired):
        multiple_of = 1
    units = -(-desired // multiple_of)
    steps = -(-units // (tolerable // multiple_of))
    size, larger = divmod(units, steps)
    sizes = (size + 1,) * larger + (size,) * (steps - larger)
    if multiple_of == 1:  # In every window of training.
        return sizes
    beyond = units * multiple_of - desired
    return (*(size * multiple_of for size in sizes[:-1]), sizes[-1] * multiple_of - beyond)


def useful_sizes(desired: int, multiple_of: int = 1) -> tuple[int, ...]:
    """Return the sizes that matter for ``desired``, ascending: each ``ceil(desired / k)``.

    A tolerable batch between two of them needs as many micro-batches as the lower one, so only
    these are worth a trial: 31 of the 256 sizes up to 256. There are at most ``2 * sqrt(desired)``.

    Args:
        desired: The logical batch.
        multiple_of: What all of them but ``desired`` are multiples of.
    """
    desired = check_size("desired", desired)
    if multiple_of > 1:
        units = useful_sizes(-(-desired // multiple_of))
        return tuple(min(unit * multiple_of, desired) for unit in units)
    sizes = [desired]
    while sizes[-1] > 1:
        steps = -(-desired // (sizes[-1] - 1))  # The fewest micro-batches smaller than the last.
        sizes.append(-(-desired // steps))
    return tuple(reversed(sizes))
