"""Trainings whose results are compared bit for bit, before and after a change that keeps them.

``python -m benchmarks.digest --write`` keeps a digest of every case's result;
``python -m benchmarks.digest`` runs the cases again, prints a line for each and exits with 1 where
one differs. The cases use the public functions only. A digest covers losses, plan, sizes, gradient
norms, parameters, buffers, the optimizer's state and the random generators' states; it does not
cover times, bytes and texts.
"""

import argparse
import contextlib
import copy
import hashlib
import io
import json
import os
import random
import re
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, Dataset, TensorDataset

from autobatch import (
    Accumulator,
    SearchOptions,
    SearchResult,
    StepResult,
    TrainingResult,
    WholeBatch,
    find_and_train,
    find_batch_size,
    find_largest,
)

Pair = tuple[Tensor, Tensor]
Case = Callable[[int], object]

ROOT: Final = Path(__file__).parent.parent
FILE: Final = ROOT / "benchmarks" / "data" / "digest.json"  # Names the machine it is of.
SEED: Final = 1

CASES: Final[dict[str, Case]] = {}


def case(name: str, *arguments: object) -> Callable[[Callable[..., object]], Callable[..., object]]:
    """Keep a function of a seed as the case of that name; ``arguments`` go before the seed."""

    def keep(function: Callable[..., object]) -> Callable[..., object]:
        CASES[name] = partial(function, *arguments)
        return function

    return keep


def digest(name: str, seed: int = SEED) -> str:
    """Run a case in one thread from seeded generators, and return the SHA-256 of its result."""
    threads, taken = torch.get_num_threads(), hashlib.sha256()
    torch.set_num_threads(1)
    try:
        seed_all(seed)
        feed(taken.update, (CASES[name](seed), generators()))
    finally:
        torch.set_num_threads(threads)
    return taken.hexdigest()


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def generators() -> object:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def feed(take: Callable[[bytes], object], value: object) -> None:
    """Give every bit of a nest of plain values and tensors, and its structure, to ``take``."""
    match value:
        case Tensor():
            plain = value.detach().contiguous().reshape(-1).view(torch.uint8)
            take(f"tensor {value.dtype} {tuple(value.shape)}".encode() + plain.numpy().tobytes())
        case np.ndarray():
            take(f"array {value.dtype} {value.shape}".encode() + value.tobytes())
        case float():
            take(b"float" + struct.pack("<d", value))
        case int() | str() | None:
            take(f"{type(value).__name__} {value!r};".encode())
        case Mapping():
            feed(take, [(key, value[key]) for key in sorted(value, key=repr)])
        case Sequence():
            take(f"sequence {len(value)}".encode())
            for item in value:
                feed(take, item)
        case _:
            raise TypeError(f"no digest of {value!r}")


# What of a result counts.


def of_module(module: nn.Module) -> object:
    modes = [part.training for part in module.modules()]
    gradients = [parameter.grad for parameter in module.parameters()]
    return dict(module.state_dict()), dict(module.named_buffers()), modes, gradients


def of_step(step: StepResult) -> object:
    return (
        (step.loss, float(step.terms), step.examples, step.grad_norm),
        (step.micro_batch_sizes, step.replays, step.skipped, step.reason),
    )


def of_search(search: SearchResult) -> object:
    trials = [(trial.size, trial.fits, trial.repeated) for trial in search.trials]
    upper = (search.upper.reason, search.upper.size)
    return search.size, search.ceiling, search.limited_by, upper, trials


def of_training(result: TrainingResult) -> object:
    seen = [
        (each.epoch, each.loss, dict(each.metrics), each.examples) for each in result.evaluations
    ]
    counts = (result.epochs, result.examples, result.replays)
    return (result.plan.desired, result.plan.tolerable), list(result.losses), counts, seen


def train(
    model: nn.Module,
    data: Any,
    desired: int,
    optimizer: Optimizer | None = None,
    **arguments: Any,
) -> object:
    """Train, and return what of it counts. A ``memory_limit`` must be one that cuts batches."""
    chosen = AdamW(model.parameters(), lr=0.01) if optimizer is None else optimizer
    steps: list[object] = []
    result = find_and_train(
        model,
        data,
        desired,
        optimizer=chosen,
        progress=False,
        on_step=lambda step: steps.append(of_step(step)),
        **arguments,
    )
    if "memory_limit" in arguments and result.plan.tolerable >= desired:
        raise ValueError(f"memory_limit={arguments['memory_limit']} cuts no batch of {desired}")
    outcome = of_module(model), chosen.state_dict(), steps
    return outcome, of_training(result), of_search(result.search)


# Models and data.


def rows(examples: int, width: int = 20, dtype: torch.dtype = torch.float32) -> Pair:
    return torch.randn(examples, width, dtype=dtype), torch.randint(0, 5, (examples,))


def mlp(width: int = 20, hidden: int = 64, dropout: float = 0.0) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, 5)
    )


class Block(nn.Module):
    """Two convolutions with BatchNorm, around which the input goes as well."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inside, outside, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outside),
            nn.ReLU(),
            nn.Conv2d(outside, outside, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outside),
        )
        self.past = nn.Conv2d(inside, outside, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.past(x))


def residual() -> nn.Sequential:
    layers = Block(3, 8, 1), Block(8, 16, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), *layers, nn.Linear(16, 5))


def images(examples: int) -> Pair:
    return torch.randn(examples, 3, 14, 14), torch.randint(0, 5, (examples,))


class Language(nn.Module):
    """Scores for the next token, ``(examples, tokens, positions)`` as cross-entropy wants them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(17, 12), nn.GRU(12, 16, batch_first=True)
        self.head = nn.Linear(16, 17)

    def forward(self, tokens: Tensor) -> Tensor:
        scores: Tensor = self.head(self.mix(self.embed(tokens))[0]).transpose(1, 2)
        return scores


def ragged(examples: int, ignored: int = -100) -> Pair:
    """Tokens, and labels that end at another place in every example."""
    tokens, ends = torch.randint(0, 17, (examples, 9)), torch.randint(1, 10, (examples, 1))
    return tokens, tokens.roll(-1, 1).masked_fill(torch.arange(9) >= ends, ignored)


@dataclass
class Output:
    loss: Tensor | None
    logits: Tensor


class WithLoss(nn.Module):
    """A language model that returns its own mean over the labels, as those of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Language()

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Output:
        scores = self.body(input_ids)
        loss = None if labels is None else F.cross_entropy(scores, labels, ignore_index=-100)
        return Output(loss=loss, logits=scores)


class Towers(nn.Module):
    """Two encoders and a temperature that is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (
            nn.Sequential(nn.Linear(20, 128), nn.Tanh(), nn.Dropout(0.2), nn.Linear(128, 8))
            for _ in range(2)
        )
        self.temperature = nn.Parameter(torch.tensor(1.0))

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.left(left), self.right(right), self.temperature.exp()


def contrastive(outputs: tuple[Tensor, Tensor, Tensor], targets: Tensor) -> Tensor:
    scores = F.normalize(outputs[0]) @ F.normalize(outputs[1]).T * outputs[2]
    places = torch.arange(len(targets))
    return (F.cross_entropy(scores, places) + F.cross_entropy(scores.T, places)) / 2


class Sum(nn.Module):
    """Takes two inputs of different widths."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(20, 32), nn.Linear(7, 32), nn.Linear(32, 5)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        scores: Tensor = self.head(torch.tanh(self.first(first) + self.second(second)))
        return scores


class RunsOut(nn.Module):
    """Runs out of memory above ``limit`` examples, once random numbers have been drawn."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.body, self.limit = mlp(dropout=0.3), limit
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.norm(self.body(x))
        if len(x) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
        return scores


class Augmented(Dataset[Pair]):
    """Draws from all three generators for every example that is read."""

    def __init__(self, examples: int) -> None:
        self.x, self.y = rows(examples)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, row: int) -> Pair:
        noise = torch.rand(()) + np.random.rand() + random.random()
        return self.x[row] + noise, self.y[row]


# Steps, precisions, optimizers.


@case("mlp")
def plain(_seed: int) -> object:
    return train(mlp(), rows(300), 128, epochs=2, memory_limit="100KiB")


@case("mlp, seeded by the call")
def seeded(seed: int) -> object:
    return train(mlp(), rows(300), 128, seed=seed + 10, memory_limit="100KiB")


@case("float64")
def double(_seed: int) -> object:
    data = rows(300, dtype=torch.float64)
    return train(mlp().double(), data, 128, memory_limit="200KiB")


@case("bf16", "bf16")
@case("fp16", "fp16")
def autocast(precision: str, _seed: int) -> object:
    return train(mlp(), rows(300), 128, precision=precision, epochs=2, memory_limit="50KiB")


@case("bf16 parameters, gradients in float32")
def wide(_seed: int) -> object:
    data = rows(300, dtype=torch.bfloat16)
    model = mlp().bfloat16()
    return train(
        model, data, 128, gradient_dtype=torch.float32, clip_grad_norm=1.0, memory_limit="50KiB"
    )


@case("clip_grad_norm", {"clip_grad_norm": 0.3})
@case("clip_grad_value", {"clip_grad_value": 0.01})
@case("snapshot_steps", {"clip_grad_norm": 0.5, "snapshot_steps": True})
def clipped(clips: Mapping[str, Any], _seed: int) -> object:
    return train(mlp(), rows(300), 128, memory_limit="100KiB", **clips)


@case("SGD with momentum", partial(SGD, lr=0.1, momentum=0.9, weight_decay=1e-3))
@case("Adam with amsgrad", partial(Adam, lr=0.01, amsgrad=True))
def optimized(make: Callable[..., Optimizer], _seed: int) -> object:
    model = mlp()
    return train(model, rows(300), 128, make(model.parameters()), epochs=2, memory_limit="110KiB")


@case("inferred AdamW")
def inferred(_seed: int) -> object:
    model = mlp()
    result = find_and_train(model, rows(300), 128, memory_limit="100KiB", progress=False)
    return of_module(model), of_training(result), of_search(result.search)


@case("scheduler per step", "step", lambda o: OneCycleLR(o, max_lr=0.05, total_steps=6))
@case("scheduler per epoch", "epoch", partial(StepLR, step_size=1, gamma=0.5))
@case("scheduler on plateau", "epoch", partial(ReduceLROnPlateau, patience=0, threshold=0.5))
def scheduled(interval: str, make: Callable[..., object], _seed: int) -> object:
    return train(
        mlp(),
        rows(300),
        128,
        epochs=2,
        scheduler=make,
        scheduler_interval=interval,
        memory_limit="100KiB",
    )


@case("nonfinite skip", "skip")
@case("nonfinite ignore", "ignore")
def nonfinite(what: str, _seed: int) -> object:
    x, y = rows(300)
    if what == "skip":
        x[7, 3] = torch.inf
    return train(mlp(), (x, y), 64, nonfinite=what, epochs=2, memory_limit="50KiB")


# Kinds of models and losses.


@case("BatchNorm micro", "micro", 33)
@case("BatchNorm frozen", "frozen", 33)
@case("BatchNorm refuse", "refuse", 32)
def normalised(mode: str, examples: int, _seed: int) -> object:
    """The last window is a single example, where it may be."""
    limit: dict[str, Any] = {} if mode == "refuse" else {"memory_limit": "500KiB"}
    return train(residual(), images(examples), 16, epochs=2, batch_norm=mode, **limit)


@case("dropout")
def dropout(_seed: int) -> object:
    return train(mlp(dropout=0.5), rows(300), 128, epochs=2, memory_limit="140KiB")


@case("ignored labels")
def ignored(_seed: int) -> object:
    loss = nn.CrossEntropyLoss(ignore_index=-1, label_smoothing=0.1)
    return train(Language(), ragged(60, -1), 24, loss=loss, memory_limit="100KiB")


@case("a model's own loss")
def own(_seed: int) -> object:
    tokens, labels = ragged(60)
    data = {"input_ids": tokens, "labels": labels}
    return train(WithLoss(), data, 24, epochs=2, memory_limit="100KiB")


@case("batch_loss")
def own_sum(_seed: int) -> object:
    def summed(model: nn.Module, batch: Pair) -> tuple[Tensor, Tensor]:
        scores, labels = model(batch[0]), batch[1]
        kept = labels != 0
        return F.cross_entropy(scores[kept], labels[kept], reduction="sum"), kept.sum()

    return train(mlp(), rows(300), 128, batch_loss=summed, memory_limit="120KiB")


def mean_loss(scores: Tensor, labels: Tensor) -> Tensor:
    return (scores.logsumexp(1) - scores.gather(1, labels[:, None])[:, 0]).square().mean()


def sum_loss(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    weights = 1.0 + labels
    return (F.cross_entropy(scores, labels, reduction="none") * weights).sum(), weights.sum()


@case("a custom mean", mean_loss)
@case("a custom sum", sum_loss)
@case("multi-margin", nn.MultiMarginLoss())
@case("weighted classes", nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5, 3.0, 1.5])))
def custom(loss: Callable[..., object], _seed: int) -> object:
    return train(mlp(), rows(300), 128, loss=loss, epochs=2, memory_limit="120KiB")


@case("regression")
def regression(_seed: int) -> object:
    data = torch.randn(300, 20), torch.randn(300, 5)
    return train(mlp(), data, 128, memory_limit="100KiB")


@case("a loss of the whole batch")
def whole(_seed: int) -> object:
    data = torch.randn(300, 20), torch.randn(300, 20), torch.arange(300)
    loss = WholeBatch(contrastive)
    return train(Towers(), data, 64, loss=loss, epochs=2, memory_limit="220KiB")


@case("forward")
def forward(_seed: int) -> object:
    def turned(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return model(batch["x"].flip(1)), batch["y"]

    x, y = rows(300)
    return train(mlp(), {"x": x, "y": y}, 128, forward=turned, memory_limit="100KiB")


@case("two inputs")
def two_inputs(_seed: int) -> object:
    data = torch.randn(300, 20), torch.randn(300, 7), torch.randint(0, 5, (300,))
    return train(Sum(), data, 128, memory_limit="50KiB")


# Kinds of data, and whole trainings.


@case("loader, shuffled, last window short", {"batch_size": 24, "shuffle": True}, {})
@case("loader, drop_last", {"batch_size": 24}, {"drop_last": True, "epochs": 3})
@case("loader with a generator", {"batch_size": 200, "shuffle": True, "own": True}, {"epochs": 2})
def loaded(loader: Mapping[str, Any], arguments: Mapping[str, Any], seed: int) -> object:
    options = dict(loader)
    own = torch.Generator().manual_seed(seed) if options.pop("own", False) else None
    data = DataLoader(Augmented(210), generator=own, **options)
    outcome = train(mlp(), data, 64, memory_limit="50KiB", **arguments)
    return outcome, None if own is None else own.get_state()


@case("dataset")
def dataset(_seed: int) -> object:
    return train(mlp(), TensorDataset(*rows(210)), 64, epochs=2, memory_limit="50KiB")


@case("iterable")
def iterable(_seed: int) -> object:
    def batches() -> Iterator[Pair]:
        for examples in (30, 41, 7, 64, 1, 50):
            yield rows(examples)

    return train(mlp(), batches(), 64, memory_limit="50KiB")


@case("evaluation")
def evaluated(_seed: int) -> object:
    def top2(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        right = (scores.topk(2).indices == labels[:, None]).any(1)
        return right[labels != 0].sum(), (labels != 0).sum()

    return train(
        mlp(dropout=0.2),
        rows(300),
        128,
        epochs=3,
        eval_data=rows(77),
        metrics={"top2": top2, "mean": lambda scores, _labels: scores.mean()},
        memory_limit="100KiB",
    )


@case("evaluation, inferred accuracy, plateau")
def evaluated_plateau(_seed: int) -> object:
    return train(
        mlp(),
        rows(300),
        128,
        epochs=3,
        eval_data=DataLoader(TensorDataset(*rows(77)), batch_size=20),
        scheduler=partial(ReduceLROnPlateau, patience=0, threshold=0.5),
        scheduler_interval="epoch",
        memory_limit="100KiB",
    )


@case("resumed")
def resumed(seed: int) -> object:
    """Two epochs at once; and stopped in the first, in the second, and resumed."""
    data, start = Augmented(210), mlp(dropout=0.3)

    def run(**arguments: Any) -> object:
        seed_all(seed)
        model = copy.deepcopy(start)
        outcome = train(
            model,
            data,
            64,
            epochs=2,
            scheduler=lambda o: OneCycleLR(o, max_lr=0.05, total_steps=8),
            memory_limit="60KiB",
            **arguments,
        )
        return outcome, generators()

    at_once = run()
    with tempfile.TemporaryDirectory() as folder:
        return at_once, [run(checkpoint_dir=folder, max_steps=steps) for steps in (2, 5, None)]


@case("prefer fastest, too short to be timed", {"prefer": "fastest", "max_steps": 1})
@case("prefer largest", {"prefer": "largest", "max_steps": 2})
@case("multiple_of", {"search": SearchOptions(multiple_of=8)})
@case("confirmed by a failure", {"search": SearchOptions(confirm="failed")})
@case("prior", {"search": SearchOptions(prior=90, worst_case="first", floor=2)})
def searched(arguments: Mapping[str, Any], _seed: int) -> object:
    return train(mlp(), rows(300), 128, memory_limit="90KiB", **arguments)


@case("memory runs out in the search")
def search_runs_out(_seed: int) -> object:
    return train(RunsOut(21), rows(300), 64, epochs=2)


# The object for one's own loop.


def loop(model: nn.Module, batches: Sequence[object], **arguments: Any) -> object:
    optimizer = AdamW(model.parameters(), lr=0.01)
    accumulator = Accumulator(model, optimizer, **arguments)
    steps = [of_step(accumulator.step(batch)) for batch in batches]
    known = accumulator.micro_batch, accumulator.steps, sorted(accumulator.moved_buffers)
    state = accumulator.state_dict()  # The layout of the rest is not public.
    states = state["scaler"], state["scheduler"]
    return of_module(model), optimizer.state_dict(), steps, known, states


@case("Accumulator")
def accumulated(_seed: int) -> object:
    batches = [rows(examples) for examples in (64, 50, 64, 3)]
    return loop(
        mlp(dropout=0.2),
        batches,
        micro_batch=20,
        scheduler=partial(StepLR, step_size=2, gamma=0.5),
        clip_grad_norm=0.5,
    )


@case("Accumulator, fp16")
def accumulated_fp16(_seed: int) -> object:
    return loop(mlp(), [rows(64) for _ in range(3)], micro_batch=20, precision="fp16")


@case("Accumulator, memory runs out", {})
@case("Accumulator, memory runs out, frozen", {"batch_norm": "frozen", "micro_batch": 40})
def replayed(arguments: Mapping[str, Any], _seed: int) -> object:
    return loop(RunsOut(21), [rows(64) for _ in range(3)], **arguments)


@case("Accumulator, memory runs out, whole batch")
def replayed_whole(_seed: int) -> object:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return contrastive((outputs, outputs.roll(1, 0), outputs.new_tensor(2.0)), targets)

    return loop(RunsOut(21), [rows(64) for _ in range(3)], loss=WholeBatch(loss))


# Searches without a training.


@case("find_batch_size", {})
@case("find_batch_size, multiple_of", {"search": SearchOptions(multiple_of=8)})
@case("find_batch_size, inference", {"mode": "inference"})
@case("find_batch_size, isolated", {"search": SearchOptions(isolate=True), "ceiling": 64})
def found(arguments: Mapping[str, Any], _seed: int) -> object:
    model = mlp(dropout=0.1)
    options = {"ceiling": 500, "memory_limit": "200KiB", **arguments}
    return of_search(find_batch_size(model, rows(600), **options)), of_module(model)


@case("find_largest")
def largest(_seed: int) -> object:
    model = mlp(dropout=0.1)
    optimizer = Adam(model.parameters())

    def work(size: int) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(size, 20)), torch.randint(0, 5, (size,))).backward()
        optimizer.step()

    search = find_largest(
        work, ceiling=512, state=[model, optimizer], memory_limit="200KiB", progress=False
    )
    return of_search(search), of_module(model), optimizer.state_dict()


# What a user copies.


@case("the demo's model and data, two steps")
def demo(seed: int) -> object:
    """The demo with less to do; in a process of its own, as a user starts it."""
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.pt"
        command = (
            "-m autobatch train torchvision:resnet18 --data digits --pixels 32 --desired 128 "
            f"--max-steps 2 --memory-limit 205MiB --seed {seed + 1} --json --quiet --save {weights}"
        )
        done = subprocess.run(
            [sys.executable, *command.split()],
            env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        fields = json.loads(done.stdout)
        trials = [(trial["size"], trial["fits"]) for trial in fields["search"]["trials"]]
        kept = [fields[key] for key in ("plan", "losses", "steps", "examples", "test_accuracy")]
        return torch.load(weights, weights_only=True), trials, kept


def program(code: str, seed: int) -> object:
    """Run a program of the README or the guide, and return the models and what came out."""
    seed_all(seed)
    names: dict[str, Any] = {"model": nn.Sequential(nn.Flatten(), nn.Linear(25, 3))}
    names["data"] = torch.randn(300, 1, 5, 5), torch.randint(0, 3, (300,))
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        stack.enter_context(contextlib.chdir(stack.enter_context(tempfile.TemporaryDirectory())))
        exec(compile(code, "a program of a page", "exec"), names)
    modules = [of_module(each) for each in names.values() if isinstance(each, nn.Module)]
    states = [each.state_dict() for each in names.values() if isinstance(each, Optimizer)]
    trainings = [of_training(each) for each in names.values() if isinstance(each, TrainingResult)]
    steps = [of_step(each) for each in names.values() if isinstance(each, StepResult)]
    sizes = [each.size for each in names.values() if isinstance(each, SearchResult)]
    return modules, states, trainings, steps, sizes


def add_programs() -> None:
    """Add the programs of the README and the guide that train or search, by digests of their code.

    ``SHORTEST`` was the README's first program; it takes the model and data that ``program`` gives.
    """
    pages = [ROOT / "README.md", ROOT / "docs" / "guide.md"]
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    for code in [SHORTEST, *re.findall(r"```python\n(.*?)```", text, re.DOTALL)]:
        if "find_" in code or "Accumulator" in code:
            version = hashlib.sha256(code.encode()).hexdigest()[:8]
            CASES[f"program {version}"] = partial(program, code)


SHORTEST: Final = """from autobatch import find_and_train

result = find_and_train(model, data, desired=256)
print(result.plan)  # 256 = 86 + 85 + 85: 3 accumulation steps, tolerable batch 86
"""

add_programs()


# The command.


def machine() -> dict[str, object]:
    """Return what has to be the same for bits to be."""
    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return {
        "cpu": named[1] if named else "unknown",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "threads": 1,
    }


def refusal(kept: Mapping[str, object]) -> str:
    """Return why digests that were kept cannot be compared with this machine's, or ``""``."""
    here = machine()
    for key, value in here.items():
        if kept.get(key) != value:
            return (
                f"the digests were written with {key} {kept.get(key)} and this is {key} {value}: "
                "bits cannot be compared between the two; write digests here first, with --write"
            )
    return ""


def compare(kept: Mapping[str, str], names: Sequence[str]) -> bool:
    """Run the cases, print a line for each, and return whether all are as they were."""
    same = True
    for name in names:
        begun = time.perf_counter()
        now, before = digest(name), kept.get(name)
        verdict = "same" if now == before else "not in the file" if before is None else "DIFFERENT"
        same = same and now == before
        print(f"{verdict:<15} {name} ({time.perf_counter() - begun:.1f} s)", flush=True)
    return same


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.digest", description=__doc__)
    parser.add_argument("--write", action="store_true", help="keep the digests instead")
    parser.add_argument("--file", type=Path, default=FILE, help="where they are kept")
    parser.add_argument("--only", default="", help="cases whose names hold this text")
    options = parser.parse_args(arguments)
    names = [name for name in CASES if options.only in name]
    if options.write:
        fields = {"machine": machine(), "digests": {name: digest(name) for name in names}}
        options.file.parent.mkdir(parents=True, exist_ok=True)
        options.file.write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
        print(f"{len(names)} digests in {options.file}")
        return 0
    if not options.file.exists():
        print(f"there is no {options.file}: write it first, with --write", file=sys.stderr)
        return 2
    kept = json.loads(options.file.read_text(encoding="utf-8"))
    why_not = refusal(kept["machine"])
    if why_not:
        print(why_not, file=sys.stderr)
        return 2
    gone = [name for name in kept["digests"] if name not in CASES and options.only in name]
    for name in gone:
        print(f"{'no such case':<15} {name}")
    return 0 if compare(kept["digests"], names) and not gone else 1


if __name__ == "__main__":
    sys.exit(main())
