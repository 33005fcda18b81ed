"""A training step at any batch size, for the trials of a search."""

import math
from collections.abc import Callable, Sequence

from autobatch.data.micro_batches import example_bytes, largest_piece
from autobatch.data.sample import repeated
from autobatch.data.tree import BatchTree, size_of, tensors
from autobatch.state.snapshot import attributes_of
from autobatch.training.engine.train_step import TrainStep
from autobatch.training.kernel_check import KernelIndexCheck


class TrialStep:
    """Runs training steps on repeated examples, for the trials of a search.

    A trial changes the model as training does; the caller restores it.

    Args:
        step: The training step.
        sample: Real examples, which are repeated to any size.
        desired: Examples in a logical batch. A trial may run only the first of its micro-batches.
            None if more micro-batches follow in any case.
    """

    def __init__(self, step: TrainStep, sample: BatchTree, desired: int | None = None) -> None:
        self._step = step
        self._sample = sample
        self._desired = desired
        self._check_kernels = KernelIndexCheck(step.gradient_pass, sample)
        scaler = step.optimizer_step.scaler
        self._restore_scaler = attributes_of(scaler) if scaler is not None else lambda: None

    def prepare(self, sizes: Sequence[int], mark: Callable[[], None]) -> Callable[[], None]:
        """Return a function that takes one training step in micro-batches of ``sizes``.

        The micro-batches are made on the host before this method returns.

        Args:
            sizes: Examples in each micro-batch.
            mark: Called after the first micro-batch, and before the optimizer step.
        """
        gradient, optimizer_step = self._step.gradient_pass, self._step.optimizer_step
        batches = {size: repeated(self._sample, size) for size in set(sizes)}
        micro_batches = [batches[size] for size in sizes]
        denominator = sum(gradient.prepare(batch, cut=False) for batch in micro_batches) or 1
        more_follow = self._desired is None or sum(sizes) < self._desired

        def train_step() -> None:
            gradient.begin()
            before = gradient.snapshot()  # Training holds a snapshot, too.
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

        return train_step

    def saved_bytes(self, size: int) -> int:
        """Return how many bytes a logical batch of one or two micro-batches needs less than others.

        In a longer one, the next micro-batch is copied to the device while the present one
        computes.

        Args:
            size: Examples in a micro-batch.
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
        """Return a description of a kernel's wrong result at a size that ran, or ``""``.

        Args:
            size: Examples in a micro-batch.
            peak_bytes: The peak memory of the trial.
        """
        return self._check_kernels(size, peak_bytes)

    def clear(self) -> None:
        """Release the gradients, and restore the scaler."""
        self._step.gradient_pass.clear()
        self._restore_scaler()
