"""Samples of a noisy clock, and what is said of them."""

import statistics


class Samples(list[float]):
    """One number, measured at least once."""

    @property
    def median(self) -> float:
        """The middle."""
        return statistics.median(self)

    def __str__(self) -> str:
        return f"{self.median:.3g} [{min(self):.3g}, {max(self):.3g}]"
