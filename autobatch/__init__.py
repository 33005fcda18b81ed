"""autobatch: train on the batch that is wanted, on the device that is there."""

from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from autobatch.prediction.predict import Prediction, peak, predict

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


def __getattr__(name: str) -> object:
    """Import what predicts when it is first asked for: nothing else needs it."""
    if name not in {"Prediction", "peak", "predict"}:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from autobatch.prediction import predict as module

    return getattr(module, name)
