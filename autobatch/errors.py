"""The errors that autobatch raises on purpose.

    AutobatchError
    ├── CheckpointError           training cannot continue from a checkpoint
    ├── DeviceLostError           the device's context is lost: the process has to be restarted
    ├── DeviceUnavailableError    the device that was requested is not available
    ├── DoesNotFitError           not even the smallest batch fits into memory
    ├── InexactStepError          cutting this batch would change the result of the step
    ├── NonFiniteLossError        a loss or its gradient is nan or infinite
    ├── ProcessDiedError          the isolated process of a search died
    ├── ReplayLimitError          memory ran out again and again in one logical batch
    ├── SearchTimeoutError        a search reached its time budget
    └── StepInterruptedError      memory ran out in the middle of an optimizer step

A wrong argument raises ``TypeError`` or ``ValueError``. An error of the user's own code is passed
on unchanged.
"""

from collections.abc import Mapping, Sequence
from typing import Final

from autobatch.results.memory import Breakdown
from autobatch.results.remedies import Remedy, what_would_help
from autobatch.units import format_bytes

# The first words of a note that holds the traceback of another process.
TRACED: Final = "In the process that traced it:"
ISOLATED: Final = "Raised in the isolated process:"


class AutobatchError(Exception):
    """The base class of all errors that autobatch raises on purpose, except for wrong arguments.

    Catch this class to handle all of them::

        try:
            result = find_and_train(model, data)
        except AutobatchError as error:
            print(error)
    """


class CheckpointError(AutobatchError):
    """Training cannot continue from the checkpoints in this folder, or cannot be saved there.

    A file is damaged, has another format, or belongs to another training. Build everything as it
    was when the checkpoint was saved, remove the files, or choose another ``checkpoint_dir``.
    """


class DeviceUnavailableError(AutobatchError):
    """The device that was requested is not present, or another thread uses it.

    Pass another ``device=``, or None to let autobatch choose; ``autobatch devices`` lists those
    that are present.
    """


class DoesNotFitError(AutobatchError):
    """Not even a batch of ``size`` examples fits into ``limit_bytes``.

    ``remedies`` lists what would make it fit: a larger limit, a smaller model or smaller inputs,
    activation checkpointing, an optimizer with less state.

    Attributes:
        size: The smallest batch size that was acceptable, in examples.
        limit_bytes: The bytes that the step was allowed to allocate; None if unknown.
        breakdown: What needs how many bytes, and how many bytes are missing; None if unknown.
        message: The message of the last failure. In a prediction, other ways to fit.
        predicted_for: The name of the GPU for which this is a prediction; ``""`` if the step ran.
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
        """The bytes that each part of the step takes, by the part's name."""
        return {} if self.breakdown is None else self.breakdown.parts

    @property
    def remedies(self) -> tuple[Remedy, ...]:
        """What would help, and how many bytes each remedy frees."""
        if self.breakdown is None:
            return ()
        return what_would_help(self.breakdown, self.message, predicted=bool(self.predicted_for))

    def __str__(self) -> str:
        where = "here" if self.limit_bytes is None else f"in {format_bytes(self.limit_bytes)}"
        if self.limit_bytes is not None and self.limit_bytes <= 0:
            over = format_bytes(-self.limit_bytes)
            where = f"because the memory in use exceeds the limit by {over}"
        if self.predicted_for:
            where = f"{where} ({self.predicted_for})"
        missing = self.breakdown.missing_bytes if self.breakdown else 0
        more = f": it needs at least {format_bytes(missing)} more" if missing else ""
        intro = "" if self.predicted_for else "the last failure said: "
        failure = f"; {intro}{self.message}" if self.message else ""
        summary = f"a batch of {self.size} does not fit {where}{more}{failure}"
        if self.breakdown is None:
            return (
                f"{summary}; raise the limit, shrink the model or its inputs, checkpoint "
                "activations, or choose an optimizer with less state"
            )
        rows = [f"  {row}" for row in str(self.breakdown).splitlines()]
        ways = [f"  {remedy}" for remedy in self.remedies]
        return "\n".join([summary, *rows, "What would help:", *ways])


class InexactStepError(AutobatchError):
    """Cutting this batch into micro-batches would change the result of the step.

    The message names the cause and the way out: usually a loss that returns ``(sum, terms)``,
    ``WholeBatch(loss)`` for a loss that compares examples, or a desired batch that fits uncut.
    """


class NonFiniteLossError(AutobatchError):
    """A loss or its gradient is nan or infinite. The step was not taken, and nothing changed.

    Look at the batch, lower the learning rate or clip the gradient; or pass ``nonfinite="skip"`` to
    skip such steps.

    Attributes:
        step: The number of the optimizer step, counted from 1.
        loss: The loss of the logical batch.
        terms: The number of terms that the loss is a mean of.
        micro_batch: The first micro-batch whose loss is not finite, counted from 1; None if only
            the gradient is not finite.
        micro_batches: How many micro-batches the logical batch was cut into.
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
        what = (
            f"the loss of step {self.step} is {self.loss} over {self.terms:g} terms; the first "
            f"loss that is not finite is in micro-batch {self.micro_batch} of {self.micro_batches}"
        )
        if self.micro_batch is None:
            what = f"the gradient of step {self.step} is not finite, though its loss {self.loss} is"
        return (
            f"{what}. The step was not taken, and nothing changed. Look at that batch, lower the "
            'learning rate or clip the gradient; nonfinite="skip" skips such steps, and '
            'nonfinite="ignore" takes them'
        )


class SearchTimeoutError(AutobatchError):
    """A search reached its time budget before its next trial. Nothing changed.

    Raise ``budget_seconds`` of ``SearchOptions``, or lower the ceiling.

    Attributes:
        size: The largest size that ran, in examples; 0 if no size ran.
        budget_seconds: The time that the search was allowed to take.
    """

    def __init__(self, size: int, budget_seconds: float) -> None:
        super().__init__(size, budget_seconds)
        self.size = size
        self.budget_seconds = budget_seconds

    def __str__(self) -> str:
        largest = f"the largest size that ran is {self.size}" if self.size else "no size ran"
        return (
            f"the search reached its budget_seconds={self.budget_seconds:g}: {largest}, and larger "
            "sizes may fit as well; raise the budget, or lower the ceiling"
        )


class DeviceLostError(AutobatchError):
    """The device's context is lost: nothing can run on the device in this process any more.

    Restart the process. ``SearchOptions(isolate=True)`` keeps such a failure in another process.

    Attributes:
        size: The largest size that ran before, in examples; 0 if no size ran.
        tried: The size that lost the device, in examples.
        message: The message of the device.
    """

    def __init__(self, size: int, tried: int, message: str) -> None:
        super().__init__(size, tried, message)
        self.size = size
        self.tried = tried
        self.message = message

    def __str__(self) -> str:
        largest = f"the largest size that ran is {self.size}" if self.size else "no size ran"
        return (
            f"the device was lost in the trial of size {self.tried}: {self.message}\nBefore, "
            f"{largest}. What is on the device cannot be read any more: restart the process"
        )


class ProcessDiedError(AutobatchError):
    """The isolated process of a search died outside of a trial, or in too many trials in a row.

    Read what the process printed last. Without ``isolate=True`` the error shows where it is raised.

    Attributes:
        message: How the process died.
        size: The largest size that ran before, in examples; None if no size ran.
    """

    def __init__(self, message: str, size: int | None = None) -> None:
        super().__init__(message, size)
        self.message = message
        self.size = size

    def __str__(self) -> str:
        when = "before any size ran" if self.size is None else f"after size {self.size} ran"
        return (
            f"{self.message}, {when}; the last lines that it printed may say why, and with "
            "isolate=False the error shows where it is raised"
        )


class ReplayLimitError(AutobatchError):
    """Memory ran out again and again in one logical batch, however small its micro-batches were.

    No step was taken. Free memory that other programs or tensors hold, or raise the limit.

    Attributes:
        batch: The structure of the logical batch, with dtypes and shapes.
        failures: One mapping for each attempt: the micro-batch size in examples, and the device's
            memory after the failure in bytes.
        message: The message of the last failure.
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
            f"memory ran out {len(rows)} times in one logical batch of {self.batch}, the last time "
            f"with: {self.message}\n  after each failure:{table}\nNo step was taken, and nothing "
            "changed. Free memory that other programs or tensors hold, or raise the limit"
        )


class StepInterruptedError(AutobatchError):
    """Memory ran out in the middle of an optimizer step.

    The message says whether parameters changed. If they did, continue from the last checkpoint;
    ``snapshot_steps=True`` undoes such a step.

    Attributes:
        message: What changed, and the way out.
        checkpoint: The path of the last checkpoint; None if there is none.
    """

    def __init__(self, message: str, checkpoint: str | None = None) -> None:
        super().__init__(message, checkpoint)
        self.message = message
        self.checkpoint = checkpoint

    def __str__(self) -> str:
        way_out = f"; the last checkpoint is {self.checkpoint}" if self.checkpoint else ""
        return self.message + way_out
