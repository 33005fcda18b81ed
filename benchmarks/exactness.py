"""The law, measured: one accumulated step against the undivided batch, in float64."""

from collections.abc import Callable
from typing import Final, NamedTuple

import torch
from reference import (
    Pair,
    mean_of_means_steps,
    sgd,
    small_model,
    token_model,
    twin,
    undivided_steps,
)
from torch import Tensor, nn

from autobatch import Accumulator, BatchPlan
from benchmarks.findings import SEED, Findings

_TITLE: Final = "exactness: relative difference of the update from the undivided batch's"


class Case(NamedTuple):
    """Logical batches, the last of which is measured, and the largest micro-batch."""

    model: nn.Module
    loss: nn.Module
    batches: list[Pair]
    micro_batch: int

    @property
    def cut(self) -> tuple[int, ...]:
        """The last batch's micro-batches, autobatch's and the control's."""
        examples = len(self.batches[-1][0])
        return BatchPlan(desired=examples, tolerable=self.micro_batch).micro_batch_sizes


def run(findings: Findings) -> None:
    """Measure the six cases in which public engines take another step."""
    for name, case in findings.in_time(_cases(findings.device)):
        whole, ours, control = (f(case) for f in (_undivided, _autobatch, _mean_of_means))
        row = {
            "case": name,
            "cut": "+".join(map(str, case.cut)),
            "autobatch": float((ours - whole).norm() / whole.norm()),
            "mean of means": float((control - whole).norm() / whole.norm()),
        }
        findings.add(_TITLE, row)


def _autobatch(case: Case) -> Tensor:
    model = twin(case.model)
    accumulator = Accumulator(model, sgd(model), case.loss, micro_batch=case.micro_batch)
    return _last_update(model, accumulator.step, case.batches)


def _undivided(case: Case) -> Tensor:
    model = twin(case.model)
    optimizer = sgd(model)
    return _last_update(
        model, lambda batch: undivided_steps(model, optimizer, case.loss, [batch]), case.batches
    )


def _mean_of_means(case: Case) -> Tensor:
    """The usual mistake, in the last batch only: those before it are stepped undivided."""
    model = twin(case.model)
    optimizer = sgd(model)

    def step(batch: Pair) -> None:
        sizes = case.cut if batch is case.batches[-1] else [len(batch[0])]
        mean_of_means_steps(model, optimizer, case.loss, [batch], sizes)

    return _last_update(model, step, case.batches)


def _last_update(model: nn.Module, step: Callable[[Pair], object], batches: list[Pair]) -> Tensor:
    for batch in batches[:-1]:
        step(batch)
    before = nn.utils.parameters_to_vector(model.parameters()).detach()
    step(batches[-1])
    return nn.utils.parameters_to_vector(model.parameters()).detach() - before


def _cases(device: torch.device) -> dict[str, Case]:
    by_sample, by_token = small_model(SEED).to(device), token_model(SEED).to(device)
    samples, short = _samples(10, device), _samples(5, device)
    tokens, masked = _tokens(8, device), _tokens(8, device)
    masked[1][3:6] = -100  # All of the second micro-batch.
    mean, total = nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")
    return {
        "samples, 10 by 4": Case(by_sample, mean, [samples], 4),
        "tokens, 8 by 2": Case(by_token, mean, [tokens], 2),
        "tokens, 8 by 3": Case(by_token, mean, [tokens], 3),
        "one micro-batch all masked": Case(by_token, mean, [masked], 3),
        "sum loss, 10 by 4": Case(by_sample, total, [samples], 4),
        "short last batch, 5 by 4": Case(by_sample, mean, [samples, short], 4),
    }


def _samples(examples: int, device: torch.device) -> Pair:
    generator = torch.Generator().manual_seed(SEED + examples)
    x = torch.randn(examples, 5, generator=generator, dtype=torch.float64)
    return x.to(device), torch.randint(0, 3, (examples,), generator=generator).to(device)


def _tokens(examples: int, device: torch.device, length: int = 6) -> Pair:
    """Of every length from 1 to ``length``; the rest is masked."""
    generator = torch.Generator().manual_seed(SEED + examples)
    x = torch.randint(0, 7, (examples, length), generator=generator)
    y = torch.randint(0, 4, (examples, length), generator=generator)
    lengths = torch.randint(1, length + 1, (examples, 1), generator=generator)
    return x.to(device), y.masked_fill(torch.arange(length) >= lengths, -100).to(device)
