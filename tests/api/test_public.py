"""The public surface: growing it is a deliberate change of this file."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import autobatch

NAMES = [
    "Accumulator",
    "AutobatchError",
    "BatchLoss",
    "BatchPlan",
    "CheckpointError",
    "DeviceLostError",
    "DeviceUnavailableError",
    "DoesNotFitError",
    "Evaluation",
    "InexactStepError",
    "NonFiniteLossError",
    "Phase",
    "Prediction",
    "ProcessDiedError",
    "ReplayLimitError",
    "SearchOptions",
    "SearchResult",
    "SearchTimeoutError",
    "Shared",
    "Speed",
    "StepInterruptedError",
    "StepOptions",
    "StepResult",
    "TrainingResult",
    "Trial",
    "Upper",
    "Verdict",
    "WholeBatch",
    "check",
    "find_and_train",
    "find_batch_size",
    "find_largest",
    "peak",
    "predict",
    "verdict_of",
]
STEP = [  # Every entry point takes them, and shows them last.
    *["options", "forward", "batch_loss", "scaler", "precision", "clip_grad_norm"],
    *["clip_grad_value", "nonfinite", "batch_norm", "gradient_dtype", "snapshot_steps", "replay"],
    "snapshot_on_oom",
]
JOB = ["loss", "optimizer", "device", "memory_limit", "headroom"]
SIGNATURES = {
    "find_and_train": [
        *["model", "data", "desired", "loss", "optimizer", "scheduler", "scheduler_interval"],
        *["epochs", "max_steps", "drop_last", "device", "memory_limit", "headroom", "eval_data"],
        *["metrics", "checkpoint_dir", "on_step", "prefer", "search", "seed", "progress", *STEP],
    ],
    "find_batch_size": ["model", "data", "ceiling", *JOB, "mode", "search", "progress", *STEP],
    "find_largest": [
        *["run", "ceiling", "state", "device", "memory_limit", "headroom", "search", "progress"],
    ],
    "check": ["model", "data", "size", *JOB, "mode", "search", *STEP],
    "Accumulator": ["model", "optimizer", "loss", "micro_batch", "scheduler", *STEP],
    "StepOptions": ["loss", *STEP[1:]],
    "BatchLoss": ["function", "terms"],
    "SearchOptions": [
        *["confirm", "multiple_of", "timeout_seconds", "budget_seconds", "worst_case", "isolate"],
        *["prior", "floor", "forget_errors"],
    ],
    "Shared": ["value"],
    "WholeBatch": ["loss"],
    "BatchPlan": ["desired", "tolerable", "multiple_of"],
    "predict": [
        *["model", "data", "gpu", "desired", "ceiling", "loss", "optimizer", "mode", *STEP],
    ],
    "peak": ["step", "gpu", "desired", "ceiling"],
    "verdict_of": ["error"],
}


def test_the_public_names_are_these_in_order() -> None:
    assert autobatch.__all__ == NAMES == sorted(NAMES)
    assert all(hasattr(autobatch, name) for name in NAMES)


def test_a_name_is_imported_from_where_type_checkers_look_for_it() -> None:
    tree = ast.parse(Path(autobatch.__file__).read_text())
    (typed,) = [node for node in tree.body if isinstance(node, ast.If)]
    imports = [node for node in typed.body if isinstance(node, ast.ImportFrom)]
    homes = {alias.name: node.module for node in imports for alias in node.names}
    assert homes == autobatch._HOMES
    assert sorted(homes) == NAMES
    assert set(NAMES) <= set(dir(autobatch))
    with pytest.raises(AttributeError, match="module 'autobatch' has no attribute 'nothing'"):
        autobatch.nothing  # noqa: B018


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_public_signature_is_this(name: str) -> None:
    assert list(inspect.signature(getattr(autobatch, name)).parameters) == SIGNATURES[name]


@pytest.mark.parametrize("name", NAMES)
def test_everything_public_says_what_it_is(name: str) -> None:
    assert inspect.getdoc(getattr(autobatch, name))


def test_importing_autobatch_prints_nothing_and_touches_no_device() -> None:
    code = (
        "import os; before = dict(os.environ); import autobatch, torch; "
        "assert dict(os.environ) == before; assert not torch.cuda.is_initialized(); "
        "import sys; assert 'torchvision' not in sys.modules and 'sklearn' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
