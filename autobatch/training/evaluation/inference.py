"""The forward pass of an evaluation, ready to be tried at any size."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from autobatch.data.sample import repeated
from autobatch.data.tree import BatchTree
from autobatch.training.engine.gradient_pass import GradientPass
from autobatch.training.losses.forward import outputs_of


class Inference:
    """What an evaluation runs, ready to be tried at any size.

    Args:
        run: Runs on a batch.
        sample: Real examples; they are repeated to any size.
    """

    def __init__(self, run: Callable[[BatchTree], object], sample: BatchTree) -> None:
        self._run = run
        self._sample = sample

    def prepare(self, sizes: Sequence[int], mark: Callable[[], None]) -> Callable[[], None]:  # noqa: ARG002  # It is one phase.
        """Return one pass over the largest of ``sizes`` examples, not yet run."""
        batch = repeated(self._sample, max(sizes))

        def run() -> None:
            with torch.no_grad():
                self._run(batch)

        return run

    def verify(self, size: int, peak_bytes: int) -> str:  # noqa: ARG002  # The protocol's.
        """Return ``""``: what an evaluation makes is not checked."""
        return ""

    def clear(self) -> None:
        """Do nothing: no gradient is left."""


def inference(
    gradient: GradientPass,
    forward: Callable[[nn.Module, BatchTree], object] | None,
    sample: BatchTree,
) -> Inference:
    """Return the forward pass alone, in the mode that the model is in then.

    Args:
        gradient: What training would compute gradients with.
        forward: The user's; None is the standard one.
        sample: Real examples, with or without targets.
    """
    call = outputs_of if forward is None else forward

    def run(batch: BatchTree) -> None:
        with gradient.precision.forward():
            call(gradient.model, gradient.prefetcher.move(batch))

    return Inference(run, sample)
