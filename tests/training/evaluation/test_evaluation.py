"""An evaluation says what one pass over all of the data would, and training never knows of it."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import assert_exact, small_model, token_model, twin
from states import fingerprint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from autobatch import (
    DoesNotFitError,
    InexactStepError,
    StepResult,
    TrainingResult,
    WholeBatch,
    find_and_train,
    find_batch_size,
)
from autobatch.events import Event, SearchStarted, TrialStarted

SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
train = functools.partial(find_and_train, progress=False)

Pair = tuple[Tensor, Tensor]


def rows(examples: int, seed: int = 0) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (examples,), generator=generator)


def tokens(examples: int, seed: int = 0) -> Pair:
    """Rows of seven tokens, of which some are left out, and a few rows have none at all."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 7, (examples, 7), generator=generator)
    y = torch.randint(0, 4, (examples, 7), generator=generator)
    y[torch.rand(y.shape, generator=generator) < torch.linspace(0, 1, examples)[:, None]] = -100
    y[::5] = -100
    return x, y


class Wide(nn.Module):
    """A float64 net whose activations, not its parameters, fill the limit."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = inner or small_model()

    def forward(self, x: Tensor) -> Tensor:
        wide = x.repeat(1, 40).exp().view(len(x), 40, 5).mean(1).log()
        scores: Tensor = self.inner(wide)
        return scores


WEIGHT = torch.tensor([0.2, 1.5, 0.7, 3.0], dtype=torch.float64)


def per_token(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    total = F.cross_entropy(outputs, targets, reduction="sum")
    return total, (targets != -100).sum()


def of_examples(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets.clamp(min=0), reduction="none").mean()


def ratio(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return per_token(outputs, targets)


LOSSES: dict[str, tuple[dict[str, Any], Callable[[Tensor, Tensor], Tensor]]] = {
    "inferred": ({}, F.cross_entropy),
    "cross-entropy": ({"loss": nn.CrossEntropyLoss()}, F.cross_entropy),
    "weights": (
        {"loss": nn.CrossEntropyLoss(weight=WEIGHT)},
        lambda o, t: F.cross_entropy(o, t, weight=WEIGHT),
    ),
    "another index ignored": (
        {"loss": functools.partial(F.cross_entropy, ignore_index=2)},
        lambda o, t: F.cross_entropy(o, t.clamp(min=0), ignore_index=2),
    ),
    "a sum": (
        {"loss": nn.CrossEntropyLoss(reduction="sum")},
        lambda o, t: F.cross_entropy(o, t, reduction="sum"),
    ),
    "an unknown mean": ({"loss": of_examples}, of_examples),
    "sum and terms": ({"loss": per_token}, F.cross_entropy),
    "batch_loss": ({"batch_loss": lambda m, b: per_token(m(b[0]), b[1])}, F.cross_entropy),
    "forward": ({"forward": lambda m, b: (m(b[0]), b[1])}, F.cross_entropy),
}


@pytest.mark.parametrize("parts", [3, 64])
@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_is_that_of_all_the_data_at_once(name: str, parts: int) -> None:
    options, reference = LOSSES[name]
    x, y = tokens(23, seed=1)
    if name in ("an unknown mean", "another index ignored"):
        y = y.clamp(min=0)
    if name == "another index ignored":  # Some rows have no valid target.
        y[3:9] = 2
    model = token_model()
    data = tokens(20)[0], y[:20].clone()
    loader = DataLoader(TensorDataset(x, y), batch_size=5)
    result = train(model, data, parts, optimizer=SGD, eval_data=loader, epochs=2, **options)
    model.eval()
    with torch.no_grad():
        whole = reference(model(x), y)
    assert [evaluation.epoch for evaluation in result.evaluations] == [1, 2]
    last = result.evaluations[-1]
    assert last.examples == 23
    assert_exact(last.loss, whole.item())
    assert str(last) in str(result)


def test_the_mean_of_the_parts_means_is_another_number() -> None:
    x, y = tokens(23, seed=1)
    model = token_model()
    train(model, tokens(20), 3, optimizer=SGD)
    means = [F.cross_entropy(model(a), b) for a, b in zip(x.split(3), y.split(3), strict=True)]
    mean = torch.stack([value for value in means if value.isfinite()]).mean().item()
    with pytest.raises(AssertionError, match="not close"):
        assert_exact(mean, F.cross_entropy(model(x), y).item())


class ModelLoss(nn.Module):
    """Like a causal language model: its mean is over the labels but each row's first."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = token_model()

    def forward(self, *, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        scores = self.inner(x)
        return {
            "loss": F.cross_entropy(scores[..., :-1], labels[..., 1:]),
            "logits": scores,
        }


@pytest.mark.parametrize("desired", [4, 64])
def test_the_models_own_loss_is_weighted_by_what_its_mean_counts(desired: int) -> None:
    (x, y), (ex, ey) = tokens(20), tokens(23, seed=1)
    y[:, 1], ey[:, 1] = 1, 2  # Its own mean of a part without labels is nan.
    model = ModelLoss()
    result = train(
        model, {"x": x, "labels": y}, desired, optimizer=SGD, eval_data={"x": ex, "labels": ey}
    )
    with torch.no_grad():
        assert_exact(result.evaluations[0].loss, model(x=ex, labels=ey)["loss"].item())


def contrast(outputs: Tensor, targets: Tensor) -> Tensor:
    near = (outputs @ outputs.T).log_softmax(1)
    same = (targets[:, None] == targets[None]).double()
    return -(near * same).sum() / same.sum()


@pytest.mark.parametrize("limit", ["24KiB", None])
def test_the_loss_of_a_whole_batch_is_that_of_whole_batches_weighted_by_examples(
    limit: str | None,
) -> None:
    model = Wide()
    x, y = rows(40, seed=1)
    result = train(
        model,
        rows(32),
        16,
        loss=WholeBatch(contrast),
        optimizer=SGD,
        eval_data=[(x, y)],
        memory_limit=limit,
    )
    with torch.no_grad():
        values = [
            contrast(model(a), b).item() for a, b in zip(x.split(16), y.split(16), strict=True)
        ]
        right = (model(x).argmax(1) == y).double().mean().item()
    assert_exact(result.evaluations[0].loss, (values[0] * 16 + values[1] * 16 + values[2] * 8) / 40)
    assert_exact(result.evaluations[0].metrics["accuracy"], right)


# Metrics.


def test_accuracy_counts_what_is_right_among_what_counts() -> None:
    x, y = tokens(23, seed=1)
    model = token_model()
    result = train(model, tokens(20), 4, optimizer=SGD, eval_data=(x, y))
    found = right = 0
    with torch.no_grad():
        scores = model(x).movedim(1, -1)
    for row in range(23):
        for place in range(7):
            if y[row, place] != -100:
                found += 1
                right += int(scores[row, place].argmax() == y[row, place])
    assert 0 < right < found
    assert result.evaluations[0].metrics == {"accuracy": right / found}


@pytest.mark.parametrize(
    "loss",
    [nn.CrossEntropyLoss(ignore_index=1), functools.partial(F.cross_entropy, ignore_index=1)],
    ids=["a module", "a functional"],
)
def test_accuracy_leaves_out_the_class_that_the_loss_ignores(loss: Any) -> None:
    x, y = rows(23, seed=1)
    model = small_model()
    tiny = functools.partial(torch.optim.SGD, lr=1e-6)
    result = train(model, rows(20), 4, loss=loss, optimizer=tiny, eval_data=(x, y))
    kept, found = y != 1, model(x).argmax(1) == y
    assert found[~kept].any()
    right = found[kept].double().mean().item()
    assert_exact(result.evaluations[0].metrics["accuracy"], right)


@pytest.mark.parametrize("outputs", [1, 2])
def test_there_is_no_accuracy_where_outputs_are_no_scores_of_classes(outputs: int) -> None:
    model = nn.Linear(5, outputs).double()
    x = rows(20)[0]
    y = torch.zeros(20, outputs, dtype=torch.float64)
    assert train(model, (x, y), 8, eval_data=(x, y)).evaluations[0].metrics == {}


def test_one_score_for_two_classes_is_not_taken_for_scores_of_classes() -> None:
    def binary(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(outputs[:, 0], targets.double())

    model = nn.Linear(5, 1).double()
    x, y = rows(20)
    result = train(model, (x, y % 2), 8, loss=binary, eval_data=(x, y % 2))
    assert result.evaluations[0].metrics == {}


def test_a_metric_is_a_mean_over_examples_or_its_sum_over_its_terms() -> None:
    def share(outputs: Tensor, _: Tensor) -> Tensor:
        return (outputs[:, 0] > 0).double().mean()

    def of_class_2(outputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        mine = targets == 2
        return outputs[mine].sum(), int(mine.sum())

    x, y = rows(23, seed=1)
    model = small_model()
    result = train(
        model,
        rows(20),
        4,
        optimizer=SGD,
        eval_data=(x, y),
        metrics={"share": share, "of class 2": of_class_2, "": share},
    )
    with torch.no_grad():
        scores = model(x)
    expected = (scores[:, 0] > 0).double().mean().item()
    assert_exact(
        dict(result.evaluations[0].metrics),
        {
            "share": expected,
            "of class 2": (scores[y == 2].sum() / (y == 2).sum()).item(),
            "": expected,
        },
    )
    assert_exact(result.evaluations[0].loss, F.cross_entropy(scores, y).item())
    assert "share 0." in str(result)


def test_a_metric_that_is_a_number_keeps_all_its_digits() -> None:
    def first(outputs: Tensor, _: Tensor) -> float:
        return outputs[:, 0].mean().item()

    x, y = rows(23, seed=1)
    model = small_model()
    result = train(model, rows(20), 4, eval_data=(x, y), metrics={"first": first})
    with torch.no_grad():
        assert_exact(result.evaluations[0].metrics["first"], model(x)[:, 0].mean().item())


def test_data_without_a_valid_target_has_no_loss() -> None:
    x, y = rows(12)
    result = train(small_model(), rows(20), 8, eval_data=(x, torch.full_like(y, -100)))
    assert math.isnan(result.evaluations[0].loss)
    assert math.isnan(result.evaluations[0].metrics["accuracy"])


# Training goes on as if there had been none.


class Restless(nn.Module):
    """All that a forward pass may move, in evaluation mode too."""

    passes: Tensor
    table: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.4), nn.Linear(8, 3)
        ).double()
        self.frozen = nn.BatchNorm1d(3).double().eval()
        self.register_buffer("passes", torch.zeros((), dtype=torch.float64))
        self.own = torch.Generator().manual_seed(8)
        self.table = None

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        if not self.training:
            self.table = torch.linspace(0, 1, 3, dtype=torch.float64)
        noise = torch.rand(x.shape, generator=self.own, dtype=x.dtype)
        scores: Tensor = self.frozen(self.layers(x + noise * self.passes))
        return scores if self.table is None else scores * self.table


class Noisy(Dataset[Pair]):
    def __init__(self, own: np.random.Generator) -> None:
        self.x, self.y = rows(42)
        self.own = own

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, row: int) -> Pair:
        return self.x[row] + torch.rand(()) + np.random.rand() + self.own.random(), self.y[row]


@dataclass(frozen=True)
class Left:
    losses: tuple[float, ...]
    state: Mapping[str, object]


def left_by(**options: Any) -> Left:
    torch.manual_seed(1)
    np.random.seed(1)
    own = np.random.default_rng(5)
    model = Restless()
    optimizer = torch.optim.Adam(model.parameters())
    data = options.pop("data", Noisy(own))
    if options.pop("evaluated", False):
        options["eval_data"] = data
    losses = train(model, data, 16, optimizer=optimizer, epochs=2, **options).losses
    return Left(losses, fingerprint(model, optimizer, own))


def test_training_is_bit_for_bit_what_it_is_without() -> None:
    without = left_by()
    assert left_by(evaluated=True) == without
    assert left_by(eval_data=rows(30, seed=3)) == without


def test_training_is_the_same_where_workers_persist_and_serve_both() -> None:
    def loader() -> DataLoader[tuple[Tensor, ...]]:
        data = TensorDataset(*rows(42))
        return DataLoader(data, 8, shuffle=True, num_workers=1, persistent_workers=True)

    assert left_by(data=loader(), evaluated=True).losses == left_by(data=loader()).losses


def test_training_is_the_same_under_a_callers_autocast() -> None:
    def ended(**options: Any) -> TrainingResult:
        torch.manual_seed(1)
        model = small_model().float()
        x, y = rows(42)
        with torch.autocast("cpu", torch.bfloat16):
            return train(model, (x.float(), y), 16, optimizer=SGD, epochs=2, **options)

    x, y = rows(30, seed=3)
    assert ended(eval_data=(x.float(), y)).losses == ended().losses


def test_each_module_has_its_own_mode_again() -> None:
    model = Restless()
    model.layers[1].eval()
    train(model, rows(20), 8, eval_data=rows(20))
    modes = [module.training for module in model.modules()]
    assert modes == [not isinstance(module, nn.BatchNorm1d) for module in model.modules()]


def test_an_evaluation_is_in_evaluation_mode_and_without_gradients() -> None:
    seen: list[tuple[bool, bool]] = []

    def metric(outputs: Tensor, _: Tensor) -> Tensor:
        seen.append((model.training, outputs.requires_grad))
        return outputs.mean()

    model = small_model()
    train(model, rows(20), 8, eval_data=rows(20), metrics={"mean": metric})
    assert set(seen) == {(False, False)}
    assert model.training


class Placed(nn.Module):
    """Adds positions that a function has made once, and keeps for all models of the process."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 3)
        self.positions = functools.lru_cache(lambda width: torch.arange(float(width)).sin())

    def forward(self, x: Tensor) -> Tensor:
        placed: Tensor = self.last(self.first(x) * self.positions(4))
        return placed


def test_what_a_function_keeps_from_an_evaluation_serves_training() -> None:
    x, y = rows(20)
    model, data = Placed(), (x.float(), y)
    assert len(train(model, data, 8, eval_data=data).losses) == 3
    again = Placed()
    find_batch_size(again, data, mode="inference", ceiling=8, device="cpu", progress=False)
    again(x.float()).sum().backward()


class Slope(nn.Module):
    """As force fields do, it takes a gradient itself, whatever mode it is called in."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            [slope] = torch.autograd.grad(self.energy(x).sum(), x, create_graph=self.training)
        return slope


def test_a_model_that_takes_gradients_itself_is_evaluated() -> None:
    x = rows(20)[0].float()
    result = train(Slope(), (x, -x), 8, eval_data=(x, -x))
    assert math.isfinite(result.evaluations[0].loss)
    found = find_batch_size(Slope(), (x, -x), mode="inference", ceiling=8, progress=False)
    assert found.size == 8


# The size of its own.


def test_it_runs_at_a_larger_size_than_training_where_memory_is_short() -> None:
    shown: list[int] = []

    class Spy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            steps = [layer for _ in range(12) for layer in (nn.Linear(8, 8), nn.Tanh())]
            self.inner = nn.Sequential(nn.Linear(5, 8), *steps, nn.Linear(8, 3)).double()

        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                shown.append(len(x))
            scores: Tensor = self.inner(x)
            return scores

    x, y = rows(512, seed=1)
    model = Spy()
    result = train(model, rows(512), 512, optimizer=SGD, eval_data=(x, y), memory_limit="56KiB")
    assert shown[-3:] == [171, 171, 170], "no halves of 512: it was searched for"
    assert 1 < result.plan.micro_batch < 171
    assert result.replays == 0
    with torch.no_grad():
        assert_exact(result.evaluations[0].loss, F.cross_entropy(model(x), y).item())


def test_the_limit_holds_for_what_no_trial_has_seen() -> None:
    shown: list[tuple[int, ...]] = []

    class Spy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = token_model()

        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                shown.append(tuple(x.shape))
            scores: Tensor = self.inner(x)
            return scores

    x, y = tokens(32)
    longer = x.repeat(1, 3), y.repeat(1, 3)
    model = Spy()
    result = train(
        model, (x, y), 16, optimizer=SGD, eval_data=[(x, y), longer], memory_limit="24KiB"
    )
    assert max(rows for rows, time in shown if time == 7) == 16
    assert shown[-1][0] < 16
    with torch.no_grad():
        whole = F.cross_entropy(model(x), y).item()
    assert_exact(result.evaluations[0].loss, whole)


class Fails(nn.Module):
    """Holds so many examples in an evaluation, and from one of its passes on fewer of them."""

    def __init__(self, at: int, most: int, then: int) -> None:
        super().__init__()
        self.inner = small_model()
        self.at = at
        self.most = most
        self.then = then

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            PASSES.append(len(x))
            most = self.most if len(PASSES) < self.at else self.then
            if EVALUATING and len(x) > most:
                raise torch.OutOfMemoryError("CUDA out of memory.")
        scores: Tensor = self.inner(x)
        return scores


PASSES: list[int] = []  # Globals: no evaluation puts them back.
EVALUATING: list[int] = []


@settings(max_examples=15)
@given(at=st.integers(1, 8), most=st.integers(1, 16), desired=st.integers(2, 16))
def test_memory_that_runs_out_in_its_midst_changes_nothing(
    at: int, most: int, desired: int
) -> None:
    def tell(event: Event) -> None:
        if isinstance(event, SearchStarted):  # The first trials of inference come before.
            EVALUATING.clear()

    def begin(_: StepResult) -> None:
        EVALUATING.append(1)
        PASSES.clear()

    EVALUATING.clear()
    model = Fails(at, most, max(1, most // 2))
    x, y = rows(23, seed=1)
    result = find_and_train(
        model,
        rows(20),
        desired,
        optimizer=SGD,
        eval_data=(x, y),
        progress=tell,
        on_step=begin,
    )
    with torch.no_grad():
        scores = model.inner(x)
    assert_exact(result.evaluations[0].loss, F.cross_entropy(scores, y).item())
    assert_exact(
        result.evaluations[0].metrics["accuracy"],
        (scores.argmax(1) == y).double().mean().item(),
    )
    assert result.evaluations[0].examples == 23


@pytest.mark.parametrize("at", [0, 6], ids=["at first", "later"])
def test_one_example_that_does_not_fit_is_an_error(at: int) -> None:
    PASSES.clear()
    EVALUATING.clear()
    model = Fails(at, 8, 0)
    with pytest.raises(DoesNotFitError, match="a batch of 1 does not fit"):
        train(model, rows(20), 8, eval_data=rows(40), on_step=lambda _: EVALUATING.append(1))
    assert len(PASSES) > at
    EVALUATING.clear()


def test_memory_that_runs_out_before_the_search_is_the_searchs_business() -> None:
    PASSES.clear()
    EVALUATING[:] = [1]
    model = Fails(0, 0, 0)
    result = train(
        model, rows(20), 8, eval_data=rows(8), on_step=lambda _: setattr(model, "then", 8)
    )
    EVALUATING.clear()
    assert result.evaluations[0].examples == 8


# What is wrong is said before anything is trained.


class Nothing(IterableDataset[Pair]):
    def __iter__(self) -> Iterator[Pair]:
        return iter(())


def vector(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.argmax(1) == targets).double()


def broken(*_: Tensor) -> Tensor:
    raise LookupError("my metric")


def best(*_: Tensor) -> Tensor:
    raise AssertionError("no metric is computed")


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "one pass": ({"eval_data": iter([rows(8)])}, TypeError, "eval_data .* one-pass"),
    "empty tensors": ({"eval_data": rows(0)}, ValueError, "eval_data: data is empty"),
    "an empty list": ({"eval_data": []}, ValueError, "eval_data: data is empty"),
    "an empty stream": ({"eval_data": Nothing()}, ValueError, "data is empty"),
    "text": ({"eval_data": "digits"}, TypeError, "eval_data: data must be"),
    "other columns": ({"eval_data": (rows(8)[0][:, :4], rows(8)[1])}, RuntimeError, "shapes"),
    "metrics in a list": ({"eval_data": rows(8), "metrics": [best]}, TypeError, "metrics must be"),
    "a metric that is none": (
        {"eval_data": rows(8), "metrics": {"best": 3}},
        TypeError,
        "metrics must be",
    ),
    "a metric for each example": (
        {"eval_data": rows(8), "metrics": {"right": vector}},
        ValueError,
        "the metric 'right' must be scalar",
    ),
    "a metric that fails": (
        {"eval_data": rows(8), "metrics": {"mine": broken}},
        LookupError,
        "my metric",
    ),
    "metrics of nothing": ({"metrics": {"best": best}}, ValueError, "pass eval_data as well"),
    "metrics of a batch_loss": (
        {
            "eval_data": rows(8),
            "metrics": {"best": best},
            "batch_loss": lambda m, b: per_token(m(b[0]), b[1]),
        },
        ValueError,
        "batch_loss returns neither",
    ),
    "on_step": ({"on_step": "print"}, TypeError, "on_step must be callable"),
}


@pytest.mark.parametrize(("options", "error", "text"), BAD.values(), ids=BAD)
def test_what_is_wrong_is_said_before_the_search(
    options: dict[str, Any], error: type[Exception], text: str
) -> None:
    model = Restless()
    optimizer = torch.optim.Adam(model.parameters())
    events: list[Event] = []
    torch.manual_seed(3)
    before = fingerprint(model, optimizer)
    with pytest.raises(error, match=text):
        find_and_train(model, rows(20), 8, optimizer=optimizer, progress=events.append, **options)
    assert fingerprint(model, optimizer) == before
    assert not [event for event in events if isinstance(event, TrialStarted)]


def test_an_error_of_the_first_evaluation_says_where_it_comes_from() -> None:
    with pytest.raises(LookupError) as caught:
        train(small_model(), rows(20), 8, eval_data=rows(8), metrics={"mine": broken})
    assert any("eval_data" in note for note in caught.value.__notes__)


def test_a_loss_of_the_models_own_that_no_parts_can_tell_is_refused_at_once() -> None:
    class Largest(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = token_model()

        def forward(self, *, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            each = F.cross_entropy(self.inner(x), labels, reduction="none")
            return {"loss": each.mean(1).max()}

    x, y = tokens(20)
    data = {"x": x, "labels": y.clamp(min=0)}
    model = Largest()
    before = twin(model).state_dict()
    with pytest.raises(InexactStepError, match="own loss"):
        train(model, data, 20, optimizer=SGD, eval_data=data)
    assert_exact(model.state_dict(), before)
