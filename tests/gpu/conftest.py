"""The GPU's tests: without a GPU they fail. A skip would look like a pass."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _needs_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.fail(f"no GPU: torch {torch.__version__} sees none; run these where there is one")
