"""A new kind of loss is one class with its objective; no module of autobatch changes."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from autobatch import Accumulator, StepOptions, find_and_train
from autobatch.data.tree import BatchTree, size_of
from autobatch.training.losses.forward import Forward, standard_forward
from autobatch.training.losses.objective import MicroBatch, Objective, Passes, Record


@dataclass(frozen=True)
class Quantile:
    """The pinball loss of one quantile, a mean over examples, with a learned offset."""

    level: float
    offset: nn.Parameter

    @property
    def module(self) -> nn.Module:
        holder = nn.Module()
        holder.offset = self.offset
        return holder

    def objective(self, forward: Forward | None) -> "QuantileObjective":
        assert forward is None
        return QuantileObjective(self)

    def sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        error = targets - outputs - self.offset
        return torch.maximum(self.level * error, (self.level - 1) * error).sum()


@dataclass(frozen=True)
class QuantileObjective(Objective):
    kind: Quantile

    def denominator(self, batch: BatchTree) -> float:
        return size_of(batch)

    def run(self, passes: Passes, model: nn.Module, record: Record | None = None) -> None:
        def loss(micro_batch: MicroBatch) -> tuple[Tensor, None]:
            outputs, targets = standard_forward(model, micro_batch.batch)
            if record is not None:
                record(outputs, targets)
            assert isinstance(outputs, Tensor)
            assert isinstance(targets, Tensor)
            return self.kind.sum(outputs, targets), None

        passes.one_by_one(loss)

    def notes(self, *, cut: bool) -> Iterator[str]:
        yield f"quantile {self.kind.level}, {'cut' if cut else 'whole'}"


def problem() -> tuple[nn.Module, Quantile, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 1)).double()
    data = (torch.randn(40, 5, dtype=torch.float64), torch.randn(40, 1, dtype=torch.float64))
    return model, Quantile(0.3, nn.Parameter(torch.zeros(1, dtype=torch.float64))), data


@pytest.mark.parametrize("weight", [1, 2])
def test_a_new_loss_kind_takes_the_undivided_step_in_parts(weight: int) -> None:
    ours, kind, data = problem()
    parameters = [*ours.parameters(), kind.offset]
    Accumulator(ours, torch.optim.SGD(parameters, lr=0.1), kind, micro_batch=7).step(data)

    whole, reference, _ = problem()
    parameters = [*whole.parameters(), reference.offset]
    loss = weight * reference.sum(whole(data[0]), data[1]) / 40
    loss.backward()
    torch.optim.SGD(parameters, lr=0.1).step()
    found = torch.cat([p.flatten() for p in (*ours.parameters(), kind.offset)])
    expected = torch.cat([p.flatten() for p in parameters])
    same = torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
    assert same is (weight == 1), "a wrong weight must show"


def test_a_new_loss_kind_works_with_a_search_training_and_evaluation() -> None:
    model, kind, data = problem()
    result = find_and_train(
        model,
        data,
        16,
        options=StepOptions(loss=kind),
        eval_data=data,
        metrics={"error": lambda outputs, targets: (outputs - targets).abs().mean()},
        memory_limit=36_000,
        progress=False,
    )
    assert result.plan.accumulation_steps > 1
    assert "quantile 0.3, cut" in result.notes
    (evaluation,) = result.evaluations
    with torch.no_grad():
        outputs = model(data[0])
    assert evaluation.loss == pytest.approx(
        float(kind.sum(outputs, data[1]).detach()) / 40, rel=1e-12
    )
    assert evaluation.metrics["error"] == pytest.approx(float((outputs - data[1]).abs().mean()))
