"""autobatch finds the largest batch that a device holds, and trains with exact accumulation."""

import importlib
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from autobatch.api.accumulator import Accumulator
    from autobatch.api.batch_size import check, find_batch_size
    from autobatch.api.find_largest import find_largest
    from autobatch.api.train import find_and_train
    from autobatch.data.markers import Shared
    from autobatch.devices.oom import verdict_of
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
    from autobatch.prediction.predict import peak, predict
    from autobatch.prediction.result import Prediction
    from autobatch.results.plan import BatchPlan
    from autobatch.results.search import Phase, SearchResult, Speed, Trial, Upper
    from autobatch.results.training import Evaluation, StepResult, TrainingResult
    from autobatch.results.verdict import Verdict
    from autobatch.search.options import SearchOptions
    from autobatch.training.losses.batch_loss import BatchLoss
    from autobatch.training.losses.whole_batch import WholeBatch
    from autobatch.training.options import StepOptions

__all__ = [
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


_HOMES: Final = {
    "Accumulator": "autobatch.api.accumulator",
    "AutobatchError": "autobatch.errors",
    "BatchLoss": "autobatch.training.losses.batch_loss",
    "BatchPlan": "autobatch.results.plan",
    "CheckpointError": "autobatch.errors",
    "DeviceLostError": "autobatch.errors",
    "DeviceUnavailableError": "autobatch.errors",
    "DoesNotFitError": "autobatch.errors",
    "Evaluation": "autobatch.results.training",
    "InexactStepError": "autobatch.errors",
    "NonFiniteLossError": "autobatch.errors",
    "Phase": "autobatch.results.search",
    "Prediction": "autobatch.prediction.result",
    "ProcessDiedError": "autobatch.errors",
    "ReplayLimitError": "autobatch.errors",
    "SearchOptions": "autobatch.search.options",
    "SearchResult": "autobatch.results.search",
    "SearchTimeoutError": "autobatch.errors",
    "Shared": "autobatch.data.markers",
    "Speed": "autobatch.results.search",
    "StepInterruptedError": "autobatch.errors",
    "StepOptions": "autobatch.training.options",
    "StepResult": "autobatch.results.training",
    "TrainingResult": "autobatch.results.training",
    "Trial": "autobatch.results.search",
    "Upper": "autobatch.results.search",
    "Verdict": "autobatch.results.verdict",
    "WholeBatch": "autobatch.training.losses.whole_batch",
    "check": "autobatch.api.batch_size",
    "find_and_train": "autobatch.api.train",
    "find_batch_size": "autobatch.api.batch_size",
    "find_largest": "autobatch.api.find_largest",
    "peak": "autobatch.prediction.predict",
    "predict": "autobatch.prediction.predict",
    "verdict_of": "autobatch.devices.oom",
}


def __getattr__(name: str) -> object:
    """Import a public name at its first use: torch takes seconds, and not every name needs it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(importlib.import_module(_HOMES[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
