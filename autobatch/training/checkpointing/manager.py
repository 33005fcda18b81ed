"""Save a training to a checkpoint, and restore a checkpoint in place."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from autobatch.errors import CheckpointError
from autobatch.training.checkpointing.state_dict import (
    packed,
    packed_random_state,
    restore_random_state,
    unpack,
)
from autobatch.training.checkpointing.store import CheckpointStore
from autobatch.training.engine.lr_schedule import Schedule
from autobatch.training.engine.step_runner import StepRunner
from autobatch.training.engine.train_step import TrainStep

CheckpointFields = Mapping[str, Any]


@dataclass(slots=True, kw_only=True)
class CheckpointManager:
    """Saves and restores one training.

    Attributes:
        store: The folder with the files.
        step: Holds the model, the optimizer and the scaler.
        schedule: Holds the learning-rate scheduler.
        loss_module: The loss if it is a module, otherwise None.
        sources: Objects with random generators of their own: the data and the model.
        desired: Examples in a logical batch, as the user wants it.
        path: The last checkpoint that was written or read; None if there is none.
        restored: True if a checkpoint was restored.
    """

    store: CheckpointStore
    step: TrainStep
    schedule: Schedule
    loss_module: nn.Module | None
    sources: Sequence[object]
    desired: int
    path: Path | None = field(default=None, init=False)
    restored: bool = field(default=False, init=False)

    def latest(self) -> CheckpointFields | None:
        """Return the newest undamaged checkpoint; None if the folder holds no checkpoint.

        Raises:
            CheckpointError: No checkpoint of the folder can be used, or the newest one belongs to a
                training with another desired batch.
        """
        found = self.store.latest()
        if found is None:
            return None
        self.path, fields = found
        if fields.get("desired") != self.desired:
            raise CheckpointError(
                f"{self.path} belongs to a training with desired={fields.get('desired')}, got "
                f"desired={self.desired}; pass the same value, or choose another directory"
            )
        return fields

    def restore(self, fields: CheckpointFields) -> None:
        """Restore model, loss, optimizer, scheduler, scaler and random generators in place.

        Raises:
            CheckpointError: One of these differs from the one that was saved. At most the random
                generators have changed.
        """
        self.restore_random(fields["random"])  # First, because it refuses other generators.
        saved = fields["loss_module"] or {}
        self._check_loss(saved)
        scheduler, optimizer = self.schedule.scheduler, self.step.optimizer
        unpack(fields, self.step.model, optimizer, scheduler, self.step.optimizer_step.scaler)
        if self.loss_module is not None:
            self.loss_module.load_state_dict(saved)
        if scheduler is not None:  # Torch warns if a scheduler steps first, and does not know of
            vars(optimizer)["_opt_called"] = True  # the optimizer steps before the checkpoint.
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
                f"{now or 'nothing'}; build the loss as it was, or choose another directory"
            )

    def restore_random(self, state: CheckpointFields) -> None:
        """Set the state of all random generators."""
        restore_random_state(state, self.sources)

    def random_state(self) -> dict[str, object]:
        """Return the state of all random generators."""
        return packed_random_state(self.sources)

    def save(
        self,
        runner: StepRunner,
        progress: Mapping[str, object],
        position: Mapping[str, object],
        metadata: Mapping[str, object],
    ) -> Path:
        """Write a checkpoint from which training continues with the next step; return its path.

        Args:
            runner: Holds the number of steps and the micro-batch size.
            progress: The state dict of the progress.
            position: The state dict of the position in the data.
            metadata: Other plain values that a resumed training reads.
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
            "place": dict(position),
            "random": self.random_state(),
            "metadata": dict(metadata),
        }
        self.path = self.store.save(fields, step=runner.steps)
        return self.path
