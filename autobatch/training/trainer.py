"""Train from a start to the end, with the batch size that a search has found."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from autobatch.devices.memory_notes import fragmented
from autobatch.events import Observer, TrainingStarted
from autobatch.results.plan import BatchPlan
from autobatch.results.search import SearchResult
from autobatch.results.training import TrainingResult
from autobatch.state.snapshot import training_mode
from autobatch.training.batchnorm.modes import normalises_by_batch
from autobatch.training.engine.step_runner import StepRunner
from autobatch.training.evaluation.evaluator import FindSize
from autobatch.training.fit_loop import FitLoop
from autobatch.training.notes import notes
from autobatch.training.request import TrainingRequest
from autobatch.training.result import training_result
from autobatch.training.resume import TrainingStart, plain_search


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainer:
    """Trains from a start to the end, with the batch size that a search has found.

    Attributes:
        request: The arguments.
        start: Where training begins.
        found: The result of the search.
        observer: Receives an event for every step and every epoch.
        find_inference_size: Returns the largest size that inference ran at.
        multiple_of: Micro-batch sizes are multiples of this.
    """

    request: TrainingRequest
    start: TrainingStart
    found: SearchResult
    observer: Observer
    find_inference_size: FindSize
    multiple_of: int = 1

    def fit(self) -> TrainingResult:
        """Train, and return the result."""
        request, start, workload = self.request, self.start, self.request.workload
        workload.move_to_device()
        runner = self._runner()
        planned = runner.plan(start.logical_batch_size)
        self.observer(TrainingStarted(plan=planned, steps=start.steps_left, epochs=request.epochs))
        workload.device.reset_peak()
        with training_mode(workload.step.model):
            normalizes = normalises_by_batch(workload.step.model.modules())
            self._fit_loop(runner).run(start.epochs)
        ended = runner.plan(start.logical_batch_size)
        found_out = (*self._notes(runner, planned, ended, normalizes), *self._memory_notes())
        return training_result(request, start, self.found, ended, found_out)

    def _runner(self) -> StepRunner:
        """Return the step runner, with the state of the checkpoint if there is one."""
        workload, saved = self.request.workload, self.start.saved
        limit_bytes = self.found.limit_bytes if workload.limits_training else None
        limited: Callable[[], AbstractContextManager[None]] = nullcontext
        if limit_bytes is not None:
            limited = functools.partial(workload.device.limited_to, limit_bytes)
        runner = workload.options.step_runner(
            workload.step,
            self.found.fastest,
            self.request.schedule,
            limited=limited,
            limit_bytes=limit_bytes,
            observer=self.observer,
            multiple_of=self.multiple_of,
        )
        if saved is not None:
            state = dict(saved["runner"])
            if not self._keeps_size():
                state["size"] = runner.gradient.micro_batch_size.state_dict()
            runner.load_state_dict(state)
        return runner

    def _fit_loop(self, runner: StepRunner) -> FitLoop:
        request, evaluate = self.request, None
        if request.evaluation is not None:
            evaluate = request.evaluation.evaluator(
                request.workload.step, self.find_inference_size, runner.gradient.limited
            )
        return FitLoop(
            runner,
            self.start.progress,
            desired=self.start.logical_batch_size,
            max_steps=request.max_steps,
            observer=self.observer,
            on_step=request.on_step,
            evaluate=evaluate,
            checkpoints=request.checkpoints,
            metadata=self._metadata(),
        )

    def _keeps_size(self) -> bool:
        """True if the micro-batches of the checkpoint fit here.

        The same micro-batches round in the same way, so training continues bit for bit.
        """
        if self.start.saved is None:
            return False
        before = self.start.saved["metadata"]
        same_device = before["device"] == self.request.workload.device.name
        return bool(same_device and before["tolerable"] <= self.found.size)

    def _metadata(self) -> dict[str, object]:
        """Return what a checkpoint holds besides state dicts."""
        tolerable = self.found.fastest
        if self.start.saved is not None and self._keeps_size():
            tolerable = self.start.saved["metadata"]["tolerable"]
        return {
            "window": self.start.logical_batch_size,
            "tolerable": tolerable,
            "device": self.request.workload.device.name,
            "given": self.request.config,
            "search": plain_search(self.found),
        }

    def _notes(
        self, runner: StepRunner, planned: BatchPlan, ended: BatchPlan, normalizes: bool
    ) -> tuple[str, ...]:
        step = self.request.workload.step
        return tuple(
            notes(
                planned,
                ended,
                self.start.progress,
                desired=self.request.desired,
                objective=step.objective,
                batch_norm=step.gradient_pass.batch_norm if normalizes else None,
                mutated=sorted(runner.gradient.mutated),
                found=self.found,
            )
        )

    def _memory_notes(self) -> tuple[str, ...]:
        device = self.request.workload.device
        reading = device.read()
        return tuple(
            fragmented(
                device.torch_device, reading.peak_bytes, reading.peak_reserved_bytes, "training"
            )
        )
