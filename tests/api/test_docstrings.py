"""The examples in public docstrings run as they stand."""

import inspect
import textwrap
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import autobatch

EXAMPLES = [
    "Accumulator",
    "BatchLoss",
    "StepOptions",
    "check",
    "find_and_train",
    "find_batch_size",
    "find_largest",
]


def example_of(name: str) -> str:
    """Return the first indented block after a line that ends with ``::``."""
    _, colons, rest = (inspect.getdoc(getattr(autobatch, name)) or "").partition("::\n\n")
    assert colons, f"{name} shows no example"
    lines: list[str] = []
    for line in rest.splitlines():
        if line and not line.startswith("    "):
            break
        lines.append(line)
    return textwrap.dedent("\n".join(lines))


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_of_a_docstring_runs(name: str) -> None:
    public: dict[str, Any] = {each: getattr(autobatch, each) for each in autobatch.__all__}
    torches = {"torch": torch, "nn": nn, "DataLoader": DataLoader, "TensorDataset": TensorDataset}
    code = example_of(name)
    assert f"{name}(" in code
    exec(compile(code, f"the example of {name}", "exec"), public | torches)


@pytest.mark.parametrize("name", EXAMPLES)
def test_what_goes_in_and_what_can_go_wrong_is_described(name: str) -> None:
    text = inspect.getdoc(getattr(autobatch, name)) or ""
    assert "\nArgs:\n" in text or "\nAttributes:\n" in text
    assert "\nRaises:\n" in text
    assert text.splitlines()[0].endswith(".")
