"""What a step of autobatch costs beside the plain loop that a person writes."""

from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from reference import twin
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from autobatch import Accumulator
from autobatch.commands.vision import import_torchvision
from benchmarks.findings import SEED, Findings
from benchmarks.samples import Samples, alternated

_TITLE: Final = (
    "engine: Accumulator.step against the plain loop, same micro-batches and weights, in turns; "
    "median [minimum, maximum]"
)


class Case(NamedTuple):
    """A model on the device, the shape of one example, and how much is run."""

    model: nn.Module
    shape: tuple[int, ...]
    micro_batch: int
    micro_batches: int
    steps: int  # Optimizer steps in one sample.
    pairs: int


def run(findings: Findings) -> None:
    """Measure both in pairs."""
    for name, case in findings.in_time(_cases(findings)):
        _measure(name, case, findings)


def plain_step(
    model: nn.Module, optimizer: Optimizer, inputs: Tensor, targets: Tensor, size: int
) -> float:
    """The accumulation loop by hand, with exact weights; returns the logical batch's loss."""
    device = next(model.parameters()).device
    total = torch.zeros((), device=device)
    optimizer.zero_grad()
    for x, y in zip(inputs.split(size), targets.split(size), strict=True):
        outputs = model(x.to(device, non_blocking=True))
        loss = F.cross_entropy(outputs, y.to(device, non_blocking=True), reduction="sum")
        loss = loss / len(targets)
        loss.backward()
        total += loss.detach()
    optimizer.step()
    return total.item()


def _measure(name: str, case: Case, findings: Findings) -> None:
    generator = torch.Generator().manual_seed(SEED)
    inputs = torch.randn(case.micro_batch * case.micro_batches, *case.shape, generator=generator)
    targets = torch.randint(0, 10, (len(inputs),), generator=generator)
    ours, plain = twin(case.model), twin(case.model)
    optimizer = SGD(plain.parameters(), lr=0.01)
    accumulator = Accumulator(
        ours, SGD(ours.parameters(), lr=0.01), nn.CrossEntropyLoss(), micro_batch=case.micro_batch
    )

    def autobatch_steps() -> None:
        for _ in range(case.steps):
            accumulator.step((inputs, targets))
        _synchronize(findings.device)

    def plain_steps() -> None:
        for _ in range(case.steps):
            plain_step(plain, optimizer, inputs, targets, case.micro_batch)
        _synchronize(findings.device)

    autobatch_steps()  # Warm.
    plain_steps()
    difference = _difference(ours, plain)
    until = findings.deadline
    pairs = list(alternated(autobatch_steps, plain_steps, case.pairs, deadline=until))
    control = list(alternated(plain_steps, plain_steps, case.pairs, deadline=until))
    per_us = case.steps * case.micro_batches / 1e6
    row = {
        "model": name,
        "pairs": f"{len(pairs)} of {case.pairs}",
        "ratio": Samples(one / other for one, other in pairs),
        "plain to itself": Samples(one / other for one, other in control),
        "plain, us per micro-batch": Samples(other / per_us for _, other in pairs),
        "on top, us per micro-batch": Samples((one - other) / per_us for one, other in pairs),
    }
    findings.add(_TITLE, row, parameters_differ_by=difference)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _difference(one: nn.Module, other: nn.Module) -> float:
    """Relative, after the same steps on the same batch: that both did the same work."""
    first, second = (nn.utils.parameters_to_vector(m.parameters()) for m in (one, other))
    return float((first - second).detach().norm() / second.detach().norm())


def _cases(findings: Findings) -> dict[str, Case]:
    torch.manual_seed(SEED)
    quick, device = findings.quick, findings.device
    mlp = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10)).to(device)
    pairs = 6 if quick else 200
    cases = {
        f"MLP 32-64-10, {count} x 32": Case(mlp, (32,), 32, count, steps=32 // count, pairs=pairs)
        for count in (8, 1)
    }
    if not quick:
        resnet = import_torchvision().models.resnet18(num_classes=10).to(device)
        cases["resnet18 at 32 px, 4 x 16"] = Case(resnet, (3, 32, 32), 16, 4, steps=1, pairs=15)
    return cases
