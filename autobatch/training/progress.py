"""What a training has done so far, and where in the data it is."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from autobatch.results.training import Evaluation, StepResult


@dataclass(slots=True, kw_only=True)
class Progress:
    """What a training has done so far.

    Attributes:
        losses: One per optimizer step.
        sizes: Examples of each of these steps.
        replays: Windows run again.
        skipped: Logical batches that were left out, by reason.
        evaluations: One per epoch that was evaluated.
        seconds: Spent in steps and on reading their data.
        loading_seconds: Of it, spent on reading.
        epoch_begins: How many steps had been taken when this epoch began.
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
        """Add one step, or one that was skipped.

        Its loss is read when the next one has been counted: by then it has left the device.
        """
        self.replays += step.replays
        if step.skipped:
            self.skipped[step.reason] = self.skipped.get(step.reason, 0) + 1
            return
        self.read()
        self._unread = step
        self.sizes.append(step.examples)

    def add_evaluation(self, evaluation: Evaluation) -> None:
        """Add one, in place of an earlier one of the same epoch, made when max_steps ended it."""
        if self.evaluations and self.evaluations[-1].epoch == evaluation.epoch:
            self.evaluations.pop()
        self.evaluations.append(evaluation)

    def read(self) -> None:
        """Read the loss that may still be on its way."""
        if self._unread is not None:
            self.losses.append(self._unread.loss)
            self._unread = None

    @property
    def steps(self) -> int:
        """Optimizer steps taken."""
        return len(self.sizes)

    @property
    def examples(self) -> int:
        """That entered a step."""
        return sum(self.sizes)

    def epoch_loss(self) -> float:
        """Return the mean of this epoch's losses, weighted by examples; nan if it has none."""
        self.read()
        losses, sizes = self.losses[self.epoch_begins :], self.sizes[self.epoch_begins :]
        if not sizes:
            return math.nan
        return math.fsum(map(float.__mul__, losses, map(float, sizes))) / sum(sizes)

    def state_dict(self) -> dict[str, object]:
        """Return plain values."""
        self.read()
        kept = {name: getattr(self, name) for name in _KEPT}
        return {**kept, "evaluations": [asdict(evaluation) for evaluation in self.evaluations]}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "Progress":
        """Return the progress that ``state_dict`` told of."""
        evaluations = [Evaluation(**evaluation) for evaluation in state["evaluations"]]
        return cls(**{name: state[name] for name in _KEPT} | {"evaluations": evaluations})


_KEPT = tuple(
    entry.name for entry in fields(Progress) if entry.name not in ("_unread", "evaluations")
)


@dataclass(slots=True, kw_only=True)
class DataPosition:
    """Where in the data a training is.

    Attributes:
        epoch: Counted from 1.
        windows: Logical batches of it that are done.
        random: All random generators as they were before the epoch began; None if that is now.
        reads: Those that moved while a logical batch of it was read, as they were before, by its
            number: shuffle buffers and augmentations draw then, between the steps' own numbers.
    """

    epoch: int = 1
    windows: int = 0
    random: dict[str, object] | None = None
    reads: dict[int, dict[str, object]] = field(default_factory=dict)

    def next_epoch(self) -> None:
        """Go to where no batch of the next epoch has been read."""
        self.epoch, self.windows, self.random, self.reads = self.epoch + 1, 0, None, {}

    def state_dict(self) -> dict[str, object]:
        """Return what a Place is made of."""
        return {entry.name: getattr(self, entry.name) for entry in fields(DataPosition)}
