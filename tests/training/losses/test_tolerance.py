"""One table of tolerances serves all checks: the coarsest type decides."""

import pytest
import torch

from autobatch.training.losses.tolerance import Tolerance

TOLERANCE = Tolerance(float64=1.0, float32=2.0, float16=3.0, bfloat16=4.0)


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ([torch.float64], 1.0),
        ([torch.float32], 2.0),
        ([torch.float16], 3.0),
        ([torch.bfloat16], 4.0),
        ([torch.float8_e4m3fn], 4.0),
        ([torch.complex128], 1.0),
        ([torch.complex64], 2.0),
        ([torch.int64], 1.0),
        ([torch.int8], 4.0),
        ([torch.float64, torch.float16, torch.float32], 3.0),
    ],
)
def test_the_coarsest_type_decides(dtypes: list[torch.dtype], expected: float) -> None:
    assert TOLERANCE.of(*dtypes) == expected
