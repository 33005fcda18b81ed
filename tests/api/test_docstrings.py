"""The examples in public docstrings run as they stand."""

import inspect
import textwrap
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import autobatch
from autobatch.devices.cpu import CpuDevice
from autobatch.training.engine.batch_gradient import BatchGradient
from autobatch.training.engine.micro_batch_size import MicroBatchSize

EXAMPLES = [
    "Accumulator",
    "BatchLoss",
    "StepOptions",
    "check",
    "find_and_train",
    "find_batch_size",
    "find_largest",
]
VALUES = [
    "BatchPlan",
    "Evaluation",
    "Phase",
    "SearchOptions",
    "SearchResult",
    "Shared",
    "Speed",
    "StepResult",
    "TrainingResult",
    "Trial",
    "Upper",
    "Verdict",
]


def example_of(documented: object) -> str:
    """Return the first indented block after a line that ends with ``::``."""
    _, colons, rest = (inspect.getdoc(documented) or "").partition("::\n\n")
    assert colons, f"{documented} shows no example"
    lines: list[str] = []
    for line in rest.splitlines():
        if line and not line.startswith("    "):
            break
        lines.append(line)
    return textwrap.dedent("\n".join(lines))


def run_example(name: str) -> None:
    public: dict[str, Any] = {each: getattr(autobatch, each) for each in autobatch.__all__}
    torches = {"torch": torch, "nn": nn, "DataLoader": DataLoader, "TensorDataset": TensorDataset}
    namespace = public | torches | {"autobatch": autobatch}
    exec(compile(example_of(getattr(autobatch, name)), f"the example of {name}", "exec"), namespace)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_of_a_docstring_runs(name: str) -> None:
    assert f"{name}(" in example_of(getattr(autobatch, name))
    run_example(name)


@pytest.mark.parametrize("name", VALUES)
def test_a_value_shows_an_example_that_runs_and_describes_its_attributes(name: str) -> None:
    run_example(name)
    assert "\nAttributes:\n" in (inspect.getdoc(getattr(autobatch, name)) or "")


def test_the_example_of_the_gradient_s_docstring_runs() -> None:
    names = {"torch": torch, "nn": nn, "StepOptions": autobatch.StepOptions}
    engine = {each.__name__: each for each in (BatchGradient, CpuDevice, MicroBatchSize)}
    code = example_of(BatchGradient.compute)
    assert ".compute(" in code
    exec(compile(code, "the example of BatchGradient.compute", "exec"), names | engine)


@pytest.mark.parametrize("name", EXAMPLES)
def test_what_goes_in_and_what_can_go_wrong_is_described(name: str) -> None:
    text = inspect.getdoc(getattr(autobatch, name)) or ""
    assert "\nArgs:\n" in text or "\nAttributes:\n" in text
    assert "\nRaises:\n" in text
    assert text.splitlines()[0].endswith(".")
