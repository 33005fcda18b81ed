"""Every deliberate error.

    AutobatchError
    ├── CheckpointError           no checkpoint here can be trained on from
    ├── DeviceLostError           the device's context is lost, and the process with it
    ├── DeviceUnavailableError    the device asked for is not here
    ├── DoesNotFitError           not even one example fits
    ├── InexactStepError          splitting this step changes its result
    ├── NonFiniteLossError        a loss, or its gradient, is nan or infinite
    ├── ProcessDiedError          the isolated process died, and no trial is to blame
    ├── ReplayLimitError          memory ran out again and again in one window
    ├── SearchTimeoutError        the search's time was over before its answer was known
    └── StepInterruptedError      memory ran out in the optimizer's step

``ValueError`` and ``TypeError`` are for bad arguments; errors of the user's own code pass through.
"""

from collections.abc import Mapping, Sequence
from typing import Final

from autobatch.results.memory import Breakdown
from autobatch.results.remedies import Remedy, what_would_help
from autobatch.units import format_bytes

# What notes begin with that hold the traceback of another process: long, and for who debugs.
TRACED: Final = "In the process that traced it:"
ISOLATED: Final = "Raised in the isolated process:"


class AutobatchError(Exception):
    """The root of every error that autobatch raises on purpose, bad arguments apart."""


class CheckpointError(AutobatchError):
    """No checkpoint here can be trained on from: torn, of another kind, or of another training."""


class DeviceUnavailableError(AutobatchError):
    """The device that was asked for is not here, or another thread holds it."""


class DoesNotFitError(AutobatchError):
    """Not even ``size`` examples fit inside ``limit_bytes``.

    Attributes:
        size: The smallest size of interest.
        limit_bytes: What was allowed, which is not enough; None where no limit was known.
        breakdown: What needs how many bytes, and how many are missing; None where it is not known.
        message: What the last failure said; of a prediction, what else would fit.
        predicted_for: The GPU that is not here, where nothing has run; ``""`` where it has.
    """

    def __init__(
        self,
        size: int,
        limit_bytes: int | None,
        breakdown: Breakdown | None = None,
        message: str = "",
        predicted_for: str = "",
    ) -> None:
        super().__init__(size, limit_bytes, breakdown, message, predicted_for)
        self.size = size
        self.limit_bytes = limit_bytes
        self.breakdown = breakdown
        self.message = message
        self.predicted_for = predicted_for

    @property
    def breakdown_bytes(self) -> dict[str, int]:
        """What takes how many bytes, by its name for people."""
        return {} if self.breakdown is None else self.breakdown.parts

    @property
    def remedies(self) -> tuple[Remedy, ...]:
        """What would help, and by how much."""
        if self.breakdown is None:
            return ()
        return what_would_help(self.breakdown, self.message, predicted=bool(self.predicted_for))

    def __str__(self) -> str:
        where = "here" if self.limit_bytes is None else f"in {format_bytes(self.limit_bytes)}"
        if self.limit_bytes is not None and self.limit_bytes <= 0:
            where = f"where {format_bytes(-self.limit_bytes)} more are held already than allowed"
        if self.predicted_for:
            where = f"{where} ({self.predicted_for})"
        intro = "" if self.predicted_for else "the last failure said: "
        said = f"; {intro}{self.message}" if self.message else ""
        missing = self.breakdown.missing_bytes if self.breakdown else 0
        more = f": it needs at least {format_bytes(missing)} more" if missing else ""
        told = f"a batch of {self.size} does not fit {where}{more}{said}"
        if self.breakdown is None:
            return (
                f"{told}; raise the limit, shrink the model or its inputs, checkpoint "
                "activations, or choose an optimizer with less state"
            )
        rows = [f"  {row}" for row in str(self.breakdown).splitlines()]
        ways = [f"  {remedy}" for remedy in self.remedies]
        return "\n".join([told, *rows, "What would help:", *ways])


class InexactStepError(AutobatchError):
    """Splitting this step changes its result, so autobatch refuses to take it."""


class NonFiniteLossError(AutobatchError):
    """A loss, or its gradient, is nan or infinite; the step was not taken.

    Attributes:
        step: Which optimizer step it would have been, counted from 1.
        loss: The logical batch's.
        terms: The denominator of that loss.
        micro_batch: The first whose own loss is not finite, counted from 1; None if all are, and
            it is the gradient that is not.
        micro_batches: How many the window has.
    """

    def __init__(
        self, step: int, loss: float, terms: float, micro_batch: int | None, micro_batches: int
    ) -> None:
        super().__init__(step, loss, terms, micro_batch, micro_batches)
        self.step = step
        self.loss = loss
        self.terms = terms
        self.micro_batch = micro_batch
        self.micro_batches = micro_batches

    def __str__(self) -> str:
        what = f"the loss of step {self.step} is {self.loss} over {self.terms:g} terms"
        where = f"; the first in micro-batch {self.micro_batch} of {self.micro_batches}"
        if self.micro_batch is None:
            what = f"the gradient of step {self.step} is not finite, though its loss {self.loss} is"
            where = ""
        return (
            f"{what}{where}. Nothing has moved. Look at that batch, lower the learning rate or "
            'clip gradients; nonfinite="skip" leaves such steps out, "ignore" takes them'
        )


class SearchTimeoutError(AutobatchError):
    """A search had no time left for its next trial. Model and optimizer are as they were.

    Attributes:
        size: The largest size that had run, or 0.
        budget_seconds: What the search was given.
    """

    def __init__(self, size: int, budget_seconds: float) -> None:
        super().__init__(size, budget_seconds)
        self.size = size
        self.budget_seconds = budget_seconds

    def __str__(self) -> str:
        so_far = f"{self.size} has run" if self.size else "no size has run"
        return (
            f"the search had no time left after budget_seconds={self.budget_seconds:g}: {so_far} "
            "so far, and larger sizes were not ruled out; raise the budget, or lower the ceiling"
        )


class DeviceLostError(AutobatchError):
    """The device's context is lost: nothing can run on it in this process any more.

    Attributes:
        size: The largest size that had run, or 0.
        tried: The size that was being tried.
        message: What the device said.
    """

    def __init__(self, size: int, tried: int, message: str) -> None:
        super().__init__(size, tried, message)
        self.size = size
        self.tried = tried
        self.message = message

    def __str__(self) -> str:
        so_far = f"{self.size} had run" if self.size else "no size had run"
        return (
            f"the device was lost while {self.tried} was tried: {self.message}\nUntil then "
            f"{so_far}. What is on the device cannot be read any more: restart the process"
        )


class ProcessDiedError(AutobatchError):
    """The isolated process died, and no trial is to blame, or too many in a row.

    Attributes:
        message: How it died.
        size: The largest size that had run; None if none had.
    """

    def __init__(self, message: str, size: int | None = None) -> None:
        super().__init__(message, size)
        self.message = message
        self.size = size

    def __str__(self) -> str:
        ran = "before any size had run" if self.size is None else f"after {self.size} had run"
        return (
            f"{self.message}, {ran}; what it printed last may say why, and without an isolated "
            "process the error shows where it is raised"
        )


class ReplayLimitError(AutobatchError):
    """Memory ran out again and again in one window, however finely it was cut.

    Attributes:
        batch: The structure and the shapes of the logical batch.
        failures: One for each attempt: the micro-batch size and what the device's memory was.
        message: What the last failure said.
    """

    def __init__(self, batch: str, failures: Sequence[Mapping[str, int]], message: str) -> None:
        super().__init__(batch, failures, message)
        self.batch = batch
        self.failures = tuple(failures)
        self.message = message

    def __str__(self) -> str:
        rows = [
            "  ".join(
                f"{name} {value if name == 'micro_batch' else format_bytes(value)}"
                for name, value in failure.items()
            )
            for failure in self.failures
        ]
        table = "".join(f"\n  {row}" for row in rows)
        return (
            f"memory ran out {len(rows)} times in one window of {self.batch}, the last time with: "
            f"{self.message}\n  after each failure:{table}\nNothing has moved. Give back memory "
            "that others hold, or raise the limit"
        )


class StepInterruptedError(AutobatchError):
    """Memory ran out in the optimizer's step.

    Attributes:
        message: What is moved and what is not.
        checkpoint: The last checkpoint, if there is one.
    """

    def __init__(self, message: str, checkpoint: str | None = None) -> None:
        super().__init__(message, checkpoint)
        self.message = message
        self.checkpoint = checkpoint

    def __str__(self) -> str:
        way_out = f"; the last checkpoint is {self.checkpoint}" if self.checkpoint else ""
        return self.message + way_out
