"""One logical batch after another: cut, run until it fits, and stepped on or left out."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NoReturn

import torch

from autobatch.batches.nest import Nest, describe, size_of
from autobatch.batches.pieces import cut_to, pieces_of
from autobatch.devices.oom import MEMORY_VERDICTS, verdict_of
from autobatch.errors import (
    DoesNotFitError,
    InexactStepError,
    NonFiniteLossError,
    ReplayLimitError,
    StepInterruptedError,
)
from autobatch.events import Observer, Replayed
from autobatch.plan import BatchPlan
from autobatch.results import StepResult, Verdict
from autobatch.training.batch_norm import moving_layers, normalises_by_batch
from autobatch.training.ledger import Entries, Ledger
from autobatch.training.moving import Marks, marks_of, moved
from autobatch.training.objective import Compared
from autobatch.training.options import NonFinite
from autobatch.training.replay import MicroBatchSize, Start
from autobatch.training.schedule import Schedule
from autobatch.training.window import Recipe
from autobatch.training.witness import LossCheck, refuse_partly_finite

MOST_REPLAYS: Final = 16  # Of one window: by then it is cut into 65536 times as many pieces.
MOST_LEFT_OUT: Final = 100  # Steps in a row.

_ALONE: Final = (
    "a micro-batch had a single example, and BatchNorm normalises by the batch: choose sizes that "
    'leave no example alone, drop_last=True, or batch_norm="frozen"'
)
_COUNTS: Final = ("steps", "left_out", "agreed", "split_windows")
_UNLIMITED: Final = nullcontext()  # Keeps nothing of who enters it.
_Fault = Literal["", "not finite", "overflow"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Window:
    """One that ran: its gradient is in ``.grad``.

    Attributes:
        ledger: Its losses.
        start: What puts back what it has moved.
        sizes: Of its micro-batches.
        replays: How often it was run again.
        denominator: What the gradient was divided by, unless the ledger says terms.
    """

    ledger: Ledger
    start: Start
    sizes: tuple[int, ...]
    replays: int
    denominator: float


@dataclass(slots=True, kw_only=True)
class Driver:
    """Runs windows until they fit, and steps on them.

    Attributes:
        recipe: What a step is made of.
        size: Of the micro-batches.
        nonfinite: What happens to a step that is not finite.
        schedule: The learning rate's.
        limit_bytes: What a step may allocate; None leaves the device's own limit.
        observer: Is told of replays.
        multiple_of: What micro-batches are multiples of, the last one of a window apart.
        replay: Whether a window that memory ends is run again; otherwise its error goes up.
        ran_out: Is told the step in which memory runs out, before anything is let go.
        steps: Optimizer steps taken.
        left_out: Steps in a row that were not, for not being finite.
        agreed: How often an unknown loss was held to the law, and kept it.
        split_windows: Windows that were cut, and ran.
        moved_buffers: Names of what their forward passes moved: buffers, BatchNorm's apart,
            parameters, numbers.
    """

    recipe: Recipe
    size: MicroBatchSize
    nonfinite: NonFinite
    schedule: Schedule
    limit_bytes: int | None = None
    observer: Observer = field(default=lambda _: None)
    multiple_of: int = 1
    replay: bool = True
    ran_out: Callable[[int], None] = field(default=lambda _: None)
    steps: int = 0
    left_out: int = 0
    agreed: int = 0
    split_windows: int = 0
    moved_buffers: set[str] = field(default_factory=set)
    _ragged_agreed: bool = field(default=False, init=False)  # An unknown loss, in ragged pieces.

    def step(self, batch: Nest) -> StepResult:
        """Take one optimizer step for one logical batch, or leave it out."""
        examples = size_of(batch)
        if examples == 0:
            raise ValueError("a logical batch must hold at least one example, got 0")
        self.recipe.begin()
        try:
            size = self.size.for_window(examples)
            denominator = self.recipe.prepared(batch, cut=_is_cut(batch, examples, size))
            if denominator == 0:
                return _without_terms(examples)
            window = self._run(batch, examples, size, denominator)
            fault: _Fault = ""
            if self._waits(window.ledger):
                entries = window.ledger.read()  # The one wait, before anything moves.
                if entries.terms == 0:
                    window.start.put_back()  # A scaler has unscaled, and buffers have moved.
                    return _without_terms(examples)
                fault = self._fault(window, entries)
            self._finish(window, fault)
            return self._result(window, examples, fault)
        finally:
            self.recipe.clear()

    def plan(self, desired: int) -> BatchPlan:
        """Return how a full logical batch is cut now."""
        tolerable = min(self.size.size or desired, desired)
        return BatchPlan(desired=desired, tolerable=tolerable, multiple_of=self.multiple_of)

    def counts(self) -> dict[str, object]:
        """Return what ``load_counts`` takes: plain values."""
        counts = {name: getattr(self, name) for name in _COUNTS}
        return {
            **counts,
            "size": self.size.state_dict(),
            "moved_buffers": sorted(self.moved_buffers),
            "learnt": self.recipe.objective.learnt(),
        }

    def load_counts(self, counts: Mapping[str, Any]) -> None:
        """Go on from what ``counts`` returned."""
        for name in _COUNTS:
            setattr(self, name, int(counts[name]))
        self.size.load_state_dict(counts["size"])
        self.moved_buffers = set(counts["moved_buffers"])
        self.recipe.objective.relearn(counts["learnt"])

    def _waits(self, ledger: Ledger) -> bool:
        """Whether something has to be known before the step."""
        return self.nonfinite != "ignore" or ledger.counted or self.recipe.update.scaler is not None

    def _run(self, batch: Nest, examples: int, size: int, denominator: float) -> _Window:
        """The window, run until it fits; its gradient is left in ``.grad``."""
        recipe, last_failed = self.recipe, 0
        with self.limited():
            start = recipe.start()
        failures: list[dict[str, int]] = []
        ragged = len(pieces_of(batch)) > 1
        while True:
            parts, sizes = cut_to(batch, size, self.multiple_of)
            marks = self._marks(len(sizes))
            try:
                ledger, message = self._attempt(
                    parts, sizes, denominator, start, replays=len(failures), ragged=ragged
                )
            except BaseException:
                start.put_back()
                raise
            if ledger is not None:
                self.size.ran()
                if len(sizes) > 1:
                    self.moved_buffers |= moved(marks, self._marks(len(sizes)))
                    self.split_windows += 1
                return _Window(
                    ledger=ledger,
                    start=start,
                    sizes=sizes,
                    replays=len(failures),
                    denominator=denominator,
                )
            failed = max(sizes)
            self._undo(start)
            failures.append(self._memory(failed))
            if failed == last_failed == 1:
                raise DoesNotFitError(1, self.limit_bytes, message=message)
            if len(failures) > MOST_REPLAYS:
                raise ReplayLimitError(describe(batch), failures, message)
            size, last_failed = self.size.failed(examples, failed, len(failures)), failed
            denominator = recipe.prepared(batch, cut=True)
            self.observer(Replayed(failed=failed, micro_batch=size))

    def _undo(self, start: Start) -> None:
        """Let go of a window that failed, and go back to where it began."""
        self.recipe.clear()
        start.put_back()
        self.recipe.device.release_cached()

    def _attempt(
        self,
        parts: Sequence[Nest],
        sizes: Sequence[int],
        denominator: float,
        start: Start,
        *,
        replays: int,
        ragged: bool,
    ) -> tuple[Ledger | None, str]:
        """Run the window once; None, and what the failure said, if memory ran out."""
        self._refuse(len(parts))
        check = self._check(len(parts), ragged=ragged)
        try:
            with self.limited():
                witness = check.witness if check else None
                ledger = self.recipe.accumulate(parts, denominator, start, witness=witness)
        except Exception as error:
            is_too_much = _is_too_much(error, sizes, replays)
            if is_too_much:
                self.ran_out(self.steps + 1)
            if not (is_too_much and self.replay):
                if min(sizes) == 1 and normalises_by_batch(self.recipe.members.batch_norms):
                    error.add_note(_ALONE)
                raise
            message = str(error)
        else:
            if check is not None:  # Outside the limit: no search has rehearsed it.
                agreed = check.settled()
                self.agreed += agreed
                self._ragged_agreed |= agreed and ragged
            return ledger, ""
        # Only here has the error let go of the failed window's tensors.
        return None, message

    def _refuse(self, micro_batches: int) -> None:
        """Refuse to cut what would not be exact in pieces."""
        if micro_batches == 1:
            return
        if any(parameter._backward_hooks for parameter in self.recipe.members.parameters):
            raise InexactStepError(
                "a parameter has a gradient hook, which would run once a micro-batch instead of "
                "once a step; change the gradients in the optimizer's step instead "
                "(register_step_pre_hook), or choose a batch that need not be cut"
            )
        if self.recipe.batch_norm == "refuse" and normalises_by_batch(
            self.recipe.members.batch_norms
        ):
            raise InexactStepError(
                f"the model has BatchNorm, and this batch has to be cut into {micro_batches}: each "
                'would be normalised by itself. With batch_norm="refuse" that is not done; choose '
                '"micro", "frozen", or a batch that fits whole'
            )

    def _check(self, micro_batches: int, *, ragged: bool) -> LossCheck | None:
        """What holds an unknown loss to the law in this window, if it is to be held.

        In the first window that is cut, the 2nd, the 4th, the 8th and so on: a mean over tokens
        looks like one over examples as long as all have as many. For the same reason in the first
        one of ragged pieces.
        """
        objective = self.recipe.objective
        if not isinstance(objective, Compared) or not objective.loss.checked or micro_batches == 1:
            return None  # An inferred loss is a known one.
        unseen = ragged and not self._ragged_agreed
        if self.split_windows + 1 < 1 << self.agreed and not unseen:
            return None
        return LossCheck(objective.loss, self.recipe.feed.move, micro_batches)

    def _fault(self, window: _Window, entries: Entries) -> _Fault:
        """Why the step cannot be taken, or "".

        Raises:
            NonFiniteLossError: If that is what the user wants. Everything is put back.
            InexactStepError: If an unknown loss is finite in parts only.
        """
        finite = [math.isfinite(loss) for loss in entries.losses]
        objective = self.recipe.objective
        if isinstance(objective, Compared) and objective.loss.checked and not all(finite):
            refuse_partly_finite(finite)
        gradient_is_finite = entries.norm is None or math.isfinite(entries.norm)
        if all(finite) and gradient_is_finite:
            return ""
        scaled = self.recipe.update.scaler is not None and not gradient_is_finite
        if scaled and (all(finite) or self.nonfinite == "ignore"):
            return self._left_out("overflow", window, entries)
        if self.nonfinite == "ignore":
            return ""
        if self.nonfinite == "raise":
            self._raise(window, entries)
        return self._left_out("not finite", window, entries)

    def _left_out(self, fault: _Fault, window: _Window, entries: Entries) -> _Fault:
        self.left_out += 1
        if self.left_out > MOST_LEFT_OUT:
            self._raise(window, entries)
        return fault

    def _raise(self, window: _Window, entries: Entries) -> NoReturn:
        window.start.put_back()
        finite = [math.isfinite(loss) for loss in entries.losses]
        terms = entries.terms or window.denominator
        raise NonFiniteLossError(
            self.steps + 1,
            entries.loss_sum / terms,
            terms,
            None if all(finite) else finite.index(False) + 1,
            len(finite),
        )

    def _finish(self, window: _Window, fault: _Fault) -> None:
        """Take the step, or leave it out."""
        if fault:
            if fault == "not finite":  # What it saw may have spoilt running statistics.
                window.start.model()
            self.recipe.update.leave_out()
        else:
            self.recipe.check_gradient()
            self.left_out = 0
            try:
                with self.limited():
                    self.recipe.update.take()
            except StepInterruptedError:
                window.start.put_back()  # Whoever goes on runs this window again.
                raise
            self.steps += 1
            self.schedule.after_step()
        torch.clear_autocast_cache()  # Under the caller's autocast it holds the old weights.

    def _result(self, window: _Window, examples: int, fault: _Fault) -> StepResult:
        ledger, waits = window.ledger, self._waits(window.ledger)
        counted = ledger.read().terms if waits else None
        terms = window.denominator if counted is None else counted

        if not waits:
            ledger.send()

        def loss() -> float:
            return ledger.read().loss_sum / terms

        def norm() -> float | None:
            return ledger.read().norm

        return StepResult(
            loss=loss() if waits else loss,
            terms=terms,
            examples=examples,
            grad_norm=norm() if waits else norm,
            micro_batch_sizes=window.sizes,
            replays=window.replays,
            skipped=bool(fault),
            reason=fault,
        )

    def _marks(self, micro_batches: int) -> Marks:
        """Before and after the first window that is cut; of BatchNorm's buffers none: pooled."""
        if self.split_windows or micro_batches == 1:
            return {}
        model = self.recipe.model
        layers = moving_layers(model.modules())
        return marks_of(model, [buffer for layer in layers for buffer in layer.buffers()])

    def _memory(self, failed: int) -> dict[str, int]:
        """What the device holds after a failure, when it has let go of the window."""
        reading = self.recipe.device.read()
        return {
            "micro_batch": failed,
            "allocated": reading.allocated_bytes,
            "reserved": reading.reserved_bytes,
            "free": reading.free_bytes,
        }

    def limited(self) -> AbstractContextManager[None]:
        """Return the context in which a step may use memory."""
        if self.limit_bytes is None:
            return _UNLIMITED
        return self.recipe.device.limited_to(self.limit_bytes)


def _is_too_much(error: Exception, sizes: Sequence[int], replays: int) -> bool:
    """Whether smaller micro-batches may be the answer to ``error``."""
    verdict = verdict_of(error)
    if verdict is Verdict.SUSPECT:  # Memory or anything: if one example fails as well, anything.
        return max(sizes) > 1
    # BatchNorm refuses a single example. Where a replay has come to that, memory is the reason.
    cut_to_one = replays > 0 and min(sizes) == 1 and isinstance(error, ValueError)
    return verdict in MEMORY_VERDICTS or cut_to_one


def _is_cut(batch: Nest, examples: int, size: int) -> bool:
    return size < examples or len(pieces_of(batch)) > 1


def _without_terms(examples: int) -> StepResult:
    return StepResult(
        loss=float("nan"),
        terms=0,
        examples=examples,
        grad_norm=None,
        micro_batch_sizes=(),
        skipped=True,
        reason="no valid term",
    )
