"""The step of training, ready to be tried at any size."""

import math
from collections.abc import Callable, Sequence

from autobatch.data.micro_batches import example_bytes, largest_piece
from autobatch.data.sample import repeated
from autobatch.data.tree import BatchTree, size_of, tensors
from autobatch.state.snapshot import attributes_of
from autobatch.training.engine.train_step import TrainStep
from autobatch.training.kernel_check import KernelIndexCheck


class TrialStep:
    """Runs windows that change the model as training would; whoever asked puts it back.

    Args:
        step: What a training step is made of.
        sample: Real examples; they are repeated to any size.
        desired: Examples in a whole window, of which a trial may run the first parts only; None
            where windows go on.
    """

    def __init__(self, step: TrainStep, sample: BatchTree, desired: int | None = None) -> None:
        self._step = step
        self._sample = sample
        self._desired = desired
        self._large = KernelIndexCheck(step.gradient_pass, sample)
        scaler = step.optimizer_step.scaler
        self._put_scaler_back = attributes_of(scaler) if scaler is not None else lambda: None

    def prepare(self, sizes: Sequence[int], mark: Callable[[], None]) -> Callable[[], None]:
        """Return a window of micro-batches of ``sizes`` and its optimizer step, not yet run.

        Its batch is made here, on the host. The window calls ``mark`` after its first micro-batch,
        and before its optimizer's step.
        """
        gradient, optimizer_step = self._step.gradient_pass, self._step.optimizer_step
        batches = {size: repeated(self._sample, size) for size in set(sizes)}
        micro_batches = [batches[size] for size in sizes]
        denominator = sum(gradient.prepare(nest, cut=False) for nest in micro_batches) or 1
        more_follow = self._desired is None or sum(sizes) < self._desired

        def window() -> None:
            gradient.begin()
            before = gradient.snapshot()  # Held as training holds it.
            losses = gradient.run(
                micro_batches,
                denominator,
                before,
                finish=optimizer_step.finish_gradient,
                more_follow=more_follow,
                end_phase=mark,
            )
            optimizer_step.check_gradient()
            optimizer_step.take_in_trial()
            del before, losses
            gradient.clear()

        return window

    def spared_bytes(self, size: int) -> int:
        """Return what one or two micro-batches of ``size`` hold less than those of longer windows.

        There none is sent ahead while the last computes.
        """
        if (
            not self._step.gradient_pass.prefetcher.copies_ahead
            or self._desired is None
            or 2 * size < self._desired
        ):
            return 0
        piece = largest_piece(self._sample)
        more = example_bytes(piece) * (size - size_of(piece))
        return math.ceil(sum(tensor.nbytes for tensor in tensors(piece)) + more)

    def verify(self, size: int, peak_bytes: int) -> str:
        """Return what a kernel did wrong at a size that ran, or ``""``."""
        return self._large(size, peak_bytes)

    def clear(self) -> None:
        """Let go of gradients, and of what a scaler notes about them."""
        self._step.gradient_pass.clear()
        self._put_scaler_back()
