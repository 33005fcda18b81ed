"""One optimizer step per logical batch, in pieces that fit."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Final

import torch
from torch import nn
from torch.optim import Optimizer

from autobatch.batches.nest import Nest, cut, from_numpy, size_of
from autobatch.devices.choose import choose_device, open_device
from autobatch.devices.failures import verdict_of
from autobatch.errors import DoesNotFitError, InexactStepError
from autobatch.events import Observer, Replayed
from autobatch.plan import BatchPlan, check_size
from autobatch.randomness import generators_in
from autobatch.refusals import check_model, check_one_process, check_optimizer
from autobatch.results import StepResult, Verdict
from autobatch.training.accumulate import Accumulated
from autobatch.training.batch_norm import moving_layers
from autobatch.training.forward import Forward
from autobatch.training.losses import resolve_loss
from autobatch.training.replay import smaller_size, window_start
from autobatch.training.update import take_step
from autobatch.training.window import NO_GRADIENT, LossCheck, Recipe

_TOO_MUCH: Final = (Verdict.OUT_OF_MEMORY, Verdict.TOO_LARGE)


class Accumulator:
    """Takes the step that the undivided batch would take, in pieces that fit.

    For one's own loop::

        accumulator = Accumulator(model, optimizer, nn.CrossEntropyLoss())
        for batch in loader:  # Of the batch size that is wanted.
            result = accumulator.step(batch)

    It owns ``.grad``: what it finds there is discarded, and nothing is left there. It leaves the
    model's mode alone.

    Args:
        model: On the device where it is to train.
        optimizer: Over some or all of the model's parameters.
        loss: A loss of torch, or a callable ``(outputs, targets)`` that returns a mean over
            examples or ``(sum, terms)``; None infers it from the targets.
        micro_batch: The largest micro-batch; None means the whole batch until memory runs out.
        forward: ``(model, batch) -> (outputs, targets)`` for batches that are neither
            ``(inputs, ..., target)`` nor a mapping with a target.

    Attributes:
        micro_batch: As given, or what was found to fit after memory ran out.
        moved_buffers: Names of buffers that a forward pass moves, BatchNorm's apart. Cut, they
            move once a micro-batch instead of once a step.

    Raises:
        TypeError, ValueError: If an argument cannot be trained with, with the reason.
    """

    micro_batch: int | None

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss: Callable[..., object] | None = None,
        *,
        micro_batch: int | None = None,
        forward: Forward | None = None,
    ) -> None:
        check_one_process()
        check_model(model)
        present = next(model.parameters()).device
        device = open_device(choose_device(present, present))
        recipe = Recipe(
            model=model,
            optimizer=check_optimizer(optimizer, model),
            loss=resolve_loss(loss),
            forward=forward,
            device=device,
        )
        if micro_batch is not None:
            micro_batch = check_size("micro_batch", micro_batch)
        self._follow(recipe, micro_batch, limit_bytes=None, observer=None)

    @classmethod
    def following(
        cls,
        recipe: Recipe,
        *,
        micro_batch: int,
        limit_bytes: int | None,
        observer: Observer | None,
    ) -> "Accumulator":
        """Return one for a recipe that has been checked, as ``find_and_train`` drives it.

        Args:
            recipe: What a step is made of.
            micro_batch: The tolerable batch.
            limit_bytes: What a step may allocate; None leaves the device's own limit.
            observer: Is told of replays.
        """
        accumulator = cls.__new__(cls)
        accumulator._follow(recipe, micro_batch, limit_bytes=limit_bytes, observer=observer)
        return accumulator

    def _follow(
        self,
        recipe: Recipe,
        micro_batch: int | None,
        *,
        limit_bytes: int | None,
        observer: Observer | None,
    ) -> None:
        self.micro_batch = micro_batch
        self._recipe = recipe
        self._limit_bytes = limit_bytes
        self._observer: Observer = observer or (lambda _: None)
        self._generators = list(generators_in(recipe.model))
        self._agreed = 0  # How often the loss was held to the law, and kept it.
        self._split_windows = 0
        self._longest = 0
        self.moved_buffers: set[str] = set()

    def step(self, batch: Nest) -> StepResult:
        """Take one optimizer step for one logical batch.

        Args:
            batch: On the host, or wherever it is; a micro-batch at a time is moved to the model.

        Returns:
            The loss that the undivided batch has, and how the batch was cut. Reading the loss
            waits for the device once. A batch without a valid term is skipped: no step.

        Raises:
            DoesNotFitError: If not even one example fits. Nothing has moved.
            InexactStepError: If splitting would change the loss. This step has moved nothing.
            StepInterruptedError: If memory ran out with the optimizer's step half done.
        """
        batch = from_numpy(batch)
        if size_of(batch) == 0:
            raise ValueError("a logical batch must hold at least one example, got 0")
        try:
            return self._step(batch)
        finally:
            self._recipe.clear()

    def _step(self, batch: Nest) -> StepResult:
        examples = size_of(batch)
        denominator = self._recipe.denominator(batch)
        if denominator == 0:
            return _skipped(examples)
        done, plan, replays = self._accumulated(batch, denominator)
        terms = denominator if done.terms is None else float(done.terms)
        if terms == 0:
            return _skipped(examples)
        if next(self._recipe.gradients(), None) is None:
            raise ValueError(NO_GRADIENT)
        loss = float(done.loss_sum) / terms  # The one wait for the device, before anything moves.
        with self._limited():
            take_step(self._recipe.optimizer, self._recipe.device)
        torch.clear_autocast_cache()  # Under the caller's autocast it holds the old weights.
        return StepResult(
            loss=loss,
            terms=terms,
            examples=examples,
            micro_batch_sizes=plan.micro_batch_sizes,
            replays=replays,
        )

    def _accumulated(self, batch: Nest, denominator: float) -> tuple[Accumulated, BatchPlan, int]:
        """The window, run until it fits; with how it was cut and how often it was replayed."""
        examples = size_of(batch)
        self._longest = max(self._longest, examples)
        self._recipe.clear()
        with self._limited():
            put_back = window_start(self._recipe.model, self._generators)
        size, replays, last_failed = min(self.micro_batch or examples, examples), 0, 0
        buffers = self._buffers()
        while True:
            plan = BatchPlan(desired=examples, tolerable=size)
            try:
                done, message = self._attempt(batch, plan, denominator, replays)
            except BaseException:
                put_back()
                raise
            if done is not None:
                if plan.accumulation_steps > 1:
                    self.moved_buffers |= {name for name, *_ in self._buffers() - buffers}
                    self._split_windows += 1
                return done, plan, replays
            replays += 1
            failed, size = size, smaller_size(examples, size, replays)
            self._recipe.clear()
            put_back()
            self._recipe.device.release_cached()
            if size == failed == last_failed:  # One example, for the second time.
                raise DoesNotFitError(1, self._limit_bytes, message=message)
            last_failed = failed
            if examples >= (
                self.micro_batch or self._longest
            ):  # A short one says nothing of others.
                self.micro_batch = size
            self._observer(Replayed(failed=failed, micro_batch=size))

    def _attempt(
        self, batch: Nest, plan: BatchPlan, denominator: float, replays: int
    ) -> tuple[Accumulated | None, str]:
        """Run the window once; None, and what the failure said, if memory ran out."""
        parts = cut(batch, plan.micro_batch_sizes)
        self._refuse_hooks(len(parts))
        check = LossCheck(self._recipe, len(parts)) if self._check_is_due(len(parts)) else None
        try:
            with self._limited():
                witness = check.witness if check else None
                done = self._recipe.accumulate(parts, denominator, witness)
        except Exception as error:
            if not _is_too_much(error, plan, replays):
                raise
            message = str(error)
        else:
            if check is not None:  # Outside the limit: no search has rehearsed it.
                self._agreed += check.settled()
            return done, ""
        # Only here has the error let go of the failed window's tensors.
        return None, message

    def _refuse_hooks(self, micro_batches: int) -> None:
        if micro_batches > 1 and any(
            parameter._backward_hooks for parameter in self._recipe.parameters()
        ):
            raise InexactStepError(
                "a parameter has a gradient hook, which would run once a micro-batch instead of "
                "once a step; change the gradients in the optimizer's step instead "
                "(register_step_pre_hook), or choose a batch that need not be cut"
            )

    def _buffers(self) -> set[tuple[str, int, int]]:
        """Before and after the first window that is cut: buffers that it moves differ in these.

        BatchNorm's are pooled, and not among them.
        """
        if self._split_windows:
            return set()
        model = self._recipe.model
        pooled = {id(tensor) for layer in moving_layers(model) for tensor in layer.buffers()}
        return {
            (name, id(buffer), buffer._version)
            for name, buffer in model.named_buffers()
            if id(buffer) not in pooled
        }

    def _check_is_due(self, micro_batches: int) -> bool:
        """Whether an unknown loss is to be held to the law in this window.

        In the first window that is cut, the 2nd, the 4th, the 8th and so on: a mean over tokens
        looks like one over examples as long as all have as many.
        """
        if not self._recipe.loss.checked or micro_batches == 1:
            return False
        return self._split_windows + 1 >= 1 << self._agreed

    def _limited(self) -> AbstractContextManager[None]:
        if self._limit_bytes is None:
            return nullcontext()
        return self._recipe.device.limited_to(self._limit_bytes)


def _is_too_much(error: Exception, plan: BatchPlan, replays: int) -> bool:
    """Whether smaller micro-batches may be the answer to ``error``."""
    verdict = verdict_of(error)
    if verdict is Verdict.SUSPECT:  # Memory or anything: if one example fails as well, anything.
        return plan.micro_batch > 1
    # BatchNorm refuses a single example. Where a replay has come to that, memory is the reason.
    cut_to_one = replays > 0 and min(plan.micro_batch_sizes) == 1 and isinstance(error, ValueError)
    return verdict in _TOO_MUCH or cut_to_one


def _skipped(examples: int) -> StepResult:
    return StepResult(
        loss=float("nan"), terms=0, examples=examples, micro_batch_sizes=(), skipped=True
    )
