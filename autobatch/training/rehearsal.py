"""The step of training, ready to be tried at any size."""

from collections.abc import Callable

from autobatch.batches.nest import Nest
from autobatch.batches.sample import repeated
from autobatch.training.replay import window_start
from autobatch.training.window import Recipe


class Rehearsal:
    """Runs windows that change the model as training would; whoever asked puts it back.

    Args:
        recipe: What a training step is made of.
        sample: Real examples; they are repeated to any size.
    """

    def __init__(self, recipe: Recipe, sample: Nest) -> None:
        self._recipe = recipe
        self._sample = sample

    def prepare(self, size: int, micro_batches: int) -> Callable[[], None]:
        """Return a window of ``micro_batches`` of ``size`` and its optimizer step, not yet run.

        Its batch is made here, on the host and outside the device's limit.
        """
        recipe = self._recipe
        micro_batch = repeated(self._sample, size)
        denominator = recipe.denominator(micro_batch) * micro_batches or 1

        def window() -> None:
            recipe.clear()
            put_back = window_start(recipe.model)  # Held as training holds it.
            done = recipe.accumulate([micro_batch] * micro_batches, denominator)
            del put_back
            if not any(True for _ in recipe.gradients()):
                raise ValueError(
                    "no parameter received a gradient: the loss does not depend on the model"
                )
            recipe.optimizer.step()
            del done
            recipe.clear()

        return window

    def clear(self) -> None:
        """Let go of the gradients of a window that failed."""
        self._recipe.clear()
