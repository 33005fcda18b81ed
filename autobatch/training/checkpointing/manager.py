"""The checkpoints of one training: what is in one, written and restored in place."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from autobatch.errors import CheckpointError
from autobatch.training.checkpointing.state_dict import (
    packed,
    packed_random_state,
    put_random_state,
    unpack,
)
from autobatch.training.checkpointing.store import CheckpointStore
from autobatch.training.engine.lr_schedule import Schedule
from autobatch.training.engine.step_runner import StepRunner
from autobatch.training.engine.train_step import TrainStep

Fields = Mapping[str, Any]


@dataclass(slots=True, kw_only=True)
class CheckpointManager:
    """Saves a training, and restores it.

    Attributes:
        store: The directory with the files.
        step: Holds the model, the optimizer and the scaler.
        schedule: Holds the learning-rate scheduler.
        loss_module: The loss, where it is a module.
        sources: Objects with random generators of their own: the data and the model.
        desired: Examples in a logical batch, as the user wants it.
        path: The last checkpoint that was written or restored.
        restored: Whether a checkpoint was restored.
    """

    store: CheckpointStore
    step: TrainStep
    schedule: Schedule
    loss_module: nn.Module | None
    sources: Sequence[object]
    desired: int
    path: Path | None = field(default=None, init=False)
    restored: bool = field(default=False, init=False)

    def latest(self) -> Fields | None:
        """Return the newest whole checkpoint of this training; None where there is none.

        Raises:
            CheckpointError: If there are some and none can be used, or it is of another training.
        """
        found = self.store.latest()
        if found is None:
            return None
        self.path, fields = found
        if fields.get("desired") != self.desired:
            raise CheckpointError(
                f"{self.path} is of a training with a desired batch of {fields.get('desired')}, "
                f"and {self.desired} is asked for; another batch is another training: choose "
                "another directory"
            )
        return fields

    def restore(self, fields: Fields) -> None:
        """Fill model, loss, optimizer, scheduler and scaler in place, and set random generators.

        Raises:
            CheckpointError: If they are not like those that were saved. Then nothing has changed
                but where random generators are.
        """
        self.restore_random(fields["random"])  # It refuses other generators: better now than late.
        saved = fields["loss_module"] or {}
        self._check_loss(saved)
        scheduler, optimizer = self.schedule.scheduler, self.step.optimizer
        unpack(fields, self.step.model, optimizer, scheduler, self.step.optimizer_step.scaler)
        if self.loss_module is not None:
            self.loss_module.load_state_dict(saved)
        if scheduler is not None:  # Torch warns of a schedule that comes before a step, and knows
            vars(optimizer)["_opt_called"] = True  # only of this process's steps.
        self.restored = True

    def _check_loss(self, saved: Mapping[str, object]) -> None:
        own = {} if self.loss_module is None else self.loss_module.state_dict()
        was, now = (
            {
                name: (tuple(value.shape), value.dtype)
                for name, value in state.items()
                if isinstance(value, Tensor)
            }
            for state in (saved, own)
        )
        if was != now:
            raise CheckpointError(
                f"the loss of {self.path} holds {was or 'nothing'}, and the loss here holds "
                f"{now or 'nothing'}: build it as it was, or choose another directory"
            )

    def restore_random(self, state: Fields) -> None:
        """Set all random generators to where they were."""
        put_random_state(state, self.sources)

    def random_state(self) -> dict[str, object]:
        """Return where all random generators are."""
        return packed_random_state(self.sources)

    def save(
        self,
        runner: StepRunner,
        progress: Mapping[str, object],
        place: Mapping[str, object],
        metadata: Mapping[str, object],
    ) -> Path:
        """Write a checkpoint from which the next step follows, and return its path.

        Args:
            runner: Counts steps and knows the micro-batch size.
            progress: What has been done so far: plain values.
            place: Where in the data training is: plain values.
            metadata: What else a resumed training reads: plain values.
        """
        step = self.step
        loss_state = None if self.loss_module is None else self.loss_module.state_dict()
        fields: dict[str, object] = {
            **packed(
                step.model, step.optimizer, self.schedule.scheduler, step.optimizer_step.scaler
            ),
            "loss_module": loss_state,
            "desired": self.desired,
            "runner": runner.state_dict(),
            "progress": dict(progress),
            "place": dict(place),
            "random": self.random_state(),
            "metadata": dict(metadata),
        }
        self.path = self.store.save(fields, step=runner.steps)
        return self.path
