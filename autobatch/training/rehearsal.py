"""The step of training, ready to be tried at any size."""

from collections.abc import Callable, Sequence

from autobatch.batches.nest import Nest
from autobatch.batches.sample import repeated
from autobatch.randomness import generators_in
from autobatch.training.replay import window_start
from autobatch.training.window import NO_GRADIENT, Recipe


class Rehearsal:
    """Runs windows that change the model as training would; whoever asked puts it back.

    Args:
        recipe: What a training step is made of.
        sample: Real examples; they are repeated to any size.
    """

    def __init__(self, recipe: Recipe, sample: Nest) -> None:
        self._recipe = recipe
        self._sample = sample
        self._generators = list(generators_in(recipe.model))

    def prepare(self, sizes: Sequence[int]) -> Callable[[], None]:
        """Return a window of micro-batches of ``sizes`` and its optimizer step, not yet run.

        Its batch is made here, on the host.
        """
        recipe = self._recipe
        batches = {size: repeated(self._sample, size) for size in set(sizes)}
        micro_batches = [batches[size] for size in sizes]
        denominator = sum(map(recipe.denominator, micro_batches)) or 1

        def window() -> None:
            recipe.clear()
            put_back = window_start(recipe.model, self._generators)  # Held as training holds it.
            done = recipe.accumulate(micro_batches, denominator)
            del put_back
            if next(recipe.gradients(), None) is None:
                raise ValueError(NO_GRADIENT)
            recipe.optimizer.step()
            del done
            recipe.clear()

        return window

    def clear(self) -> None:
        """Let go of the gradients of a window that failed."""
        self._recipe.clear()
