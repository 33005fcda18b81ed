"""How far two values may differ before a check calls them different, by floating type."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """The largest difference of two equal values, as a fraction of the larger one.

    Attributes:
        float64: For values of 64 bits.
        float32: For values of 32 bits.
        float16: For float16.
        bfloat16: For bfloat16, and for every type that is coarser.
    """

    float64: float
    float32: float
    float16: float
    bfloat16: float

    def of(self, *dtypes: torch.dtype) -> float:
        """Return the tolerance of the coarsest of one or more types."""
        return max(map(self._of_one, dtypes))

    def _of_one(self, dtype: torch.dtype) -> float:
        real = dtype.to_real()
        if real is torch.float16:
            return self.float16
        return {8: self.float64, 4: self.float32}.get(real.itemsize, self.bfloat16)
