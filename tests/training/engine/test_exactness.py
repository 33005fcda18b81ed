"""Any split of a batch takes the step of the undivided batch, through the public API."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import (
    LossFunction,
    Pair,
    assert_exact,
    assert_same_parameters,
    mean_of_means_steps,
    sgd,
    small_model,
    token_model,
    twin,
    undivided_steps,
)
from torch import Tensor, nn

from autobatch import Accumulator, InexactStepError


@dataclass(frozen=True)
class Case:
    """One of the cases in which public engines take another step, or none."""

    model: nn.Module
    loss: LossFunction
    batches: list[Pair]
    micro_batch: int
    split: tuple[int, ...]  # What the plan cuts the last batch into.


def samples(examples: int, seed: int = 1) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (examples,), generator=generator)


def tags(examples: int) -> Pair:
    x, y = samples(examples)
    return x, torch.stack([y == 0, y != 1, y == 2], 1).double()


def tokens(examples: int, seed: int = 2, length: int = 6) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 7, (examples, length), generator=generator)
    y = torch.randint(0, 4, (examples, length), generator=generator)
    lengths = torch.randint(1, length + 1, (examples,), generator=generator)
    return x, y.masked_fill(torch.arange(length) >= lengths[:, None], -100)


def masked_part() -> Pair:
    x, y = tokens(8)
    y[3:6] = -100  # All of the second micro-batch.
    return x, y


def total(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="sum")


_WEIGHTS = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)
CASES = {
    "samples in 4 + 3 + 3": Case(small_model(), nn.CrossEntropyLoss(), [samples(10)], 4, (4, 3, 3)),
    "tokens in 2 + 2 + 2 + 2": Case(
        token_model(), nn.CrossEntropyLoss(), [tokens(8)], 2, (2, 2, 2, 2)
    ),
    "tokens in 3 + 3 + 2": Case(token_model(), nn.CrossEntropyLoss(), [tokens(8)], 3, (3, 3, 2)),
    "one micro-batch all masked": Case(
        token_model(), nn.CrossEntropyLoss(), [masked_part()], 3, (3, 3, 2)
    ),
    "sum loss in 4 + 3 + 3": Case(
        small_model(), nn.CrossEntropyLoss(reduction="sum"), [samples(10)], 4, (4, 3, 3)
    ),
    "tags of several weights": Case(
        small_model(),
        nn.BCEWithLogitsLoss(weight=_WEIGHTS, pos_weight=2 * _WEIGHTS),
        [tags(10)],
        4,
        (4, 3, 3),
    ),
    "short last logical batch": Case(
        small_model(), nn.CrossEntropyLoss(), [samples(10), samples(5, seed=3)], 4, (3, 2)
    ),
}


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def test_the_engine_takes_the_undivided_step(case: Case) -> None:
    ours, whole = twin(case.model), twin(case.model)
    accumulator = Accumulator(ours, sgd(ours), case.loss, micro_batch=case.micro_batch)
    steps = [accumulator.step(batch) for batch in case.batches]
    losses = undivided_steps(whole, sgd(whole), case.loss, case.batches)
    assert steps[-1].micro_batch_sizes == case.split
    assert_same_parameters(ours, whole)
    assert_exact([step.loss for step in steps], losses)


def test_the_mean_of_means_takes_another_step(case: Case) -> None:
    batch = case.batches[-1]
    wrong, whole = twin(case.model), twin(case.model)
    mean_of_means_steps(wrong, sgd(wrong), case.loss, [batch], case.split)
    undivided_steps(whole, sgd(whole), case.loss, [batch])
    with pytest.raises(AssertionError, match="not close"):
        assert_same_parameters(wrong, whole)


@settings(deadline=None, max_examples=60)
@given(
    desired=st.integers(1, 17),
    micro_batch=st.integers(1, 17),
    seed=st.integers(0, 2**16),
    weighted=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.1]),
)
def test_any_split_of_ragged_tokens_takes_the_undivided_step(
    desired: int, micro_batch: int, seed: int, weighted: bool, smoothing: float
) -> None:
    weight = torch.tensor([0.2, 1.0, 3.0, 0.5], dtype=torch.float64) if weighted else None
    loss = nn.CrossEntropyLoss(weight=weight, label_smoothing=smoothing)
    batches = [tokens(desired, seed), tokens(max(1, desired // 2), seed + 1)]
    whole = token_model(seed)
    ours = twin(whole)
    accumulator = Accumulator(ours, sgd(ours), loss, micro_batch=micro_batch)
    losses = [accumulator.step(batch).loss for batch in batches]
    assert_exact(losses, undivided_steps(whole, sgd(whole), loss, batches))
    assert_same_parameters(ours, whole)


def mean_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.logsumexp(1) - outputs.gather(1, targets[:, None])[:, 0]).mean()


def masked_mean(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets) * 1.0


def sum_and_terms(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return total(outputs, targets), (targets != -100).sum()


def test_an_unknown_mean_over_examples_is_exact() -> None:
    ours, whole = small_model(), small_model()
    step = Accumulator(ours, sgd(ours), mean_loss, micro_batch=4).step(samples(10))
    (loss,) = undivided_steps(whole, sgd(whole), mean_loss, [samples(10)])
    assert_same_parameters(ours, whole)
    assert step.loss == pytest.approx(loss, rel=1e-12)


def test_sum_and_terms_is_exact_for_a_masked_mean() -> None:
    ours, whole = token_model(), token_model()
    step = Accumulator(ours, sgd(ours), sum_and_terms, micro_batch=3).step(masked_part())
    (loss,) = undivided_steps(whole, sgd(whole), F.cross_entropy, [masked_part()])
    assert_same_parameters(ours, whole)
    assert step.loss == pytest.approx(loss, rel=1e-12)
    assert step.terms == float((masked_part()[1] != -100).sum())


def test_a_mean_over_anything_but_examples_is_refused_and_nothing_has_changed() -> None:
    model, before = token_model(), token_model()
    with pytest.raises(InexactStepError, match=r"\(sum, terms\)"):
        Accumulator(model, sgd(model), masked_mean, micro_batch=3).step(masked_part())
    torch.testing.assert_close(model.state_dict(), before.state_dict(), rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("ragged_window", [2, 4, 8, 16])
def test_a_mean_over_tokens_is_found_out_when_they_begin_to_differ(ragged_window: int) -> None:
    model = token_model()
    accumulator = Accumulator(model, sgd(model), masked_mean, micro_batch=3)
    x, y = tokens(8)
    full = (x, y.clamp(min=0))
    for _ in range(ragged_window - 1):
        accumulator.step(full)
    with pytest.raises(InexactStepError):
        accumulator.step((x, y))


def test_a_mean_over_nothing_in_one_micro_batch_is_refused_in_any_window() -> None:
    model = token_model()
    accumulator = Accumulator(model, sgd(model), masked_mean, micro_batch=3)
    x, _ = tokens(8)
    _, masked = masked_part()
    full = (x, tokens(8)[1].clamp(min=0))
    for _ in range(2):
        accumulator.step(full)
    before = twin(model)
    with pytest.raises(InexactStepError, match="not finite for 1 of 3 micro-batches"):
        accumulator.step((x, masked))
    torch.testing.assert_close(model.state_dict(), before.state_dict(), rtol=0, atol=0)


def test_a_loss_that_couples_examples_is_refused() -> None:
    def contrastive(outputs: Tensor, targets: Tensor) -> Tensor:
        scores = outputs @ outputs.T
        return F.cross_entropy(scores, torch.arange(len(targets)))

    model = small_model()
    with pytest.raises(InexactStepError):
        Accumulator(model, sgd(model), contrastive, micro_batch=4).step(samples(10))


def test_an_undivided_window_needs_no_check() -> None:
    model, whole = token_model(), token_model()
    Accumulator(model, sgd(model), masked_mean).step(masked_part())
    undivided_steps(whole, sgd(whole), masked_mean, [masked_part()])
    assert_same_parameters(model, whole)


def test_forward_names_outputs_and_targets_of_any_batch() -> None:
    def autoencode(model: nn.Module, batch: object) -> tuple[Tensor, Tensor]:
        assert isinstance(batch, Tensor)
        return model(batch), batch

    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(5, 2), nn.Linear(2, 5)).double()
    for reduction in ("mean", "sum"):
        ours, theirs = twin(whole), twin(whole)
        loss = nn.MSELoss(reduction=reduction)
        x = samples(10)[0]
        Accumulator(ours, sgd(ours), loss, micro_batch=4, forward=autoencode).step(x)
        undivided_steps(theirs, sgd(theirs), loss, [(x, x)])
        assert_same_parameters(ours, theirs)


def test_forward_with_ragged_targets_uses_the_logical_batch_s_terms() -> None:
    def run(model: nn.Module, batch: object) -> tuple[Tensor, Tensor]:
        assert isinstance(batch, dict)
        return model(batch["x"]), batch["y"]

    ours, whole = token_model(), token_model()
    x, y = masked_part()
    accumulator = Accumulator(ours, sgd(ours), micro_batch=3, forward=run)
    step = accumulator.step({"x": x, "y": y})
    (loss,) = undivided_steps(whole, sgd(whole), F.cross_entropy, [(x, y)])
    assert_same_parameters(ours, whole)
    assert step.loss == pytest.approx(loss, rel=1e-12)


def test_a_logical_batch_without_valid_terms_is_skipped() -> None:
    model, before = token_model(), token_model()
    x, y = tokens(4)
    step = Accumulator(model, sgd(model), micro_batch=2).step((x, torch.full_like(y, -100)))
    assert step.skipped
    torch.testing.assert_close(model.state_dict(), before.state_dict(), rtol=0, atol=0)


def test_what_is_found_in_grad_is_discarded_and_nothing_is_left_there() -> None:
    ours, whole = small_model(), small_model()
    for parameter in ours.parameters():
        parameter.grad = torch.ones_like(parameter)
    Accumulator(ours, sgd(ours), micro_batch=4).step(samples(10))
    undivided_steps(whole, sgd(whole), F.cross_entropy, [samples(10)])
    assert_same_parameters(ours, whole)
    assert all(parameter.grad is None for parameter in ours.parameters())


@pytest.mark.parametrize("split", [1, 4])
def test_a_reported_loss_of_16_bits_is_summed_in_more(split: int) -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 3).bfloat16()
    x, y = samples(512)
    x = x.bfloat16()
    parts = [F.cross_entropy(model(a).double(), b) for a, b in zip(x, y, strict=True)]
    step = Accumulator(model, sgd(model), micro_batch=split).step((x, y))
    assert step.loss == pytest.approx(torch.stack(parts).mean().item(), rel=5e-3)


def test_terms_of_16_bits_are_summed_in_more() -> None:
    def pair(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return total(outputs, targets), torch.tensor(3.0 * len(targets), dtype=torch.bfloat16)

    model = small_model()
    step = Accumulator(model, sgd(model), pair, micro_batch=1).step(samples(512))
    assert step.terms == 3.0 * 512


def test_a_micro_batch_without_a_graph_adds_nothing_and_breaks_nothing() -> None:
    def pair(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | int]:
        if not (targets != -100).any():
            return torch.zeros((), dtype=outputs.dtype), 0
        return sum_and_terms(outputs, targets)

    ours, whole = token_model(), token_model()
    Accumulator(ours, sgd(ours), pair, micro_batch=3).step(masked_part())
    undivided_steps(whole, sgd(whole), F.cross_entropy, [masked_part()])
    assert_same_parameters(ours, whole)


def test_a_gradient_hook_is_refused_where_it_would_run_once_a_micro_batch() -> None:
    ours, whole = small_model(), small_model()
    for model in (ours, whole):
        next(model.parameters()).register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
    with pytest.raises(InexactStepError, match="gradient hook"):
        Accumulator(ours, sgd(ours), micro_batch=4).step(samples(10))
    Accumulator(ours, sgd(ours)).step(samples(10))
    undivided_steps(whole, sgd(whole), F.cross_entropy, [samples(10)])
    assert_same_parameters(ours, whole)


def test_under_the_caller_s_autocast_each_step_sees_the_weights_of_the_last() -> None:
    model = small_model().float()
    accumulator = Accumulator(model, sgd(model), micro_batch=4)
    x, y = samples(10)
    with torch.autocast("cpu", torch.bfloat16):
        losses = [accumulator.step((x.float(), y)).loss for _ in range(4)]
    assert len(set(losses)) == 4


def test_a_model_that_works_in_place_does_not_reach_the_batch() -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), small_model())
    x, y = samples(10)
    before = x.clone()
    Accumulator(model, sgd(model), micro_batch=4).step((x, y))
    assert torch.equal(x, before)
