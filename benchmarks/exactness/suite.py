"""Compare accumulated steps with undivided ones in float64, for every engine."""

from typing import Final

import torch
from reference import Pair, small_model, token_model
from torch import nn

from benchmarks.exactness.peers import FAILURES, GRADIENTS, Engine, absent, undivided
from benchmarks.exactness.tasks import IGNORED, Failure, ObservedTraining, TrainingTask, relative
from benchmarks.harness.records import SEED, Fields, Records
from benchmarks.search.suite import light_heap

GRADIENT_TABLE: Final = "exactness: relative difference of the update from the undivided batch's"
FAILURE_TABLE: Final = (
    "exactness: memory runs out in a training of 3 steps, each of 8 examples in two micro-batches"
)
_STEPS: Final = 3
_ONCE: Final = "once, in the second micro-batch of step 2"
_ALWAYS: Final = "always above 2 examples, from step 2 on"
_ANY: Final = "at any time"
_IN_STEP: Final = "once, as the optimizer begins step 2"


def run(records: Records) -> None:
    """Compare every engine's updates, then its trainings in which memory runs out."""
    tasks = gradient_tasks(records.device)
    gradients = {f"{by}: gradients": (by, *made) for by, made in GRADIENTS.items()}
    for _, (by, package, engine) in records.in_time(gradients):
        found: Fields = dict.fromkeys(tasks, "not installed")
        if not absent(package):
            found = {name: difference(engine, task) for name, task in tasks.items()}
        records.add(GRADIENT_TABLE, {"by": by, **found})
    failures = {f"{by}: failures": (by, *made) for by, made in FAILURES.items()}
    for _, (by, package, engine) in records.in_time(failures):
        for what, outcome in _outcomes(package, engine, records.device).items():
            records.add(FAILURE_TABLE, {"by": by, "memory runs out": what, **outcome})


def difference(engine: Engine, task: TrainingTask) -> float:
    """Return the relative difference of an engine's last update from the undivided batch's."""
    whole, own = ObservedTraining(task), ObservedTraining(task)
    undivided(whole)
    engine(own)
    return relative(own.last_update, whole.last_update)


def _outcomes(package: str, engine: Engine, device: torch.device) -> dict[str, Fields]:
    if absent(package):
        return {_ANY: {"outcome": "not installed", "steps": "-", "parameters off by": "-"}}
    task = _failing_task(device)
    calm = ObservedTraining(task)
    engine(calm)  # The engine has imported its modules now.
    with light_heap():
        return {what: outcome(engine, what, calm) for what in (_ONCE, _ALWAYS, _IN_STEP)}


def outcome(engine: Engine, what: str, calm: ObservedTraining) -> Fields:
    """Return how a training ends, compared with the engine's own training without a failure."""
    training = ObservedTraining(calm.task, in_forward=_FAILURES.get(what), in_step=what == _IN_STEP)
    try:
        engine(training)
    except Exception as error:  # noqa: BLE001  # The error is the result.
        ends = f"ends: {type(error).__name__}"
        return {"outcome": ends, "steps": len(training.steps), "parameters off by": "-"}
    return {
        "outcome": "goes on" if training.ran_out else "memory did not run out",
        "steps": len(training.steps),
        "parameters off by": relative(training.steps[-1], calm.steps[-1]),
    }


def _in_second_micro_batch(training: ObservedTraining, _: int) -> bool:
    return len(training.steps) == 1 and training.forwards == 2 and not training.ran_out


def _above_two(training: ObservedTraining, examples: int) -> bool:
    return bool(training.steps) and examples > 2


_FAILURES: Final[dict[str, Failure]] = {_ONCE: _in_second_micro_batch, _ALWAYS: _above_two}


def _failing_task(device: torch.device) -> TrainingTask:
    return TrainingTask(
        model=small_model(SEED),
        loss=nn.CrossEntropyLoss(),
        data=_samples(8 * _STEPS),
        micro_batch=4,
        accumulation_steps=2,
        device=device,
    )


def gradient_tasks(device: torch.device) -> dict[str, TrainingTask]:
    """Return the tasks by name. A loader cuts 10 by 4 into 4 + 4 + 2, autobatch into 4 + 3 + 3."""
    by_sample, by_token = small_model(SEED), token_model(SEED)
    masked = _tokens(8)
    masked[1][3:6] = IGNORED  # The whole second micro-batch.
    mean, total = nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")

    def task(model: nn.Module, loss: nn.CrossEntropyLoss, data: Pair, *cut: int) -> TrainingTask:
        size, count = cut
        return TrainingTask(
            model=model,
            loss=loss,
            data=data,
            micro_batch=size,
            accumulation_steps=count,
            device=device,
        )

    return {
        "samples, 10 by 4": task(by_sample, mean, _samples(10), 4, 3),
        "tokens, 8 by 2": task(by_token, mean, _tokens(8), 2, 4),
        "tokens, 8 by 3": task(by_token, mean, _tokens(8), 3, 3),
        "one micro-batch all masked": task(by_token, mean, masked, 3, 3),
        "sum loss, 10 by 4": task(by_sample, total, _samples(10), 4, 3),
        "short last batch, 8 of 12 by 4": task(by_sample, mean, _samples(20), 4, 3),
    }


def _samples(examples: int) -> Pair:
    generator = torch.Generator().manual_seed(SEED + examples)
    x = torch.randn(examples, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (examples,), generator=generator)


def _tokens(examples: int, length: int = 6) -> Pair:
    """Return token sequences of every length from 1 to ``length``; the rest is masked."""
    generator = torch.Generator().manual_seed(SEED + examples)
    x = torch.randint(0, 7, (examples, length), generator=generator)
    y = torch.randint(0, 4, (examples, length), generator=generator)
    lengths = torch.randint(1, length + 1, (examples, 1), generator=generator)
    return x, y.masked_fill(torch.arange(length) >= lengths, IGNORED)
