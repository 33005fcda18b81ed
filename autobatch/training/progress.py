"""The progress of a training: its steps so far, and its position in the data."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from autobatch.results.training import Evaluation, StepResult


@dataclass(slots=True, kw_only=True)
class Progress:
    """What a training has done so far.

    Attributes:
        losses: The loss of each optimizer step.
        sizes: The number of examples of each optimizer step.
        replays: How many times a logical batch was run again because memory ran out.
        skipped: How many logical batches were skipped, by reason.
        evaluations: One for each epoch that was evaluated.
        seconds: Time in steps, and in reading their data.
        loading_seconds: The part of ``seconds`` in which steps waited for their data.
        epoch_begins: How many steps had been taken when the present epoch began.
    """

    losses: list[float] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    replays: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    evaluations: list[Evaluation] = field(default_factory=list)
    seconds: float = 0.0
    loading_seconds: float = 0.0
    epoch_begins: int = 0
    _unread: StepResult | None = None

    def count(self, step: StepResult) -> None:
        """Add a step that was taken or skipped.

        The loss of a step is read when the next step is counted. Until then the number has left the
        device, so that reading it waits for nothing.
        """
        self.replays += step.replays
        if step.skipped:
            self.skipped[step.reason] = self.skipped.get(step.reason, 0) + 1
            return
        self.read()
        self._unread = step
        self.sizes.append(step.examples)

    def add_seconds(self, seconds: float) -> None:
        """Add time in steps and in reading their data."""
        self.seconds += seconds

    def add_loading_seconds(self, seconds: float) -> None:
        """Add time in which a step waited for its data."""
        self.loading_seconds += seconds

    def add_evaluation(self, evaluation: Evaluation) -> None:
        """Add an evaluation, in the place of an earlier one of the same epoch.

        An epoch that ``max_steps`` ended is evaluated again when a later call completes it.
        """
        if self.evaluations and self.evaluations[-1].epoch == evaluation.epoch:
            self.evaluations.pop()
        self.evaluations.append(evaluation)

    def begin_epoch(self) -> None:
        """Begin an epoch at the present step: ``epoch_loss`` is over the steps from here on."""
        self.epoch_begins = self.steps

    def read(self) -> None:
        """Read the loss of the last step, which may wait for the device."""
        if self._unread is not None:
            self.losses.append(self._unread.loss)
            self._unread = None

    @property
    def steps(self) -> int:
        """The number of optimizer steps taken."""
        return len(self.sizes)

    @property
    def examples(self) -> int:
        """The number of examples in all optimizer steps."""
        return sum(self.sizes)

    def epoch_loss(self) -> float:
        """Return the mean of this epoch's losses, weighted by examples; nan without a step."""
        self.read()
        losses, sizes = self.losses[self.epoch_begins :], self.sizes[self.epoch_begins :]
        if not sizes:
            return math.nan
        return math.fsum(map(float.__mul__, losses, map(float, sizes))) / sum(sizes)

    def state_dict(self) -> dict[str, object]:
        """Return the progress as plain values."""
        self.read()
        kept = {name: getattr(self, name) for name in _KEPT}
        return {**kept, "evaluations": [asdict(evaluation) for evaluation in self.evaluations]}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "Progress":
        """Return the progress whose ``state_dict`` is ``state``."""
        evaluations = [Evaluation(**evaluation) for evaluation in state["evaluations"]]
        return cls(**{name: state[name] for name in _KEPT} | {"evaluations": evaluations})


_KEPT = tuple(
    entry.name for entry in fields(Progress) if entry.name not in ("_unread", "evaluations")
)


@dataclass(slots=True, kw_only=True)
class DataPosition:
    """The position of a training in its data.

    Attributes:
        epoch: The present epoch, counted from 1.
        windows: How many logical batches of this epoch are done.
        random: The state of all random generators before the epoch began; None if no batch of the
            epoch was read yet.
        reads: The states before a logical batch was read, by the batch's number, of the generators
            that drew numbers while it was read. Shuffle buffers and augmentations draw numbers
            between those of the steps.
    """

    epoch: int = 1
    windows: int = 0
    random: dict[str, object] | None = None
    reads: dict[int, dict[str, object]] = field(default_factory=dict)

    def begin_epoch(self, random: dict[str, object]) -> None:
        """Record the state of all random generators before the first batch is read."""
        self.random, self.reads = random, {}

    def next_batch(self) -> None:
        """Advance by one logical batch."""
        self.windows += 1

    def next_epoch(self) -> None:
        """Advance to the next epoch, of which no batch has been read."""
        self.epoch, self.windows, self.random, self.reads = self.epoch + 1, 0, None, {}

    def state_dict(self) -> dict[str, object]:
        """Return the arguments of an equal position, as plain values."""
        return {entry.name: getattr(self, entry.name) for entry in fields(DataPosition)}
