"""Repeated measurements of one value."""

import statistics


class Samples(list[float]):
    """A value that was measured at least once; prints as ``median [minimum, maximum]``."""

    @property
    def median(self) -> float:
        """The median of the samples."""
        return statistics.median(self)

    def __str__(self) -> str:
        return f"{self.median:.3g} [{min(self):.3g}, {max(self):.3g}]"
