"""The gradient of one logical batch: cut, run, and retried in smaller parts if memory runs out."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Final

from autobatch.data.micro_batches import cut_to, pieces_of
from autobatch.data.tree import BatchTree, size_of
from autobatch.errors import InexactStepError
from autobatch.events import Observer, Replayed
from autobatch.training.batchnorm.modes import normalises_by_batch, updating_layers
from autobatch.training.engine.gradient_pass import Finish, GradientPass
from autobatch.training.engine.loss_record import LossRecord
from autobatch.training.engine.micro_batch_size import MicroBatchSize
from autobatch.training.engine.oom_retry import OomRetry
from autobatch.training.losses.objective import CutBatch, Verifier
from autobatch.training.model_state.mutations import VersionStamps, changed_names, version_stamps
from autobatch.training.model_state.window_snapshot import WindowSnapshot

_SINGLE_EXAMPLE: Final = (
    "a micro-batch had a single example, and BatchNorm normalises by the batch: choose sizes that "
    'leave no example alone, drop_last=True, or batch_norm="frozen"'
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputedGradient:
    """A logical batch whose gradient is in ``.grad``.

    Attributes:
        losses: The loss of each micro-batch.
        snapshot: Restores what the forward and backward passes have changed.
        micro_batch_sizes: Examples in each micro-batch.
        retries: How often the logical batch ran again.
        denominator: The number that the gradient was divided by before the loss counted its terms.
    """

    losses: LossRecord
    snapshot: WindowSnapshot
    micro_batch_sizes: tuple[int, ...]
    retries: int
    denominator: float

    def read_terms(self) -> float:
        """Return the number of loss terms; waits for the device if only the loss counts them."""
        terms = self.losses.read().terms if self.losses.has_terms else None
        return self.denominator if terms is None else terms


@dataclass(slots=True, kw_only=True)
class BatchGradient:
    """Computes the gradients of logical batches. It needs no optimizer.

    Attributes:
        gradient_pass: Makes one attempt.
        micro_batch_size: Becomes smaller if memory runs out, and larger again after a while.
        limited: Returns a context that enforces the memory limit.
        limit_bytes: That limit, or None.
        observer: Receives an event for each retry.
        multiple_of: Micro-batch sizes are multiples of this, except the last of a logical batch.
        retry: True runs a logical batch again after memory ran out; False raises the error.
        on_oom: Called with the step's number if memory runs out, before anything is released.
        cut_batches: Logical batches that ran in several micro-batches.
        mutated: Names of what the first cut logical batch changed in the model, apart from
            BatchNorm's buffers: other buffers, parameters, attributes.
    """

    gradient_pass: GradientPass
    micro_batch_size: MicroBatchSize
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
        """Compute the gradient of the undivided batch's loss, in micro-batches, into ``.grad``.

        The batch is cut into micro-batches of at most ``micro_batch_size``. Their summed losses are
        divided by the number of loss terms of the whole batch, so that the gradient is the same for
        every cut. If memory runs out, the batch runs again in smaller micro-batches::

            model = nn.Linear(4, 2)
            options = StepOptions(loss=nn.CrossEntropyLoss())
            gradient = BatchGradient(
                gradient_pass=options.gradient_pass(model, CpuDevice()),
                micro_batch_size=MicroBatchSize(8),
            )
            computed = gradient.compute((torch.randn(20, 4), torch.randint(0, 2, (20,))))
            assert computed is not None
            assert computed.micro_batch_sizes == (7, 7, 6)
            loss = computed.losses.read().loss_sum / computed.read_terms()
            print(loss, model.weight.grad)

        Gradients:
            Every ``.grad`` of the model, of a loss module and of the optimizer's parameters, if
            there is one, is replaced, not added to. If this raises or returns None, each is None.
        Memory:
            One micro-batch at a time is copied to the device, or two if the device copies ahead.
            Further memory holds the gradients and a copy of the model's buffers. Everything runs
            inside ``limited()``, except checks of the loss, which no search has measured.
        State:
            Parameters are not changed. Forward passes change buffers, attributes and random
            generators once for each micro-batch; BatchNorm's running statistics are pooled and
            updated once. A failed attempt leaves no trace: before a retry, and before an error is
            raised, buffers, attributes, random generators and the scaler's record of unscaled
            gradients are restored. ``snapshot.restore()`` of the result does the same later.

        Args:
            batch: The logical batch: a tree of tensors of shape ``(examples, ...)``, on the host or
                on any device.
            finish: Called inside ``limited()`` with the finished gradient in ``.grad``, once for
                each attempt that comes so far; what it allocates is retried too. It may change
                the gradient, and may return the gradient's 2-norm, a scalar tensor.
            step: The number of the step, counted from 1, for ``on_oom``.

        Returns:
            The losses, and how the batch was cut; None if no term of the batch is valid.

        Raises:
            ValueError: If the batch holds no example.
            DoesNotFitError: If not even one example fits.
            ReplayLimitError: If memory ran out again and again.
            InexactStepError: If a cut would change the gradient.
            Exception: Any other error of the model, the loss or ``finish``; with ``retry=False``
                also the out-of-memory error itself.
        """
        self.gradient_pass.begin()
        try:
            return self._compute(batch, finish, step)
        except BaseException:
            self.clear()
            raise

    def clear(self) -> None:
        """Set every ``.grad`` to None."""
        self.gradient_pass.clear()

    def state_dict(self) -> dict[str, object]:
        """Return the micro-batch size, the counts and the objective's state, as plain values."""
        return {
            "size": self.micro_batch_size.state_dict(),
            "cut_batches": self.cut_batches,
            "mutated": sorted(self.mutated),
            "objective": self.gradient_pass.objective.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what ``state_dict`` returned."""
        self.micro_batch_size.load_state_dict(state["size"])
        self.cut_batches = int(state["cut_batches"])
        self.mutated = set(state["mutated"])
        self.gradient_pass.objective.load_state_dict(state["objective"])

    def _compute(self, batch: BatchTree, finish: Finish, step: int) -> ComputedGradient | None:
        """Prepare the logical batch, and run it; restore everything if that raises."""
        examples = size_of(batch)
        if examples == 0:
            raise ValueError("a logical batch must hold at least one example, got 0")
        size = self.micro_batch_size.for_window(examples)
        cut = size < examples or len(pieces_of(batch)) > 1
        denominator = self.gradient_pass.prepare(batch, cut=cut)
        if denominator == 0:
            return None
        with self.limited():
            before = self.gradient_pass.snapshot()
        try:
            return self._run_until_it_fits(batch, size, denominator, before, finish, step)
        except BaseException:
            before.restore()
            raise

    def _run_until_it_fits(
        self,
        batch: BatchTree,
        size: int,
        denominator: float,
        before: WindowSnapshot,
        finish: Finish,
        step: int,
    ) -> ComputedGradient:
        """Run the logical batch, again in smaller micro-batches each time that memory runs out."""
        gradient_pass = self.gradient_pass
        retry = OomRetry(
            batch=batch,
            micro_batch_size=self.micro_batch_size,
            device=gradient_pass.device,
            limit_bytes=self.limit_bytes,
        )
        while True:
            micro_batches, sizes = cut_to(batch, size, self.multiple_of)
            cut = self._cut(batch, len(sizes))
            stamps = self._version_stamps(cut)
            verifier = self._verifier(cut)
            record = None if verifier is None else verifier.record
            try:
                with self.limited():
                    losses = gradient_pass.run(
                        micro_batches, denominator, before, record=record, finish=finish
                    )
            except Exception as error:
                if not self._retries(error, sizes, retry, step):
                    raise
                message = str(error)
            else:
                if verifier is not None:  # Outside the limit: no search has measured the check.
                    verifier.finish()
                self._count(cut, stamps)
                return ComputedGradient(
                    losses=losses,
                    snapshot=before,
                    micro_batch_sizes=sizes,
                    retries=len(retry.failures),
                    denominator=denominator,
                )
            # Only here are the error and the verifier gone, and with them the attempt's tensors.
            del verifier, record
            gradient_pass.clear()
            before.restore()
            gradient_pass.device.release_cached()
            size = retry.smaller_size(max(sizes), message)
            denominator = gradient_pass.prepare(batch, cut=True)
            self.observer(Replayed(failed=max(sizes), micro_batch=size))

    def _retries(
        self, error: Exception, sizes: tuple[int, ...], retry: OomRetry, step: int
    ) -> bool:
        """Return whether the batch runs again after ``error``, and report missing memory."""
        is_memory_error = retry.is_memory_error(error, sizes)
        if is_memory_error:
            self.on_oom(step)
        if is_memory_error and self.retry:
            return True
        if min(sizes) == 1 and normalises_by_batch(self.gradient_pass.parameter_cache.batch_norms):
            error.add_note(_SINGLE_EXAMPLE)
        return False

    def _cut(self, batch: BatchTree, micro_batches: int) -> CutBatch | None:
        """Return what the objective has to know of a batch that is cut; None if it runs whole."""
        if micro_batches == 1:
            return None
        return CutBatch(
            number=self.cut_batches + 1,
            micro_batches=micro_batches,
            ragged=len(pieces_of(batch)) > 1,
            move=self.gradient_pass.prefetcher.move,
        )

    def _verifier(self, cut: CutBatch | None) -> Verifier | None:
        """Return what verifies the loss in this batch, if that is due; refuse inexact cuts."""
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

    def _count(self, cut: CutBatch | None, stamps: VersionStamps) -> None:
        """Record that a logical batch ran."""
        self.micro_batch_size.succeeded()
        if cut is not None:
            self.mutated |= changed_names(stamps, self._version_stamps(cut))
            self.cut_batches += 1

    def _version_stamps(self, cut: CutBatch | None) -> VersionStamps:
        """Return stamps of what the first cut batch may change, apart from pooled buffers."""
        if cut is None or self.cut_batches:
            return {}
        model = self.gradient_pass.model
        layers = updating_layers(model.modules())
        return version_stamps(model, [buffer for layer in layers for buffer in layer.buffers()])
