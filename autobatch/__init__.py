"""autobatch: train on the batch that is wanted, on the device that is there."""

import importlib
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from autobatch.api import check, find_and_train, find_batch_size
    from autobatch.batches.marks import Shared
    from autobatch.devices.failures import verdict_of
    from autobatch.errors import (
        AutobatchError,
        CheckpointError,
        DeviceLostError,
        DeviceUnavailableError,
        DoesNotFitError,
        InexactStepError,
        NonFiniteLossError,
        ProcessDiedError,
        ReplayLimitError,
        SearchTimeoutError,
        StepInterruptedError,
    )
    from autobatch.largest import find_largest
    from autobatch.plan import BatchPlan
    from autobatch.prediction.predict import peak, predict
    from autobatch.prediction.result import Prediction
    from autobatch.probing.options import SearchOptions
    from autobatch.results import (
        Evaluation,
        Phase,
        SearchResult,
        Speed,
        StepResult,
        TrainingResult,
        Trial,
        Upper,
        Verdict,
    )
    from autobatch.training.step import Accumulator
    from autobatch.training.whole_batch import WholeBatch

__all__ = [
    "Accumulator",
    "AutobatchError",
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


_HOMES: Final = {
    "Accumulator": "autobatch.training.step",
    "AutobatchError": "autobatch.errors",
    "BatchPlan": "autobatch.plan",
    "CheckpointError": "autobatch.errors",
    "DeviceLostError": "autobatch.errors",
    "DeviceUnavailableError": "autobatch.errors",
    "DoesNotFitError": "autobatch.errors",
    "Evaluation": "autobatch.results",
    "InexactStepError": "autobatch.errors",
    "NonFiniteLossError": "autobatch.errors",
    "Phase": "autobatch.results",
    "Prediction": "autobatch.prediction.result",
    "ProcessDiedError": "autobatch.errors",
    "ReplayLimitError": "autobatch.errors",
    "SearchOptions": "autobatch.probing.options",
    "SearchResult": "autobatch.results",
    "SearchTimeoutError": "autobatch.errors",
    "Shared": "autobatch.batches.marks",
    "Speed": "autobatch.results",
    "StepInterruptedError": "autobatch.errors",
    "StepResult": "autobatch.results",
    "TrainingResult": "autobatch.results",
    "Trial": "autobatch.results",
    "Upper": "autobatch.results",
    "Verdict": "autobatch.results",
    "WholeBatch": "autobatch.training.whole_batch",
    "check": "autobatch.api",
    "find_and_train": "autobatch.api",
    "find_batch_size": "autobatch.api",
    "find_largest": "autobatch.largest",
    "peak": "autobatch.prediction.predict",
    "predict": "autobatch.prediction.predict",
    "verdict_of": "autobatch.devices.failures",
}


def __getattr__(name: str) -> object:
    """Import what is asked for, when it is: torch takes seconds, and not all need it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(importlib.import_module(_HOMES[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
