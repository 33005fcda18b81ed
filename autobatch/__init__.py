"""autobatch: train on the batch that is wanted, on the device that is there."""

from autobatch.api import check, find_and_train, find_batch_size
from autobatch.devices.failures import verdict_of
from autobatch.errors import (
    AutobatchError,
    DeviceUnavailableError,
    DoesNotFitError,
    InexactStepError,
    StepInterruptedError,
)
from autobatch.plan import BatchPlan
from autobatch.results import SearchResult, StepResult, TrainingResult, Trial, Upper, Verdict
from autobatch.training.step import Accumulator

__all__ = [
    "Accumulator",
    "AutobatchError",
    "BatchPlan",
    "DeviceUnavailableError",
    "DoesNotFitError",
    "InexactStepError",
    "SearchResult",
    "StepInterruptedError",
    "StepResult",
    "TrainingResult",
    "Trial",
    "Upper",
    "Verdict",
    "check",
    "find_and_train",
    "find_batch_size",
    "verdict_of",
]
