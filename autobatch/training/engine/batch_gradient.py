"""The gradient of one logical batch: cut, run, and retried in smaller parts if memory runs out."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from autobatch.data.micro_batches import cut_to, pieces_of
from autobatch.data.tree import BatchTree, size_of
from autobatch.errors import InexactStepError
from autobatch.events import Observer, Replayed
from autobatch.training.batchnorm.modes import moving_layers, normalises_by_batch
from autobatch.training.engine.gradient_pass import Finish, GradientPass
from autobatch.training.engine.loss_record import LossRecord
from autobatch.training.engine.micro_batch_size import MicroBatchSize
from autobatch.training.engine.oom_retry import OomRetry
from autobatch.training.losses.objective import CutBatch, Verifier
from autobatch.training.model_state.mutations import Marks, marks_of, moved
from autobatch.training.model_state.window_snapshot import WindowSnapshot

_ALONE = (
    "a micro-batch had a single example, and BatchNorm normalises by the batch: choose sizes that "
    'leave no example alone, drop_last=True, or batch_norm="frozen"'
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputedGradient:
    """What is known of a logical batch whose gradient is in ``.grad``.

    Attributes:
        losses: The loss of each micro-batch.
        before: Puts back what the logical batch has changed.
        micro_batch_sizes: Examples in each micro-batch.
        retries: How often the logical batch was run again.
        denominator: What the gradient was divided by, unless the losses give their own terms.
    """

    losses: LossRecord
    before: WindowSnapshot
    micro_batch_sizes: tuple[int, ...]
    retries: int
    denominator: float


@dataclass(slots=True, kw_only=True)
class BatchGradient:
    """Computes the gradients of logical batches, and knows nothing of an optimizer.

    Attributes:
        gradient_pass: Makes one attempt.
        size: The micro-batch size: smaller when memory runs out, larger again after a while.
        limited: Returns the context in which memory may be used.
        limit_bytes: The limit of that context, or None.
        observer: Receives an event for each retry.
        multiple_of: Micro-batches are multiples of this, the last one of a logical batch excepted.
        retry: Whether a logical batch runs again after memory ran out; False lets the error go up.
        on_oom: Called with the number of the step in which memory runs out, before anything is
            released.
        cut_batches: Logical batches that ran in several micro-batches.
        mutated: Names of what forward passes change: buffers other than BatchNorm's, parameters,
            numbers.
    """

    gradient_pass: GradientPass
    size: MicroBatchSize
    limited: Callable[[], AbstractContextManager[None]] = nullcontext
    limit_bytes: int | None = None
    observer: Observer = field(default=lambda _: None)
    multiple_of: int = 1
    retry: bool = True
    on_oom: Callable[[int], None] = field(default=lambda _: None)
    cut_batches: int = 0
    mutated: set[str] = field(default_factory=set)

    def compute(
        self, batch: BatchTree, *, finish: Finish = lambda: None, step: int = 1
    ) -> ComputedGradient | None:
        """Leave the gradient of the undivided batch's loss in ``.grad``, whatever was there.

        Args:
            batch: The logical batch, on the host or wherever it is.
            finish: Called with the finished gradient in place, and again after each retry: what
                must fit into the same memory. It may return the gradient's norm.

            step: The number of the step, which ``on_oom`` is called with.

        Returns:
            The losses, and how the batch was cut; None if no term of the batch is valid, in which
            case no gradient is left.

        Raises:
            DoesNotFitError: If not even one example fits.
            ReplayLimitError: If memory ran out again and again.
            InexactStepError: If a split would change the gradient.
        """
        examples = size_of(batch)
        if examples == 0:
            raise ValueError("a logical batch must hold at least one example, got 0")
        passes = self.gradient_pass
        passes.begin()
        size = self.size.for_window(examples)
        ragged = len(pieces_of(batch)) > 1
        denominator = passes.prepare(batch, cut=size < examples or ragged)
        if denominator == 0:
            return None
        with self.limited():
            before = passes.snapshot()
        retry = OomRetry(
            batch=batch, size=self.size, device=passes.device, limit_bytes=self.limit_bytes
        )
        while True:
            parts, sizes = cut_to(batch, size, self.multiple_of)
            cut = self._cut(len(sizes), ragged=ragged)
            marks = self._marks(len(sizes))
            try:
                losses, message = self._attempt(
                    parts, sizes, denominator, before, cut, retry, finish, step
                )
            except BaseException:
                before.put_back()
                raise
            if losses is not None:
                self._count(len(sizes), marks)
                return ComputedGradient(
                    losses=losses,
                    before=before,
                    micro_batch_sizes=sizes,
                    retries=len(retry.failures),
                    denominator=denominator,
                )
            passes.clear()
            before.put_back()
            passes.device.release_cached()
            size = retry.smaller_size(max(sizes), message)
            denominator = passes.prepare(batch, cut=True)
            self.observer(Replayed(failed=max(sizes), micro_batch=size))

    def clear(self) -> None:
        """Drop every gradient."""
        self.gradient_pass.clear()

    def state_dict(self) -> dict[str, object]:
        """Return counts and what was found out, as plain values."""
        return {
            "size": self.size.state_dict(),
            "cut_batches": self.cut_batches,
            "mutated": sorted(self.mutated),
            "objective": self.gradient_pass.objective.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what ``state_dict`` returned."""
        self.size.load_state_dict(state["size"])
        self.cut_batches = int(state["cut_batches"])
        self.mutated = set(state["mutated"])
        self.gradient_pass.objective.load_state_dict(state["objective"])

    def _attempt(
        self,
        parts: Sequence[BatchTree],
        sizes: Sequence[int],
        denominator: float,
        before: WindowSnapshot,
        cut: CutBatch | None,
        retry: OomRetry,
        finish: Finish,
        step: int,
    ) -> tuple[LossRecord | None, str]:
        """Run the logical batch once; None, and what the error said, if memory ran out."""
        verifier = self._verifier(cut)
        record = None if verifier is None else verifier.record
        try:
            with self.limited():
                losses = self.gradient_pass.run(
                    parts, denominator, before, record=record, finish=finish
                )
        except Exception as error:
            is_memory_error = retry.is_memory_error(error, sizes)
            if is_memory_error:
                self.on_oom(step)
            if not (is_memory_error and self.retry):
                if min(sizes) == 1 and normalises_by_batch(
                    self.gradient_pass.parameter_cache.batch_norms
                ):
                    error.add_note(_ALONE)
                raise
            message = str(error)
        else:
            if verifier is not None:  # Outside the limit: no search has rehearsed the check.
                verifier.finish()
            return losses, ""
        # Only here has the error let go of the failed attempt's tensors.
        return None, message

    def _cut(self, micro_batches: int, *, ragged: bool) -> CutBatch | None:
        """What the objective is told of a batch that is cut; None where it runs as one."""
        if micro_batches == 1:
            return None
        return CutBatch(
            number=self.cut_batches + 1,
            micro_batches=micro_batches,
            ragged=ragged,
            move=self.gradient_pass.prefetcher.move,
        )

    def _verifier(self, cut: CutBatch | None) -> Verifier | None:
        """Refuse to cut what is not exact in parts; return what verifies the loss, if it is due."""
        if cut is None:
            return None
        cache = self.gradient_pass.parameter_cache
        if any(parameter._backward_hooks for parameter in cache.parameters):
            raise InexactStepError(
                "a parameter has a gradient hook, which would run once a micro-batch instead of "
                "once a step; change the gradients in the optimizer's step instead "
                "(register_step_pre_hook), or choose a batch that need not be cut"
            )
        if self.gradient_pass.batch_norm == "refuse" and normalises_by_batch(cache.batch_norms):
            raise InexactStepError(
                f"the model has BatchNorm, and this batch has to be cut into {cut.micro_batches}: "
                'each would be normalised by itself. With batch_norm="refuse" that is not done; '
                'choose "micro", "frozen", or a batch that fits whole'
            )
        return self.gradient_pass.objective.verifier(cut)

    def _count(self, micro_batches: int, marks: Marks) -> None:
        """Note that a logical batch ran."""
        self.size.ran()
        if micro_batches > 1:
            self.mutated |= moved(marks, self._marks(micro_batches))
            self.cut_batches += 1

    def _marks(self, micro_batches: int) -> Marks:
        """Marks before and after the first batch that is cut; not of BatchNorm's pooled buffers."""
        if self.cut_batches or micro_batches == 1:
            return {}
        model = self.gradient_pass.model
        layers = moving_layers(model.modules())
        return marks_of(model, [buffer for layer in layers for buffer in layer.buffers()])
