"""Finding the largest size: how far, at what cost, and what is left behind."""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import torch
from black_box import RAN, BlackBox
from states import fingerprint
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from autobatch import find_batch_size
from autobatch.commands.vision import import_torchvision
from autobatch.devices.choose import open_device
from autobatch.units import format_bytes
from benchmarks.findings import SEED, Fields, Findings
from benchmarks.samples import Samples

Data = tuple[Tensor, Tensor]
Search = Callable[[nn.Module, Optimizer, Data], tuple[int, int]]  # The size, and trials.

_BOXES: Final = "search: black boxes that run out of memory above a limit of examples"
_ALL: Final = "search: all black boxes together"
_MODELS: Final = "search: real models under a limit; cost is the whole search in rehearsals"
_LIMITS: Final = (1, 3, 7, 37, 100, 129, 1000)
_CEILINGS: Final = (256, 4096)
_ON_A_GPU: Final = 8  # Limits and data grow so: cuBLAS alone takes 32 MiB of them there.
_FORWARDS: list[int] = []  # A global, like RAN: no search puts it back.


class Hunt(NamedTuple):
    """Searches in one black box: what was found, what it took, and what it left behind."""

    limit: int
    ceiling: int
    possible: int
    found: int
    trials: int
    forwards: int  # All passes of the model, those outside trials too.
    out_of_memory: int
    seconds: Samples
    unchanged: bool


def run(findings: Findings) -> None:
    """Search in black boxes beside plain doubling and bisection, then on three real models."""
    boxes = {f"K = {k}, ceiling {c}": (k, c) for c in _CEILINGS for k in _LIMITS}
    models = _models()
    if findings.quick:
        boxes, models = dict(list(boxes.items())[:3]), dict(list(models.items())[:1])
    hunts: dict[str, list[Hunt]] = {way: [] for way in _WAYS}
    for _, (limit, ceiling) in findings.in_time(boxes):
        for way, search in _WAYS.items():
            hunts[way].append(_hunt(search, limit, ceiling, findings))
            findings.add(_BOXES, {"by": way} | hunts[way][-1]._asdict())
    for way, done in hunts.items():
        if done:
            findings.add(_ALL, {"by": way, **_sums(done)})
    for name, real in findings.in_time(models):
        _on_a_model(name, real, findings)


def largest_by_doubling(fits: Callable[[int], bool], ceiling: int) -> int:
    """The slow, obvious way: 1, 2, 4 and so on until one fails, then bisection."""
    good, bad, size = 0, ceiling + 1, 1
    while bad - good > 1:
        if fits(size):
            good = size
        else:
            bad = size
        size = min(2 * good, ceiling) if bad > ceiling else (good + bad) // 2
    return good


def _doubling(model: nn.Module, optimizer: Optimizer, data: Data) -> tuple[int, int]:
    device, loss = next(model.parameters()).device, nn.CrossEntropyLoss()
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        optimizer.zero_grad()
        try:
            inputs, targets = (tensor[:size].to(device) for tensor in data)
            loss(model(inputs), targets).backward()
            optimizer.step()
        except torch.OutOfMemoryError:
            return False
        return True

    return largest_by_doubling(fits, len(data[0])), len(tried)


def _autobatch(model: nn.Module, optimizer: Optimizer, data: Data) -> tuple[int, int]:
    device = next(model.parameters()).device
    found = find_batch_size(model, data, ceiling=len(data[0]), optimizer=optimizer, device=device)
    return found.size, len(found.trials)


_WAYS: Final[dict[str, Search]] = {"autobatch": _autobatch, "doubling": _doubling}


class _Watched(BlackBox):
    def forward(self, images: Tensor) -> Tensor:
        _FORWARDS.append(len(images))
        return super().forward(images)


def _hunt(search: Search, limit: int, ceiling: int, findings: Findings) -> Hunt:
    """Three searches, each in a box of its own; all but the seconds is the same each time."""
    seconds, unchanged = Samples(), True
    for _ in range(1 if findings.quick else 3):
        model = _Watched(limit).to(findings.device)
        optimizer = Adam(model.parameters())
        data = _images(ceiling, channels=1, pixels=5, classes=3)
        model(data[0][:1].to(findings.device)).sum().backward()  # A gradient that is to be kept.
        before = fingerprint(model, optimizer)
        RAN.clear()
        _FORWARDS.clear()
        started = time.perf_counter()
        found, trials = search(model, optimizer, data)
        seconds.append(time.perf_counter() - started)
        unchanged &= fingerprint(model, optimizer) == before
    return Hunt(
        limit=limit,
        ceiling=ceiling,
        possible=min(limit, ceiling),
        found=found,
        trials=trials,
        forwards=len(_FORWARDS),
        out_of_memory=len(_FORWARDS) - len(RAN),
        seconds=seconds,
        unchanged=unchanged,
    )


def _sums(hunts: list[Hunt]) -> Fields:
    shares = [hunt.found / hunt.possible for hunt in hunts]
    return {
        "boxes": len(hunts),
        "mean found / possible": sum(shares) / len(shares),
        "worst": min(shares),
        "trials": sum(hunt.trials for hunt in hunts),
        "forwards": sum(hunt.forwards for hunt in hunts),
        "out_of_memory": sum(hunt.out_of_memory for hunt in hunts),
        "seconds": sum(hunt.seconds.median for hunt in hunts),
        "unchanged": all(hunt.unchanged for hunt in hunts),
    }


class _Real(NamedTuple):
    make: Callable[[], nn.Module]
    optimizer: Callable[[Iterator[nn.Parameter]], Optimizer]
    limit_bytes: int


def _models() -> dict[str, _Real]:
    vision, mib = import_torchvision().models, 2**20
    momentum = functools.partial(SGD, lr=0.01, momentum=0.9)
    sizes = {"image_size": 32, "patch_size": 8, "num_layers": 4, "num_heads": 4, "hidden_dim": 64}
    return {
        "MLP 3072-256-256-10, Adam": _Real(_mlp, Adam, 32 * mib),
        "resnet18 at 32 px, SGD with momentum": _Real(
            functools.partial(vision.resnet18, num_classes=10), momentum, 256 * mib
        ),
        "ViT of 4 layers, 64 wide, at 32 px, AdamW": _Real(
            functools.partial(vision.VisionTransformer, mlp_dim=128, num_classes=10, **sizes),
            AdamW,
            64 * mib,
        ),
    }


def _mlp() -> nn.Module:
    inner = (nn.Linear(3072, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())
    return nn.Sequential(nn.Flatten(), *inner, nn.Linear(256, 10))


def _on_a_model(name: str, real: _Real, findings: Findings) -> None:
    """On the CPU the meter holds the limit, on a GPU the allocator; its context comes on top."""
    torch.manual_seed(SEED)
    model = real.make().to(findings.device)
    optimizer = real.optimizer(model.parameters())
    scale = _ON_A_GPU if findings.device.type == "cuda" else 1
    data = _images(4096 * scale, channels=3, pixels=32, classes=10)
    before = fingerprint(model, optimizer)
    seconds, rehearsals = Samples(), Samples()
    for _ in range(1 if findings.quick else 3):
        outside_bytes = open_device(findings.device).read().outside_bytes
        started = time.perf_counter()
        found = find_batch_size(
            model,
            data,
            optimizer=optimizer,
            device=findings.device,
            memory_limit=scale * real.limit_bytes + outside_bytes,
        )
        seconds.append(time.perf_counter() - started)
        one = next(trial for trial in found.trials if trial.fits and trial.size == found.size)
        rehearsals.append(seconds[-1] / one.seconds)
    row = {
        "model": name,
        "limit": format_bytes(found.limit_bytes),
        "found": found.size,
        "trials": len(found.trials),
        "failures": sum(not trial.fits for trial in found.trials),
        "seconds": seconds,
        "cost": rehearsals,
        "unchanged": fingerprint(model, optimizer) == before,
    }
    findings.add(_MODELS, row, each_trial=[str(trial) for trial in found.trials])


def _images(examples: int, *, channels: int, pixels: int, classes: int) -> Data:
    generator = torch.Generator().manual_seed(SEED)
    images = torch.randn(examples, channels, pixels, pixels, generator=generator)
    return images, torch.randint(0, classes, (examples,), generator=generator)
