"""Train a model on logical batches: check the arguments, search for a size, train."""

import functools
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Unpack

import torch
from torch import nn
from torch.optim import Optimizer

from autobatch.data.source import Data
from autobatch.display import observer_of
from autobatch.events import Observer
from autobatch.results.training import StepResult, TrainingResult
from autobatch.search.options import STANDARD_SEARCH, SearchOptions, check_search
from autobatch.state.last_error import forget_last_error
from autobatch.state.rng import check_seed, seed_all
from autobatch.training.engine.lr_schedule import Interval, Scheduler, SchedulerFactory
from autobatch.training.evaluation.metrics import Metric
from autobatch.training.losses.resolve import LossLike
from autobatch.training.options import StepOptions
from autobatch.training.request import TrainingRequest
from autobatch.training.result import finished_before
from autobatch.training.resume import begin_or_resume
from autobatch.training.step_arguments import StepArguments, shows_step_options, step_options
from autobatch.training.trainer import Trainer
from autobatch.training.workload import OptimizerFactory, Workload
from autobatch.tuner import (
    Prefer,
    check_prefer,
    find_inference_size,
    find_size,
    find_training_size,
)
from autobatch.units import Size
from autobatch.validation import check_size


@shows_step_options
def find_and_train(
    model: nn.Module,
    data: Data,
    desired: int = 256,
    *,
    loss: LossLike | None = None,
    optimizer: Optimizer | OptimizerFactory | None = None,
    scheduler: Scheduler | SchedulerFactory | None = None,
    scheduler_interval: Interval = "step",
    epochs: int = 1,
    max_steps: int | None = None,
    drop_last: bool = False,
    device: str | torch.device | None = None,
    memory_limit: Size | None = None,
    headroom: Size | None = None,
    eval_data: Data | None = None,
    metrics: Mapping[str, Metric] | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    on_step: Callable[[StepResult], object] | None = None,
    prefer: Prefer = "largest",
    search: SearchOptions = STANDARD_SEARCH,
    seed: int | None = None,
    progress: bool | Observer = True,
    options: StepOptions | None = None,
    **step: Unpack[StepArguments],
) -> TrainingResult:
    """Train ``model`` on logical batches of ``desired`` examples, in pieces that the device holds.

    The function first finds the tolerable batch: it runs real training steps at several sizes and
    restores everything that they change. Then it takes one optimizer step per logical batch, each
    of them the step that the undivided batch would take. The model is trained in place and stays on
    the device::

        data = (torch.randn(64, 4), torch.randint(0, 2, (64,)))
        result = find_and_train(nn.Linear(4, 2), data, desired=32, epochs=2, clip_grad_norm=1.0)
        print(result.plan, result.losses)

    Args:
        model: Any module whose tensors are all on one device. It trains in training mode, and gets
            its own mode back afterwards.
        data: A Dataset (shuffled), a DataLoader (its batches are cut and joined to ``desired``
            examples), a tuple or mapping of tensors or arrays of shape ``(example, ...)``
            (shuffled), or an iterable of batches. A batch is ``(inputs, ..., target)``, or a
            mapping with a key ``labels`` or ``target``. A tensor in ``Shared(tensor)`` is not cut.
        desired: Examples per optimizer step. The last step of an epoch takes the examples that are
            left.
        loss: What is minimised, as ``StepOptions`` describes it.
        optimizer: An instance, or a factory ``params -> Optimizer``; None is AdamW.
        scheduler: An instance, or a factory ``optimizer -> scheduler``.
        scheduler_interval: ``"step"`` steps the scheduler after each optimizer step that was taken;
            ``"epoch"`` after each epoch (ReduceLROnPlateau on the evaluation's loss, or on the
            epoch's loss without an evaluation).
        epochs: How often the data is seen.
        max_steps: Training stops after so many optimizer steps, even within an epoch.
        drop_last: Whether a last logical batch with fewer examples is skipped.
        device: Where the model trains. None is where its parameters are, or a GPU if they are on
            the CPU and there is a GPU.
        memory_limit: What the whole process may use, in bytes or like ``"24GiB"``, to plan for a
            smaller device. None takes what is free.
        headroom: Bytes that stay free. None is 2 % of the device and at least 300 MiB, or nothing
            where a ``memory_limit`` is given.
        eval_data: Data of the same kinds, evaluated after each epoch at the size that fits without
            gradients; a DataLoader keeps its order. Training continues as if there had been no
            evaluation. Two examples are tried before the search, so that an error shows at once.
        metrics: By name, functions ``(outputs, targets)`` that return a mean over examples or
            ``(sum, terms)``. None is the accuracy where outputs are scores of classes.
        checkpoint_dir: A folder. Training is saved there after each epoch, and at Ctrl-C or SIGTERM
            after the step that runs. The same call again continues from there, bit for bit.
        on_step: Called with every ``StepResult``.
        prefer: ``"largest"`` takes the largest size that fits, so the fewest micro-batches.
            ``"fastest"`` takes the smallest size within 2 % of the most examples a second, among
            the tolerable batch and a few smaller sizes, each timed over whole logical batches. A
            training that is shorter than this timing is not timed.
        search: How the tolerable batch is searched for.
        seed: Seeds torch, NumPy and Python before anything else; None seeds nothing.
        progress: True shows trials and a progress bar, False shows nothing; a callable is called
            with every event instead.
        options: The step's options together, in the place of ``loss`` and ``step``.
        step: The step's options one by one: ``precision``, ``clip_grad_norm``, ``batch_norm`` and
            all other fields of ``StepOptions``.

    Returns:
        The plan, the search, the losses, and notes on what was not exact.

    Raises:
        TypeError, ValueError: An argument is wrong. Nothing was changed.
        DoesNotFitError: Not even one example fits. Model and optimizer are as they were, or as the
            checkpoint has them.
        SearchTimeoutError: The search ran out of time. Model and optimizer are as they were.
        DeviceLostError: The device was lost in the search: the process must be restarted.
        InexactStepError: Cutting a batch would change this loss. This is checked in the first
            logical batches that are cut; the step that raises it changes nothing.
        NonFiniteLossError: A loss is nan or infinite. This step changes nothing.
        CheckpointError: Training cannot continue from what is in ``checkpoint_dir``.
        ReplayLimitError: Memory ran out again and again in one logical batch.
        StepInterruptedError: Memory ran out in the middle of an optimizer step.
    """
    options = step_options(find_and_train, options, loss, step)
    desired = check_size("desired", desired)
    epochs = check_size("epochs", epochs)
    if max_steps is not None:
        max_steps = check_size("max_steps", max_steps)
    check_seed(seed)
    check_search(search)
    check_prefer(prefer)
    with ExitStack() as stack:
        workload = Workload.resolve(
            model,
            data,
            batch_size=desired,
            options=options,
            optimizer=optimizer,
            device=device,
            memory_limit=memory_limit,
            headroom=headroom,
        )
        request = TrainingRequest.resolve(
            workload,
            desired=desired,
            epochs=epochs,
            max_steps=max_steps,
            drop_last=drop_last,
            eval_data=eval_data,
            metrics=metrics,
            checkpoint_dir=checkpoint_dir,
            on_step=on_step,
            schedule=(scheduler, scheduler_interval),
        )
        seed_all(seed)
        return _train(request, prefer, search, observer_of(progress, stack))


def _train(
    request: TrainingRequest, prefer: Prefer, search: SearchOptions, observer: Observer
) -> TrainingResult:
    """Begin or resume, search for the tolerable batch, train with it, and return the result."""
    workload = request.workload
    if search.forget_errors:
        forget_last_error(observer)
    with request.undone_on_error():
        start = begin_or_resume(request, observer)
        if start.is_done:
            return finished_before(request, start)
        find = functools.partial(
            find_training_size,
            logical_batch_size=start.logical_batch_size,
            # The size of a checkpoint stays if it fits, so that nothing has to be timed again.
            prefer=prefer if start.saved is None else "largest",
            steps=start.steps_left,
            search=search,
            reason="ceiling" if start.logical_batch_size == request.desired else "data",
        )
        found = find_size(workload, find, search, observer, start.first)
    trainer = Trainer(
        request=request,
        start=start,
        found=found,
        observer=observer,
        find_inference_size=functools.partial(find_inference_size, workload),
        multiple_of=search.multiple_of,
    )
    return trainer.fit()
