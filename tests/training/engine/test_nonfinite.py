"""A step that is not finite is refused, skipped or taken, and nothing else is changed."""

import math
from collections.abc import Callable
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from reference import Pair, assert_same_parameters, sgd, small_model, token_model, undivided_steps
from states import fingerprint
from torch import Tensor, nn

from autobatch import Accumulator, InexactStepError, NonFiniteLossError, find_and_train
from autobatch.events import TrainingStarted
from autobatch.training.engine import nonfinite as policy

SIZES = (4, 3, 3)
NonFinite = Literal["raise", "skip", "ignore"]


def samples(seed: int = 1) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(10, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (10,), generator=generator)


def spoilt(row: int = 5, value: float = math.nan) -> Pair:
    """Row 5 is in the second micro-batch of 4 + 3 + 3."""
    x, y = samples()
    x[row, 2] = value
    return x, y


class Moving(nn.Module):
    """Has running statistics, dropout and a plain number, all of which a forward pass changes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 3)
        ).double()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        scores: Tensor = self.layers(x)
        return scores


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.1)


class Squared(nn.Module):
    """Its loss is finite, and its gradient is not: that of the root of 0 is infinite."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(5, 3, dtype=torch.float64))
        self.bad = False

    def forward(self, x: Tensor) -> Tensor:
        scores = x @ self.weight
        return scores + (scores * 0).clamp(min=0).sqrt() if self.bad else scores


# "raise", the default.


def test_raise_names_the_step_the_micro_batch_and_the_terms_and_nothing_has_changed() -> None:
    model = Moving()
    optimizer = adam(model)
    accumulator = Accumulator(model, optimizer, micro_batch=4)
    for seed in (1, 2):
        accumulator.step(samples(seed))
    before = fingerprint(model, optimizer)
    with pytest.raises(
        NonFiniteLossError, match=r"step 3 is nan over 10 terms; .* 2 of 3"
    ) as caught:
        accumulator.step(spoilt())
    assert fingerprint(model, optimizer) == before
    error = caught.value
    assert (error.step, error.terms) == (3, 10)
    assert (error.micro_batch, error.micro_batches) == (2, 3)
    assert math.isnan(error.loss)
    assert accumulator.steps == 2


def test_after_the_error_the_next_step_is_that_of_a_run_that_never_saw_the_batch() -> None:
    results = []
    for with_error in (True, False):
        torch.manual_seed(3)
        model = Moving()
        optimizer = adam(model)
        accumulator = Accumulator(model, optimizer, micro_batch=4)
        accumulator.step(samples())
        if with_error:
            with pytest.raises(NonFiniteLossError):
                accumulator.step(spoilt())
        accumulator.step(samples(2))
        results.append(fingerprint(model, optimizer))
    assert results[0] == results[1]


def test_terms_that_the_loss_counts_are_named_too() -> None:
    def pair(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return F.cross_entropy(outputs, targets, reduction="sum"), torch.tensor(2.5 * len(targets))

    model = Moving()
    x, y = samples()
    with pytest.raises(NonFiniteLossError) as caught:
        Accumulator(model, adam(model), batch_loss=batch_of(pair), micro_batch=4).step((x / 0, y))
    assert (caught.value.terms, caught.value.micro_batch) == (25, 1)


def batch_of(
    loss: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> Callable[[nn.Module, object], tuple[Tensor, Tensor]]:
    def batch_loss(model: nn.Module, batch: object) -> tuple[Tensor, Tensor]:
        assert isinstance(batch, tuple)
        return loss(model(batch[0]), batch[1])

    return batch_loss


def test_a_window_of_one_micro_batch_is_put_back_too() -> None:
    model = Moving()
    optimizer = adam(model)
    before = fingerprint(model, optimizer)
    with pytest.raises(NonFiniteLossError, match="1 of 1"):
        Accumulator(model, optimizer).step(spoilt())
    assert fingerprint(model, optimizer) == before


def test_a_gradient_that_is_not_finite_raises_where_its_norm_is_known() -> None:
    model = Squared()
    optimizer = adam(model)
    accumulator = Accumulator(model, optimizer, micro_batch=4, clip_grad_norm=1.0)
    accumulator.step(samples())
    model.bad = True
    before = fingerprint(model, optimizer)
    with pytest.raises(NonFiniteLossError, match="the gradient of step 2 is not finite") as caught:
        accumulator.step(samples())
    assert caught.value.micro_batch is None
    assert math.isfinite(caught.value.loss)
    assert fingerprint(model, optimizer) == before


def test_find_and_train_raises_and_keeps_what_was_trained() -> None:
    ours, whole = small_model(), small_model()
    optimizer = torch.optim.SGD(ours.parameters(), lr=1.0)
    with pytest.raises(NonFiniteLossError, match="the loss of step 2"):
        find_and_train(
            ours, [samples(), spoilt(), samples()], 10, optimizer=optimizer, progress=False
        )
    undivided_steps(whole, sgd(whole), F.cross_entropy, [samples()])
    assert_same_parameters(ours, whole)


# "skip".


def test_skip_leaves_out_the_step_and_all_that_it_saw() -> None:
    model = Moving()
    optimizer = adam(model)
    accumulator = Accumulator(
        model,
        optimizer,
        micro_batch=4,
        nonfinite="skip",
        scheduler=lambda it: torch.optim.lr_scheduler.ExponentialLR(it, 0.5),
    )
    accumulator.step(samples())
    before = fingerprint(model, optimizer)
    random = before.pop("torch rng")
    step = accumulator.step(spoilt())
    after = fingerprint(model, optimizer)
    assert after.pop("torch rng") != random, "the batch was seen, and drew its masks"
    assert after == before
    assert (step.skipped, step.reason, accumulator.steps) == (True, "not finite", 1)
    assert math.isnan(step.loss)
    assert step.terms == 10
    assert accumulator.step(samples()).reason == ""
    assert optimizer.param_groups[0]["lr"] == 0.1 / 4
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())


def test_skipped_batches_leave_the_steps_of_a_run_without_them() -> None:
    ours, whole = small_model(), small_model()
    accumulator = Accumulator(ours, sgd(ours), micro_batch=4, nonfinite="skip")
    for batch in (samples(1), spoilt(0), spoilt(9, math.inf), samples(2)):
        accumulator.step(batch)
    undivided_steps(whole, sgd(whole), F.cross_entropy, [samples(1), samples(2)])
    assert_same_parameters(ours, whole)


def test_skip_sees_a_gradient_that_is_not_finite_though_the_loss_is() -> None:
    model = Squared()
    optimizer = adam(model)
    accumulator = Accumulator(model, optimizer, micro_batch=4, nonfinite="skip")
    model.bad = True
    before = fingerprint(model, optimizer)
    step = accumulator.step(samples())
    assert (step.reason, math.isfinite(step.loss)) == ("not finite", True)
    assert step.grad_norm is not None
    assert not math.isfinite(step.grad_norm)
    assert fingerprint(model, optimizer) == before


def test_more_than_a_hundred_in_a_row_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert policy.MOST_SKIPPED == 100
    monkeypatch.setattr(policy, "MOST_SKIPPED", 5)
    model = small_model()
    accumulator = Accumulator(model, sgd(model), nonfinite="skip")
    for _ in range(2):  # A step in between starts the count again.
        for _ in range(5):
            assert accumulator.step(spoilt()).skipped
        accumulator.step(samples())
    for _ in range(5):
        accumulator.step(spoilt())
    before = fingerprint(model)
    with pytest.raises(NonFiniteLossError, match="step 3"):
        accumulator.step(spoilt())
    assert fingerprint(model) == before


def test_find_and_train_skips_and_says_so() -> None:
    ours, whole = small_model(), small_model()
    reasons: list[str] = []
    result = find_and_train(
        ours,
        [samples(1), spoilt(), samples(2)],
        10,
        optimizer=torch.optim.SGD(ours.parameters(), lr=1.0),
        nonfinite="skip",
        memory_limit="3KB",
        on_step=lambda step: reasons.append(step.reason),
        progress=False,
    )
    losses = undivided_steps(whole, sgd(whole), F.cross_entropy, [samples(1), samples(2)])
    assert result.plan.accumulation_steps > 1
    assert reasons == ["", "not finite", ""]
    assert list(result.losses) == pytest.approx(losses, rel=1e-12)
    assert any("finite" in note for note in result.notes)
    assert_same_parameters(ours, whole)


# "ignore".


def test_ignore_takes_the_step_as_a_plain_loop_does() -> None:
    model = small_model()
    accumulator = Accumulator(model, sgd(model), micro_batch=4, nonfinite="ignore")
    step = accumulator.step(spoilt())
    assert (step.skipped, step.reason, accumulator.steps) == (False, "", 1)
    assert math.isnan(step.loss)
    assert all(torch.isnan(parameter).any() for parameter in model.parameters())


def test_ignore_is_the_undivided_step_where_all_is_finite() -> None:
    ours, whole = small_model(), small_model()
    step = Accumulator(ours, sgd(ours), micro_batch=4, nonfinite="ignore").step(samples())
    (loss,) = undivided_steps(whole, sgd(whole), F.cross_entropy, [samples()])
    assert step.loss == pytest.approx(loss, rel=1e-12)
    assert_same_parameters(ours, whole)


# Beside the other rules.


def masked_mean(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets) * 1.0


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_an_unknown_loss_that_is_finite_in_parts_only_is_inexact_and_not_a_bad_batch(
    nonfinite: NonFinite,
) -> None:
    model = token_model()
    generator = torch.Generator().manual_seed(2)
    x, y = (torch.randint(0, 4, (8, 6), generator=generator) for _ in range(2))
    accumulator = Accumulator(model, sgd(model), masked_mean, micro_batch=3, nonfinite=nonfinite)
    accumulator.step((x, y))
    accumulator.step((x, y))
    masked = y.clone()
    masked[3:6] = -100  # All of the second micro-batch: its own mean is nan.
    before = fingerprint(model)
    with pytest.raises(InexactStepError, match="not finite for 1 of 3 micro-batches"):
        accumulator.step((x, masked))
    assert fingerprint(model) == before


def test_an_unknown_loss_that_is_nan_throughout_is_a_bad_batch() -> None:
    model = small_model()
    accumulator = Accumulator(model, sgd(model), masked_mean, micro_batch=4, nonfinite="skip")
    x, y = samples()
    accumulator.step((x, y))
    assert accumulator.step((x * math.nan, y)).reason == "not finite"


def test_a_batch_whose_loss_counts_no_term_has_changed_nothing() -> None:
    def pair(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return F.cross_entropy(outputs, targets, reduction="sum"), (targets != -100).sum()

    model = Moving()
    optimizer = adam(model)
    accumulator = Accumulator(model, optimizer, pair, micro_batch=4)
    accumulator.step(samples())
    before = fingerprint(model, optimizer)
    step = accumulator.step((samples()[0], torch.full((10,), -100)))
    assert (step.skipped, step.reason) == (True, "no valid term")
    assert fingerprint(model, optimizer) == before


@pytest.mark.parametrize("value", ["warn", None, True, "Raise"])
def test_an_unknown_rule_is_refused_before_anything_is_touched(value: object) -> None:
    model = small_model()
    with pytest.raises(ValueError, match="nonfinite must be one of"):
        Accumulator(model, sgd(model), nonfinite=value)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nonfinite must be one of"):
        find_and_train(model, samples(), nonfinite=value)  # type: ignore[arg-type]


def test_a_sample_that_is_not_finite_is_no_obstacle_to_the_search() -> None:
    model = small_model()
    before = fingerprint(model)
    found: list[bool] = []

    def observe(event: object) -> None:
        if isinstance(event, TrainingStarted):
            found.append(fingerprint(model) == before)

    with pytest.raises(NonFiniteLossError):
        find_and_train(model, [spoilt()], 10, progress=observe)
    assert found == [True]


def test_a_loss_module_s_own_buffer_is_put_back_too() -> None:
    class TermCounter(nn.Module):
        calls: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            self.calls += 1
            return nn.functional.cross_entropy(outputs, targets) * torch.nan

    loss, model = TermCounter(), small_model()
    accumulator = Accumulator(model, sgd(model), loss, micro_batch=4)
    with pytest.raises(NonFiniteLossError):
        accumulator.step((torch.randn(8, 5).double(), torch.randint(0, 3, (8,))))
    assert int(loss.calls) == 0
