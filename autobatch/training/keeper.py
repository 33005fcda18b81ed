"""A training's checkpoints: what is in one, when one is written, how one is trained on from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from autobatch.errors import CheckpointError
from autobatch.signals import GracefulStop
from autobatch.training.checkpoint import CheckpointStore
from autobatch.training.driver import Driver
from autobatch.training.progress import Place, Progress
from autobatch.training.saved import (
    packed,
    packed_random_state,
    put_random_state,
    unpack,
)
from autobatch.training.schedule import Schedule
from autobatch.training.window import Recipe

Fields = Mapping[str, Any]


@dataclass(slots=True, kw_only=True)
class Keeper:
    """Saves a training, and brings it back.

    Attributes:
        store: Where to.
        sources: What holds random generators of its own: the data and the model.
        desired: The logical batch that was asked for.
        loss_module: The loss where it is a module.
        facts: What else is to be known: plain values.
        stop: Whether the process was asked to stop.
        path: The last checkpoint that was written, or trained on from.
    """

    store: CheckpointStore
    sources: Sequence[object]
    desired: int
    loss_module: nn.Module | None
    stop: GracefulStop = field(default_factory=GracefulStop)
    facts: dict[str, object] = field(default_factory=dict)
    path: Path | None = None

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

    def put_back(self, fields: Fields, recipe: Recipe, schedule: Schedule) -> None:
        """Fill model, loss, optimizer, scheduler and scaler in place.

        Raises:
            CheckpointError: If they are not like those that were saved. Then nothing has changed
                but where random generators are.
        """
        self.put_random_back(fields["random"])  # It refuses other generators: better now than late.
        saved = fields["loss_module"] or {}
        self._check_loss(saved)
        unpack(fields, recipe.model, recipe.optimizer, schedule.scheduler, recipe.update.scaler)
        if self.loss_module is not None:
            self.loss_module.load_state_dict(saved)
        if schedule.scheduler is not None:  # Torch warns of a schedule that comes before a step,
            vars(recipe.optimizer)["_opt_called"] = True  # and knows only of this process's steps.

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

    def put_random_back(self, state: Fields) -> None:
        """Set all random generators to where they were."""
        put_random_state(state, self.sources)

    def random_state(self) -> dict[str, object]:
        """Return where all random generators are."""
        return packed_random_state(self.sources)

    def save(self, driver: Driver, progress: Progress, place: Place) -> None:
        """Write a checkpoint from which the next step follows."""
        recipe = driver.recipe
        loss_state = None if self.loss_module is None else self.loss_module.state_dict()
        fields: dict[str, object] = {
            **packed(
                recipe.model,
                recipe.optimizer,
                driver.schedule.scheduler,
                recipe.update.scaler,
            ),
            "loss_module": loss_state,
            "desired": self.desired,
            "driver": driver.counts(),
            "progress": progress.state_dict(),
            "place": place.state_dict(),
            "random": self.random_state(),
            "facts": self.facts,
        }
        self.path = self.store.save(fields, step=driver.steps)
