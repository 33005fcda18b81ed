"""A forward pass at any batch size, for the trials of a search."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from autobatch.data.sample import repeated
from autobatch.data.tree import BatchTree
from autobatch.training.engine.gradient_pass import GradientPass
from autobatch.training.losses.forward import outputs_of


class Inference:
    """Runs forward passes on repeated examples, for the trials of a search.

    Args:
        run: Runs on one batch.
        sample: Real examples, which are repeated to any size.
    """

    def __init__(self, run: Callable[[BatchTree], object], sample: BatchTree) -> None:
        self._run = run
        self._sample = sample

    def prepare(self, sizes: Sequence[int], mark: Callable[[], None]) -> Callable[[], None]:  # noqa: ARG002  # It has one phase.
        """Return a function that runs one pass over the largest of ``sizes``."""
        batch = repeated(self._sample, max(sizes))

        def run() -> None:
            with torch.no_grad():
                self._run(batch)

        return run

    def verify(self, size: int, peak_bytes: int) -> str:  # noqa: ARG002  # The protocol's arguments.
        """Return ``""``: the results of an evaluation are not checked."""
        return ""

    def clear(self) -> None:
        """Do nothing: there are no gradients."""


def inference(
    gradient: GradientPass,
    forward: Callable[[nn.Module, BatchTree], object] | None,
    sample: BatchTree,
) -> Inference:
    """Return the forward pass alone. It runs in the mode that the model is in at that time.

    Args:
        gradient: Holds the model, the device and the precision.
        forward: The user's forward function; None for the standard one.
        sample: Real examples, with or without targets.
    """
    call = outputs_of if forward is None else forward

    def run(batch: BatchTree) -> None:
        with gradient.precision.forward():
            call(gradient.model, gradient.prefetcher.move(batch))

    return Inference(run, sample)
