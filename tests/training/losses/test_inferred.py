"""What is found out about a model's own loss is kept, and evaluation does not change it."""

import pytest
import torch
import torch.nn.functional as F
from reference import assert_exact, sgd
from torch import Tensor, nn

from autobatch import Accumulator, find_and_train
from autobatch.training.losses.inferred import InferredObjective
from autobatch.training.losses.resolve import resolve_loss
from autobatch.training.losses.supervised import SupervisedObjective

Batch = dict[str, Tensor]


class Causal(nn.Module):
    """Returns a mean over labels shifted by one, as causal language models do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(7, 7, dtype=torch.float64)

    def forward(self, tokens: Tensor, labels: Tensor) -> dict[str, Tensor]:
        scores = self.table(tokens)
        loss = F.cross_entropy(scores[:, :-1].reshape(-1, 7), labels[:, 1:].reshape(-1))
        return {"loss": loss, "scores": scores}


def text(*lengths: int) -> Batch:
    generator = torch.Generator().manual_seed(sum(lengths))
    tokens = torch.randint(0, 7, (len(lengths), 6), generator=generator)
    past = torch.arange(6) >= torch.tensor(lengths)[:, None]
    return {"tokens": tokens, "labels": tokens.masked_fill(past, -100)}


def inferred() -> InferredObjective:
    return InferredObjective(otherwise=SupervisedObjective(loss=resolve_loss(None), forward=None))


def same(batch: object) -> object:
    return batch


def test_a_checkpoint_keeps_what_was_found_out() -> None:
    objective, model = inferred(), Causal()
    equal, ragged = text(6, 6, 6), text(6, 2, 4)
    objective.prepare(model, equal, same, cut=True)
    objective.prepare(model, ragged, same, cut=True)
    assert objective.denominator(ragged) == 5 + 1 + 3
    again = inferred()
    again.load_state_dict(objective.state_dict())
    assert again.denominator(equal) == objective.denominator(equal) == 15
    assert again.state_dict() == objective.state_dict()


def test_the_objective_for_evaluation_does_not_change_the_other() -> None:
    objective, model = inferred(), Causal()
    objective.prepare(model, text(6, 6, 6), same, cut=True)
    before = objective.state_dict()
    evaluated = objective.for_evaluation()
    evaluated.prepare(model, text(6, 2, 4), same, cut=True)
    assert objective.state_dict() == before != evaluated.state_dict()


def test_evaluation_on_ragged_text_changes_no_bit_of_training() -> None:
    def losses(**options: object) -> tuple[float, ...]:
        return find_and_train(
            Causal(),
            [text(6, 6, 6, 6), text(6, 6, 6, 6)],
            4,
            optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
            epochs=2,
            memory_limit="4KiB",
            progress=False,
            **options,  # type: ignore[arg-type]
        ).losses

    assert losses(eval_data=[text(6, 2, 4)]) == losses()


@pytest.mark.parametrize("micro_batch", [3, 1])
def test_a_first_batch_without_a_label_is_skipped(micro_batch: int) -> None:
    model = Causal()
    accumulator = Accumulator(model, sgd(model), micro_batch=micro_batch)
    nothing = {**text(6, 6, 6), "labels": torch.full((3, 6), -100)}
    assert accumulator.step(nothing).skipped
    batch = text(6, 2, 4)
    step = accumulator.step(batch)
    assert_exact(step.loss, Causal()(**batch)["loss"].item())
    if micro_batch < 3:  # Without a cut, the terms do not matter and are not counted.
        assert step.terms == 9
