"""A hundred failures anywhere leave the training that would have been without them."""

import copy
import gc
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from characters import character_batches, vocabulary
from reference import assert_exact
from states import fingerprint
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from autobatch import Accumulator, StepResult
from autobatch.training.engine import micro_batch_size

FAILURES = 50  # With dropout, and as many without.
EXAMPLES = 8  # In a window.

# Each failure collects garbage, and need not look at what a dispatch mode has imported.
gc.freeze()


class Characters(nn.Module):
    """Reads text ``(batch, time)``, and gives scores ``(batch, characters, time)``."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(vocabulary()) + 1, 6)
        self.dropout = nn.Dropout(dropout)
        self.reads = nn.LSTM(6, 8, batch_first=True)
        self.scores = nn.Linear(8, len(vocabulary()) + 1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden, _ = self.reads(self.dropout(self.embedding(input_ids)))
        scores: Tensor = self.scores(hidden * attention_mask[..., None])
        return scores.transpose(1, 2)


class ResNet(nn.Module):
    """Two residual blocks with BatchNorm, for images ``(batch, 1, 8, 8)``."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(4),
                nn.ReLU(inplace=True),
                nn.Conv2d(4, 4, 3, padding=1, bias=False),
                nn.BatchNorm2d(4),
                nn.ReLU(inplace=True),
                nn.Dropout2d(dropout),
                nn.Conv2d(4, 4, 3, padding=1),
            )
            for _ in range(2)
        )
        self.scores = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.stem(images)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        scores: Tensor = self.scores(hidden.mean((2, 3)))
        return scores


class VisionTransformer(nn.Module):
    """Four patches and a class token, for images ``(batch, 1, 8, 8)``."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 8, 4, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.places = nn.Parameter(torch.randn(1, 5, 8) / 8)
        self.layer = nn.TransformerEncoderLayer(
            8, 2, 16, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.scores = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(images), -1, -1), patches], dim=1)
        scores: Tensor = self.scores(self.layer(tokens + self.places)[:, 0])
        return scores


Batch = Mapping[str, Tensor]


def text() -> list[Batch]:
    return list(character_batches(8 * EXAMPLES, EXAMPLES, longest=9, seed=0))


def images() -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8 * EXAMPLES, 1, 8, 8, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 3, (8 * EXAMPLES,), generator=generator)
    pairs = zip(x.split(EXAMPLES), y.split(EXAMPLES), strict=True)
    return [{"images": images, "labels": labels} for images, labels in pairs]


class Fails(TorchDispatchMode):
    """Runs out of memory at chosen operations between a forward pass and the optimizer's step."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.in_window = False
        self.chosen: list[int] = []
        self.operations = 0
        self.phases: list[str] = []
        self.hooks = [
            model.register_forward_pre_hook(lambda *_: self.switch(on=True)),
            optimizer.register_step_pre_hook(lambda *_: self.switch(on=False)),
        ]

    def switch(self, *, on: bool) -> None:
        self.in_window = on

    def __torch_dispatch__(  # type: ignore[no-untyped-def]
        self,
        func,
        types,
        args=(),
        kwargs=None,
    ):
        if func.namespace == "profiler":  # The optimizer's step says so before its hook is called.
            return func(*args, **(kwargs or {}))
        self.operations += self.in_window
        if self.in_window and self.chosen and self.operations == self.chosen[0]:
            self.operations, self.in_window = 0, False  # Of the next attempt.
            del self.chosen[0]
            backward = torch._C._current_graph_task_id() >= 0
            self.phases.append("backward" if backward else "forward")
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return func(*args, **(kwargs or {}))


@dataclass
class Training:
    """A model that is trained for as long as memory runs out."""

    model: nn.Module
    results: list[StepResult] = field(default_factory=list)
    trained_on: list[Batch] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.5)

    def survive(self, batches: list[Batch], choice: random.Random) -> list[str]:
        """Train through the failures; return where they were."""
        accumulator = Accumulator(self.model, self.optimizer)
        failing, operations = Fails(self.model, self.optimizer), 200
        while len(failing.phases) < FAILURES:
            batch = batches[len(self.results) % len(batches)]
            most = 1 if accumulator.micro_batch == 1 else 2  # One example twice in a row: too many.
            count = choice.choice([0, 1, most])
            failing.chosen = [choice.randint(1, operations) for _ in range(count)]
            failing.operations = 0
            with failing:
                self.results.append(accumulator.step(batch))
            self.trained_on.append(batch)
            operations = failing.operations
        assert accumulator.steps == len(self.results)
        for hook in failing.hooks:
            hook.remove()
        return failing.phases

    def follow(self, batches: Iterable[Batch], sizes: Iterable[tuple[int, ...]]) -> None:
        """Train without failures, in micro-batches of given sizes."""
        for batch, parts in zip(batches, sizes, strict=True):
            accumulator = Accumulator(self.model, self.optimizer, micro_batch=max(parts))
            self.results.append(accumulator.step(batch))

    def undivided(self, batches: Iterable[Batch]) -> list[float]:
        """Train as everybody does, and return the losses."""
        losses = []
        for batch in batches:
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.model(**inputs), batch["labels"])
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
        return losses


CASES = {
    "characters": (Characters, text),
    "resnet": (ResNet, images),
    "vision transformer": (VisionTransformer, images),
}


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("name", CASES)
def test_training_survives_failures_anywhere(
    name: str, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        micro_batch_size, "PATIENCE", 2
    )  # So that sizes come back between the failures.
    monkeypatch.setattr(micro_batch_size, "LONGEST_PATIENCE", 2)
    kind, batches = CASES[name]
    torch.manual_seed(0)
    model = kind(dropout).double()
    broken, steady, plain = (Training(copy.deepcopy(model)) for _ in range(3))
    torch.manual_seed(1)
    phases = broken.survive(batches(), random.Random(name))
    after = fingerprint(broken.model, broken.optimizer)
    torch.manual_seed(1)
    sizes = [result.micro_batch_sizes for result in broken.results]
    steady.follow(broken.trained_on, sizes)

    assert sum(result.replays for result in broken.results) == len(phases) >= FAILURES
    assert min(phases.count("forward"), phases.count("backward")) > FAILURES / 4
    assert len({len(parts) for parts in sizes}) >= 3
    assert [result.micro_batch_sizes for result in steady.results] == sizes
    assert [result.loss for result in steady.results] == [r.loss for r in broken.results]
    assert fingerprint(steady.model, steady.optimizer) == after, "bit for bit"
    if not dropout and kind is not ResNet:  # No example sees another, and nothing is drawn.
        assert_exact(plain.undivided(broken.trained_on), [r.loss for r in broken.results])
        assert_exact(plain.model.state_dict(), broken.model.state_dict())
