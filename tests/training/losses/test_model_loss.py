"""The terms of a model's own loss are found by trial, and any split takes the undivided step."""

import copy
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from characters import character_batches, vocabulary
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import assert_exact
from states import fingerprint, identities
from torch import Tensor, nn

from autobatch import Accumulator
from autobatch.compat.torchvision import import_torchvision
from autobatch.data.markers import RaggedBatch
from autobatch.data.tree import BatchTree, cut, map_tensors, size_of, take
from autobatch.errors import InexactStepError
from autobatch.training.losses.model_loss import ModelLoss, call_with_labels, model_loss_of
from autobatch.training.losses.term_counting import candidates

Batch = Mapping[str, Tensor]
Gradients = dict[str, Tensor]
Mean = Callable[[Tensor, Tensor], Tensor]
TOKENS = 7


@dataclass
class Output:
    loss: Tensor
    scores: Tensor


class Tagger(nn.Module):
    """A float64 net from tokens to scores that takes its own mean over the labels."""

    def __init__(self, mean: Mean, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(TOKENS, 6)
        self.head = nn.Linear(6, TOKENS)
        self.mean = mean
        self.double()

    def forward(self, tokens: Tensor, labels: Tensor) -> Output:
        scores = self.head(torch.tanh(self.embed(tokens)).cumsum(1) / 3)
        return Output(loss=self.mean(scores, labels), scores=scores)


def even(model: Tagger) -> Tagger:
    """The same model, with one loss for every label."""
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    return model


def each(scores: Tensor, labels: Tensor) -> Tensor:
    """The loss of each label, ``(batch, time)``; 0 where it is ignored."""
    return F.cross_entropy(scores.transpose(1, 2), labels, reduction="none")


def over_labels(scores: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(scores.transpose(1, 2), labels)


def over_shifted(scores: Tensor, labels: Tensor) -> Tensor:
    return over_labels(scores[:, :-1], labels[:, 1:])


def over_shifted_or_zero(scores: Tensor, labels: Tensor) -> Tensor:
    late = labels[:, 1:]
    return each(scores[:, :-1], late).sum() / (late != -100).sum().clamp(min=1)


def over_examples(scores: Tensor, labels: Tensor) -> Tensor:
    return (each(scores, labels).sum(1) / (labels != -100).sum(1).clamp(min=1)).mean()


def contrastive(scores: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG001
    rows = scores.flatten(1)
    return F.cross_entropy(rows @ rows.T, torch.arange(len(rows)))


def balanced(scores: Tensor, labels: Tensor) -> Tensor:
    load = scores.softmax(-1).mean((0, 1))
    return over_labels(scores, labels) + 0.01 * TOKENS * load.pow(2).sum()


def sum_over_examples(scores: Tensor, labels: Tensor) -> Tensor:
    return each(scores, labels).sum()


def noisy(scores: Tensor, labels: Tensor) -> Tensor:
    return over_labels(scores + torch.randn_like(scores), labels)


def unpadded(scores: Tensor, labels: Tensor) -> Tensor:
    """A mean without the label 0, for which autobatch has no counter."""
    return F.cross_entropy(scores.transpose(1, 2), labels, ignore_index=0)


def recording(mean: Mean) -> tuple[Mean, list[Tensor]]:
    """Return the same mean, and a list of the labels that it receives."""
    calls: list[Tensor] = []

    def recorded(scores: Tensor, labels: Tensor) -> Tensor:
        calls.append(labels)
        return mean(scores, labels)

    return recorded, calls


MEANS = {
    "valid labels": over_labels,
    "shifted valid labels": over_shifted,
    "shifted, 0 for nothing": over_shifted_or_zero,
    "examples": over_examples,
}


def text(seed: int, spans: Sequence[tuple[int, int]], time: int = 6) -> dict[str, Tensor]:
    """Examples whose labels are valid from the first to before the second of each span."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, TOKENS, (len(spans), time), generator=generator)
    labels = torch.randint(1, TOKENS, (len(spans), time), generator=generator)
    position = torch.arange(time)
    for row, (start, stop) in enumerate(spans):
        labels[row, (position < start) | (position >= stop)] = -100
    return {"tokens": tokens, "labels": labels}


RAGGED = text(0, [(0, 6), (0, 2), (1, 4), (0, 3), (2, 6)])
EQUAL = text(0, [(0, 6)] * 4)


def copied(batch: BatchTree) -> BatchTree:
    return map_tensors(torch.clone, batch)


def gradients(model: nn.Module) -> Gradients:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def undivided(model: nn.Module, batch: Batch) -> tuple[float, Gradients]:
    model.zero_grad()
    loss = model_loss_of(model(**batch))
    assert loss is not None
    loss.backward()
    return loss.item(), gradients(model)


def accumulated(
    own: ModelLoss, model: nn.Module, parts: Sequence[Batch], denominator: float
) -> tuple[float, Gradients]:
    """Accumulate by hand: the sums are divided by the logical batch's terms."""
    model.zero_grad()
    total = 0.0
    for part in parts:
        loss_sum, _ = own.summed(model(**part), part)
        total += loss_sum.item()
        if loss_sum.requires_grad:
            (loss_sum / denominator).backward()
    return total / denominator, gradients(model)


def window(
    model: nn.Module, batch: Batch, sizes: Sequence[int], own: ModelLoss | None = None
) -> tuple[float, Gradients]:
    own = own or ModelLoss()
    own.prepare(model, batch, copied)
    return accumulated(own, model, parts_of(batch, sizes), own.denominator(batch))


def parts_of(batch: Batch, sizes: Sequence[int]) -> list[Batch]:
    parts = []
    for part in cut(batch, sizes):
        assert isinstance(part, Mapping)
        parts.append(part)
    return parts


def counted(own: ModelLoss, batch: Batch) -> list[str]:
    """The counters that no trial has refuted."""
    return [counting.name for counting in own._possible(batch)]


# What the mean counts


def test_what_each_counter_counts() -> None:
    ways = {counting.name: counting.terms(RAGGED).tolist() for counting in candidates(RAGGED)}
    assert ways == {
        "valid labels": [6, 2, 3, 3, 4],
        "shifted valid labels": [5, 1, 3, 2, 4],
        "examples": [1, 1, 1, 1, 1],
    }
    half = {"labels": torch.zeros(2, 1001, dtype=torch.bfloat16)}  # bfloat16 has no 1001.
    assert [c.terms(half).tolist() for c in candidates(half)] == [[1001, 1001]]
    byte = {"labels": torch.full((2, 3), 156, dtype=torch.uint8)}  # -100 as a signed byte.
    assert candidates(byte)[0].terms(byte).tolist() == [3, 3]


@pytest.mark.parametrize("mean", MEANS.values(), ids=MEANS.keys())
@settings(deadline=None, max_examples=10)
@given(
    seed=st.integers(0, 2**16),
    spans=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6)), min_size=2, max_size=7),
    data=st.data(),
)
def test_any_split_has_the_undivided_loss_and_gradient(
    mean: Mean,
    seed: int,
    spans: list[tuple[int, int]],
    data: st.DataObject,
) -> None:
    batch = text(seed, [(0, 5), *spans])
    first = data.draw(st.integers(1, len(spans)), label="first")
    model = Tagger(mean, seed)
    divided = window(model, batch, [first, len(spans) + 1 - first])
    assert_exact(divided, undivided(model, batch))


@pytest.mark.parametrize("mean", MEANS.values(), ids=MEANS.keys())
def test_the_counter_is_found_on_the_first_ragged_batch(
    mean: Mean,
) -> None:
    own = ModelLoss()
    own.prepare(Tagger(mean), RAGGED, copied)
    assert counted(own, RAGGED) == [
        next(n for n, m in MEANS.items() if m is mean).replace(
            "shifted, 0 for nothing", "shifted valid labels"
        )
    ]


@pytest.mark.parametrize("mean", MEANS.values(), ids=MEANS.keys())
def test_the_counter_is_found_if_every_label_has_the_same_loss(
    mean: Mean,
) -> None:
    model = even(Tagger(mean))
    assert_exact(window(model, RAGGED, [1, 2, 2]), undivided(model, RAGGED))


def test_a_mean_over_examples_may_be_nan_where_one_has_no_label() -> None:
    def nan_for_nothing(scores: Tensor, labels: Tensor) -> Tensor:
        return (each(scores, labels).sum(1) / (labels != -100).sum(1)).mean()

    own = ModelLoss()
    own.prepare(even(Tagger(nan_for_nothing)), RAGGED, copied)
    assert counted(own, RAGGED) == ["examples"]


def test_counting_unshifted_labels_of_a_causal_model_is_wrong() -> None:
    model = Tagger(over_shifted)
    own = ModelLoss()
    own._refuted = [c for c in candidates(RAGGED) if c.name != "valid labels"]
    wrong = accumulated(own, model, parts_of(RAGGED, [2, 3]), own.denominator(RAGGED))
    with pytest.raises(AssertionError, match="not close"):
        assert_exact(wrong[1], undivided(model, RAGGED)[1])


def test_equal_lengths_leave_the_counter_open_until_a_ragged_batch() -> None:
    model, own = Tagger(over_shifted), ModelLoss()
    assert_exact(window(model, EQUAL, [3, 1], own), undivided(model, EQUAL))
    assert len(counted(own, EQUAL)) == 3
    assert_exact(window(model, RAGGED, [2, 3], own), undivided(model, RAGGED))
    assert counted(own, RAGGED) == ["shifted valid labels"]


class Regressor(nn.Module):
    """Mean squared error, over the elements."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, outputs, dtype=torch.float64)

    def forward(self, x: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"loss": F.mse_loss(self.layer(x).reshape(target.shape), target)}


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3)])
def test_floating_labels_are_a_mean_over_elements(shape: tuple[int, ...]) -> None:
    model = Regressor(max(1, torch.Size(shape).numel()))
    batch = {
        "x": torch.randn(5, 4, dtype=torch.float64),
        "target": torch.randn(5, *shape, dtype=torch.float64),
    }
    assert_exact(window(model, batch, [2, 3]), undivided(model, batch))
    assert ModelLoss().denominator(batch) == batch["target"].numel()


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3, dtype=torch.float64)

    def forward(self, x: Tensor, **targets: Tensor) -> SimpleNamespace:
        (labels,) = targets.values()
        return SimpleNamespace(loss=F.cross_entropy(self.layer(x), labels.flatten()))


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("labels", [[0], [1], [2], [0]]),
        ("labels", [0, 1, 2, 0]),
        ("labels", [0, -100, 2, 0]),
        ("start_positions", [0, 1, 2, 0]),  # No labels: only examples can be counted.
    ],
)
def test_a_class_for_each_example(name: str, labels: list[int]) -> None:
    model = Classifier()
    batch = {"x": torch.randn(4, 4, dtype=torch.float64), name: torch.tensor(labels)}
    assert_exact(window(model, batch, [1, 3]), undivided(model, batch))


class InTrainingOnly(Tagger):
    """Returns no loss in evaluation mode, as detectors do."""

    def forward(self, tokens: Tensor, labels: Tensor) -> Any:
        outputs = super().forward(tokens, labels)
        return outputs if self.training else SimpleNamespace(scores=outputs.scores)


def test_a_loss_that_is_returned_in_training_mode_only_is_found() -> None:
    batch = text(1, [(0, 5), (0, 1), (2, 2), (0, 4)])
    ours, whole = InTrainingOnly(over_labels), Tagger(over_labels)
    accumulator = Accumulator(ours, torch.optim.SGD(ours.parameters(), lr=1.0), micro_batch=2)
    step = accumulator.step(batch)
    loss = whole(**batch).loss
    loss.backward()
    torch.optim.SGD(whole.parameters(), lr=1.0).step()
    assert_exact(step.loss, loss.item())
    assert_exact(list(ours.parameters()), list(whole.parameters()))
    again = Accumulator(ours, torch.optim.SGD(ours.parameters(), lr=1.0), micro_batch=2)
    again.load_state_dict(accumulator.state_dict())
    assert again.step(batch).micro_batch_sizes == (2, 2)


class OverMask(Tagger):
    """Takes the mean over its own mask; no label is ignored."""

    def forward(self, tokens: Tensor, labels: Tensor, mask: Tensor) -> Output:  # type: ignore[override]
        outputs = super().forward(tokens, labels)
        marked = each(outputs.scores, labels) * mask
        return Output(loss=marked.sum() / mask.sum(), scores=outputs.scores)


def test_a_mean_over_a_mask_is_refused_as_soon_as_examples_differ_in_it() -> None:
    """Otherwise no trial would be due in this logical batch."""
    model, own = OverMask(over_labels), ModelLoss()
    full = torch.ones(4, 6, dtype=torch.long)
    for seed in range(6):
        own.prepare(model, {**text(seed, [(0, 6)] * 4), "mask": full}, copied)
    before = own.state_dict()
    ragged = full.tril(2)
    with pytest.raises(InexactStepError, match="no mean over"):
        own.prepare(model, {**text(9, [(0, 6)] * 4), "mask": ragged}, copied)
    again = ModelLoss()
    again.load_state_dict(before)
    with pytest.raises(InexactStepError, match="no mean over"):
        again.prepare(model, {**text(9, [(0, 6)] * 4), "mask": ragged}, copied)


class Wrapped(nn.Module):
    """Passes its keywords on."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3).double()

    def forward(self, **named: Tensor) -> Tensor:
        def scores(x: Tensor) -> Tensor:
            found: Tensor = self.inner(x)
            return found

        return scores(**named)


def test_a_model_that_passes_keywords_on_need_not_take_labels() -> None:
    torch.manual_seed(0)
    model, x = Wrapped(), torch.randn(4, 4, dtype=torch.float64)
    batch = {"x": x, "labels": torch.tensor([0, 1, 2, 1])}
    expected = F.cross_entropy(model(x=x), batch["labels"]).item()
    step = Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), micro_batch=3).step(
        batch
    )
    assert_exact(step.loss, expected)


def test_a_micro_batch_without_a_valid_label_is_a_zero_without_graph() -> None:
    batch = text(
        1, [(0, 5), (0, 1), (2, 2), (0, 4)]
    )  # Without the first label, the two in the middle have none.
    model, own = Tagger(over_shifted), ModelLoss()
    own.prepare(model, batch, copied)
    empty = parts_of(batch, [1, 2, 1])[1]
    outputs = model(**empty)
    assert torch.isnan(outputs.loss)
    loss_sum, terms = own.summed(outputs, empty)
    assert loss_sum.item() == 0
    assert not loss_sum.requires_grad
    assert terms is None
    assert_exact(window(model, batch, [1, 2, 1], own), undivided(model, batch))


def test_a_logical_batch_without_a_valid_label_has_no_terms() -> None:
    model, own = Tagger(over_labels), ModelLoss()
    own.prepare(model, RAGGED, copied)
    empty = text(0, [(0, 0)] * 3)
    own.prepare(model, empty, copied)
    assert own.denominator(empty) == 0


# Ragged logical batches


def test_pieces_of_different_lengths_are_one_batch() -> None:
    pieces = [text(0, [(0, 4), (0, 2)], time=4), text(1, [(0, 9), (1, 7)], time=9)]
    model, own = Tagger(over_shifted), ModelLoss()
    whole = RaggedBatch(tuple(pieces))
    own.prepare(model, whole, copied)
    divided = accumulated(own, model, pieces, own.denominator(whole))
    padded = {
        key: torch.cat([F.pad(pieces[0][key], (0, 5), value=fill), pieces[1][key]])
        for key, fill in (("tokens", 0), ("labels", -100))
    }
    assert_exact(divided, undivided(model, padded))


def test_no_label_is_set_to_a_value_that_the_model_may_not_know() -> None:
    pieces = RaggedBatch((text(0, [(0, 4)] * 2, time=4), text(1, [(0, 9)] * 2, time=9)))
    mean, calls = recording(over_labels)
    with pytest.raises(InexactStepError, match=r"valid labels or shifted .* batch_loss="):
        ModelLoss().prepare(Tagger(mean), pieces, copied)
    assert calls
    assert not any((labels == -100).any() for labels in calls)


# Losses that are refused


@pytest.mark.parametrize("mean", [contrastive, balanced])
@pytest.mark.parametrize("batch", [EQUAL, RAGGED], ids=["equal", "ragged"])
def test_a_loss_that_compares_examples_is_refused(mean: Mean, batch: Batch) -> None:
    with pytest.raises(InexactStepError, match=r"both together.*batch_loss=.*one micro-batch"):
        ModelLoss().prepare(Tagger(mean), batch, copied)


@pytest.mark.parametrize(
    ("mean", "message"),
    [
        (sum_over_examples, "looks like a sum over examples: pass batch_loss="),
        (noisy, "draws random numbers in evaluation mode.*batch_loss="),
    ],
)
def test_the_error_says_what_the_loss_looks_like(mean: Mean, message: str) -> None:
    with pytest.raises(InexactStepError, match=message):
        ModelLoss().prepare(Tagger(mean), EQUAL, copied)


def test_a_mean_without_a_counter_is_refused_once_examples_differ() -> None:
    model, own = Tagger(unpadded), ModelLoss()
    own.prepare(model, EQUAL, copied)
    padded = {**EQUAL, "labels": EQUAL["labels"].clone()}
    padded["labels"][:2, 2:] = 0
    with pytest.raises(InexactStepError, match="batch_loss="):
        own.prepare(model, padded, copied)


def by_squares(scores: Tensor, labels: Tensor) -> Tensor:
    counts = (labels != -100).sum(1)
    means = each(scores, labels).sum(1) / counts.clamp(min=1)
    return (means * counts**2).sum() / (counts**2).sum()


def test_other_weights_are_refused_although_one_example_has_no_labels() -> None:
    batch = text(0, [(0, 0), (0, 2), (0, 6), (0, 3)])
    with pytest.raises(InexactStepError, match="no mean over valid labels or"):
        ModelLoss().prepare(Tagger(by_squares), batch, copied)


def test_a_refused_loss_is_refused_again() -> None:
    own = ModelLoss()
    for _ in range(2):
        with pytest.raises(InexactStepError, match="cannot be split"):
            own.prepare(Tagger(contrastive), EQUAL, copied)


# Costs and side effects


def test_trials_run_in_the_logical_batches_1_2_4_8() -> None:
    mean, calls = recording(over_labels)
    model, own = Tagger(mean), ModelLoss()
    tried = []
    for number in range(1, 17):
        own.prepare(model, EQUAL, copied)
        if calls:
            tried.append(number)
            assert [len(labels) for labels in calls] == [1, 1, 2]
            calls.clear()
    assert tried == [1, 2, 4, 8, 16]


def test_equal_examples_do_not_count_as_a_trial() -> None:
    mean, calls = recording(over_labels)
    model, own = Tagger(mean), ModelLoss()
    for number in range(1, 4):
        own.prepare(model, take(EQUAL, [0, 0, 0]), copied)
        assert len(calls) == 3 * number
    for single in (take(EQUAL, [0]), text(0, [(0, 1)])):
        own.prepare(model, single, copied)
    assert len(calls) == 9, "one example needs no trial"


class ChangesItself(nn.Module):
    """Changes everything that a forward pass can change."""

    def __init__(self, mean: Mean) -> None:
        super().__init__()
        self.tagger = Tagger(mean)
        self.noise = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(TOKENS, momentum=0.5).double()
        self.frozen = nn.Dropout(0.5).eval()
        self.seen = nn.Buffer(torch.zeros(()))
        self.own = torch.Generator().manual_seed(1)
        self.history: list[bool] = []
        self.count = 0

    def forward(self, tokens: Tensor, labels: Tensor) -> Output:
        self.count += 1
        self.history.append(self.training)
        self.seen.add_(1)
        torch.rand(3)
        torch.rand(3, generator=self.own)
        self.new = labels
        scores = self.frozen(self.noise(self.tagger(tokens, labels).scores))
        scores = self.norm(scores.transpose(1, 2)).transpose(1, 2)
        return Output(loss=self.tagger.mean(scores, labels), scores=scores)


@pytest.mark.parametrize("mean", [over_shifted, contrastive])
def test_a_trial_leaves_no_trace(mean: Mean) -> None:
    model = ChangesItself(mean)
    model(**RAGGED).loss.backward()
    batch = {key: value.clone() for key, value in RAGGED.items()}
    before = fingerprint(model, batch, *model.parameters()), identities(model)
    try:
        ModelLoss().prepare(model, batch, copied)
    except InexactStepError:
        assert mean is contrastive
    assert (fingerprint(model, batch, *model.parameters()), identities(model)) == before
    assert model.training
    assert not model.frozen.training


def test_a_trial_runs_in_evaluation_mode_and_without_gradients() -> None:
    modes = []

    def note(scores: Tensor, labels: Tensor) -> Tensor:
        modes.append((model.training, scores.requires_grad))
        return over_labels(scores, labels)

    model = Tagger(note)
    ModelLoss().prepare(model, RAGGED, copied)
    assert set(modes) == {(False, False)}


def test_a_trial_under_autocast_removes_no_gradient() -> None:
    model = Tagger(over_labels).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ModelLoss().prepare(model, RAGGED, copied)
        model(**RAGGED).loss.backward()
    assert model.head.weight.grad is not None


# 16 bits


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mean", MEANS.values(), ids=MEANS.keys())
def test_the_counter_is_found_in_16_bits(mean: Mean, dtype: torch.dtype) -> None:
    own = ModelLoss()
    own.prepare(Tagger(mean).to(dtype), RAGGED, copied)
    assert len(counted(own, RAGGED)) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_loss_of_16_bits_is_widened_before_it_is_multiplied(dtype: torch.dtype) -> None:
    batch = {"labels": torch.ones(300, 1001, dtype=torch.int64)}
    loss_sum, _ = ModelLoss().summed({"loss": torch.tensor(3.0, dtype=dtype)}, batch)
    assert loss_sum.dtype is torch.float32
    assert loss_sum.item() == 3 * 300 * 1001


def otherwise_rounded(scores: Tensor, labels: Tensor) -> Tensor:
    """A loss in float32 that depends on the size of the batch, as outputs of 16 bits may."""
    return over_labels(scores.float(), labels) * (1.005 if len(labels) == 2 else 1)


def test_the_coarsest_type_in_the_model_gives_the_tolerance() -> None:
    ModelLoss().prepare(Tagger(otherwise_rounded).to(torch.float16), RAGGED, copied)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ModelLoss().prepare(Tagger(otherwise_rounded).float(), RAGGED, copied)
    with pytest.raises(InexactStepError, match="cannot be split"):
        ModelLoss().prepare(Tagger(otherwise_rounded).float(), RAGGED, copied)


# What counts as the model's own loss


def test_only_a_scalar_floating_tensor_is_a_loss() -> None:
    loss = torch.tensor(1.0)
    assert model_loss_of(Output(loss=loss, scores=loss)) is loss
    assert model_loss_of({"loss": loss}) is loss
    for other in (loss, None, (loss,), {"logits": loss}, {"loss": None}, {"loss": 1.0}):
        assert model_loss_of(other) is None
    for value in (torch.ones(1), torch.tensor(1)):
        assert model_loss_of({"loss": value}) is None


def test_an_error_describes_outputs_and_batches_without_a_loss() -> None:
    with pytest.raises(TypeError, match=r"no scalar loss, got \{logits: float32\[2\]\}.*labels"):
        ModelLoss().summed({"logits": torch.ones(2)}, EQUAL)
    with pytest.raises(TypeError, match=r"takes a mapping.*batch_loss="):
        call_with_labels(Tagger(over_labels), (torch.ones(2), torch.ones(2)))


# Models of transformers


@cache
def transformers() -> ModuleType:
    import_torchvision()  # transformers imports it where it is installed, also a broken one.
    return importlib.import_module("transformers")


def small(name: str, **config: object) -> nn.Module:
    """One of transformers' models, tiny and without dropout, with random weights."""
    module = transformers()
    torch.manual_seed(0)
    kind = getattr(module, name)
    sizes = {"vocab_size": len(vocabulary()) + 1, "bos_token_id": 0, "eos_token_id": 0} | config
    model = kind(kind.config_class(**sizes))
    assert isinstance(model, nn.Module)
    return model.train()


BERT = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "hidden_dropout_prob": 0,
    "attention_probs_dropout_prob": 0,
}
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "dropout_rate": 0}


def masked(batch: Batch) -> Batch:
    """Keep a third of the labels."""
    position = torch.arange(batch["labels"].shape[1])
    return {**batch, "labels": batch["labels"].masked_fill(position % 3 > 0, -100)}


def classed(batch: Batch) -> Batch:
    return {**batch, "labels": batch["attention_mask"].sum(1) % 3}


def scored(batch: Batch) -> Batch:
    return {**batch, "labels": batch["attention_mask"].sum(1).double()}


def prompted(batch: Batch) -> Batch:
    """Ignore the first labels of some examples, as those of a prompt."""
    labels = batch["labels"].clone()
    labels[::2, :3] = -100
    return {**batch, "labels": labels}


CASES: dict[str, tuple[str, dict[str, object], Callable[[Batch], Batch], str]] = {
    "gpt2": ("GPT2LMHeadModel", {**GPT2, "n_positions": 32}, dict, "shifted valid labels"),
    "llama": ("LlamaForCausalLM", {**LLAMA}, prompted, "shifted valid labels"),
    "bert": ("BertForMaskedLM", {**BERT}, masked, "valid labels"),
    "t5": ("T5ForConditionalGeneration", {**T5, "decoder_start_token_id": 0}, dict, "valid labels"),
    "classes": ("BertForSequenceClassification", {**BERT, "num_labels": 3}, classed, ""),
    "regression": ("BertForSequenceClassification", {**BERT, "num_labels": 1}, scored, "elements"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_model_of_transformers_steps_as_undivided(case: str) -> None:
    name, config, labelled, expected = CASES[case]
    model = small(name, **config).double()
    batch = labelled(character_batches(9, 9, longest=24, seed=1)[0])
    own = ModelLoss()
    loss, gradient = window(model, batch, [2, 4, 1, 2], own)
    assert not expected or counted(own, batch) == [expected]
    whole_loss, whole_gradient = undivided(model, batch)
    # All is in float64 except the loss, which transformers computes in float32.
    assert loss == pytest.approx(whole_loss, rel=1e-5)
    largest = max(float(g.abs().max()) for g in whole_gradient.values())
    torch.testing.assert_close(gradient, whole_gradient, rtol=0, atol=1e-5 * largest)


def test_gpt2_trains_on_text_as_on_undivided_batches() -> None:
    """In float32, sums in another order differ by 1e-7, and each of the 20 steps adds to this.

    AdamW enlarges a gradient of nothing but rounding (that of a key's bias), unless its epsilon is
    larger than that gradient.
    """
    model = small("GPT2LMHeadModel", **{**GPT2, "n_embd": 64, "n_layer": 2, "n_positions": 64})
    batches = character_batches(20 * 8, 8, longest=48, seed=0)
    plain = train(copy.deepcopy(model), batches, undivided)
    own = ModelLoss()
    divided = train(model, batches, lambda net, batch: window(net, batch, [3, 3, 2], own))
    assert divided == pytest.approx(plain, rel=2e-5)
    assert plain[-1] < 0.8 * plain[0], "the model did not learn"


def test_gpt2_with_the_mean_of_means_is_another_training() -> None:
    model = small("GPT2LMHeadModel", **{**GPT2, "n_embd": 64, "n_layer": 2, "n_positions": 64})
    batches = character_batches(5 * 8, 8, longest=48, seed=0)
    plain = train(copy.deepcopy(model), batches, undivided)
    assert train(model, batches, mean_of_means) != pytest.approx(plain, rel=1e-3)


def mean_of_means(model: nn.Module, batch: Batch) -> tuple[float, Gradients]:
    parts = [undivided(model, part) for part in parts_of(batch, [3, 3, 2])]
    names = parts[0][1]
    mean = {name: torch.stack([g[name] for _, g in parts]).mean(0) for name in names}
    return sum(loss for loss, _ in parts) / len(parts), mean


def train(
    model: nn.Module,
    batches: Sequence[Batch],
    step: Callable[[nn.Module, Batch], tuple[float, Gradients]],
) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-6)
    losses = []
    for batch in batches:
        loss, gradient = step(model, batch)
        for name, parameter in model.named_parameters():
            parameter.grad = gradient[name]
        optimizer.step()
        losses.append(loss)
    return losses


def test_the_text_is_ragged_and_the_same_each_time() -> None:
    batches = character_batches(10, 4, longest=30, seed=3)
    again = character_batches(10, 4, longest=30, seed=3)
    assert [size_of(batch) for batch in batches] == [4, 4, 2]
    torch.testing.assert_close(batches, again, rtol=0, atol=0)
    lengths = {int(n) for batch in batches for n in batch["attention_mask"].sum(1)}
    assert len(lengths) > 5
    assert max(lengths) <= 30
    for batch in batches:
        assert torch.equal(batch["labels"] == -100, batch["attention_mask"] == 0)
        assert batch["input_ids"].max() <= len(vocabulary())
