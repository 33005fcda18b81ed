"""A loss that runs the model itself: a function (model, batch) -> (sum, terms)."""

import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from reference import assert_exact, assert_same_parameters, sgd, small_model, twin, undivided_steps
from states import fingerprint
from torch import Tensor, nn

from autobatch import Accumulator, BatchLoss, InexactStepError, StepOptions, find_and_train
from autobatch.training.losses.batch_loss import BatchLossFunction

Batch = tuple[Tensor, Tensor]


def rows(examples: int = 11) -> Batch:
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 3, (examples,), generator=generator)
    y[1::3] = -100
    return torch.randn(examples, 5, generator=generator, dtype=torch.float64), y


def summed(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    x, y = batch
    return F.cross_entropy(model(x), y, reduction="sum"), int((y != -100).sum())


@pytest.mark.parametrize("micro_batch", [11, 4, 1])
def test_a_sum_and_its_terms_give_the_undivided_step(micro_batch: int) -> None:
    ours, whole = small_model(), small_model()
    result = Accumulator(ours, sgd(ours), batch_loss=summed, micro_batch=micro_batch).step(rows())
    (loss,) = undivided_steps(whole, sgd(whole), F.cross_entropy, [rows()])
    assert_exact(result.loss, loss)
    assert result.terms == 7
    assert_same_parameters(ours, whole)


def test_find_and_train_takes_the_undivided_step_and_notes_the_check() -> None:
    ours, whole = small_model(), small_model()
    result = find_and_train(
        ours,
        [rows(64)],
        64,
        batch_loss=summed,
        optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
        memory_limit=9000,
        progress=False,
    )
    undivided_steps(whole, sgd(whole), F.cross_entropy, [rows(64)])
    assert result.plan.accumulation_steps > 1
    assert_same_parameters(ours, whole)
    assert any("batch_loss" in note for note in result.notes)


def mean(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    x, y = batch
    return F.mse_loss(model(x).sum(1), y.double()), len(y)


def constant_terms(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    return summed(model, batch)[0], 1


def contrastive(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    scores = model(batch[0]) @ model(batch[0]).T
    return F.cross_entropy(scores, torch.arange(len(scores)), reduction="sum"), len(scores)


@pytest.mark.parametrize("wrong", [mean, constant_terms, contrastive])
def test_a_sum_that_does_not_add_up_is_refused_when_the_batch_is_cut(
    wrong: BatchLossFunction,
) -> None:
    model = small_model()
    before = fingerprint(model)
    accumulator = Accumulator(model, sgd(model), batch_loss=wrong, micro_batch=4)
    with pytest.raises(InexactStepError, match="does not add up over examples"):
        accumulator.step(rows())
    assert fingerprint(model) == before


@pytest.mark.parametrize("wrong", [mean, constant_terms, contrastive])
def test_a_batch_that_fits_whole_may_compare_examples(wrong: BatchLossFunction) -> None:
    model = small_model()
    Accumulator(model, sgd(model), batch_loss=wrong).step(rows())


def test_a_function_that_draws_random_numbers_is_not_refused() -> None:
    def noisy(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        x, _ = batch
        noise = torch.randn_like(x)
        return (model(x + noise).sum(1) - noise.sum(1)).square().sum(), len(x)

    model = small_model()
    Accumulator(model, sgd(model), batch_loss=noisy, micro_batch=4).step(rows())


def test_a_gradient_penalty_can_take_gradients_of_its_own() -> None:
    def penalised(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        x, y = batch
        x = x.requires_grad_()
        outputs = model(x)
        (gradient,) = torch.autograd.grad(outputs.sum(), x, create_graph=True)
        keep = y >= 0
        penalty = gradient.square().sum(1)[keep].sum()
        return F.cross_entropy(outputs, y, reduction="sum") + penalty, int(keep.sum())

    ours, whole = small_model(), small_model()
    Accumulator(ours, sgd(ours), batch_loss=penalised, micro_batch=3).step(rows())
    total, terms = penalised(whole, rows())
    (total / terms).backward()
    sgd(whole).step()
    assert_same_parameters(ours, whole)


def test_the_check_leaves_no_trace() -> None:
    model = nn.Sequential(small_model(), nn.BatchNorm1d(3).double(), nn.Dropout(0.5))
    calls = []

    def watched(inner: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        calls.append(inner.training)
        return summed(inner, batch)

    one, other = twin(model), twin(model)
    torch.manual_seed(3)
    Accumulator(one, sgd(one), batch_loss=watched, micro_batch=4).step(rows())
    torch.manual_seed(3)
    Accumulator(
        other,
        sgd(other),
        forward=lambda m, b: (m(b[0]), b[1]),
        loss=nn.CrossEntropyLoss(),
        micro_batch=4,
    ).step(rows())
    assert calls == [False] * 4 + [True] * 3
    assert_exact(one.state_dict(), other.state_dict())


def test_two_ways_to_pass_the_loss_are_refused() -> None:
    model = small_model()
    with pytest.raises(TypeError, match="batch_loss takes the place of loss and forward"):
        Accumulator(model, sgd(model), nn.CrossEntropyLoss(), batch_loss=summed)
    with pytest.raises(TypeError, match="batch_loss must return"):
        Accumulator(model, sgd(model), batch_loss=lambda m, b: m(b[0]).sum()).step(rows())


class Detector(nn.Module):
    """Returns losses in training mode and detections in evaluation mode, as torchvision's do."""

    def __init__(self, *, broken: bool = False) -> None:
        super().__init__()
        self.inner = small_model()
        self.norm, self.drop = nn.BatchNorm1d(5).double().eval(), nn.Dropout(0.0)
        self.broken = broken

    def forward(self, x: Tensor, y: Tensor) -> object:
        scores = self.inner(self.drop(self.norm(x)))
        if not self.training:
            return [{"scores": row} for row in scores]
        if self.broken:
            raise ArithmeticError("no gradient flows here")
        return {"classes": F.cross_entropy(scores, y), "size": scores.square().mean()}


def of_detector(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    return sum(model(*batch).values()) * len(batch[0]), len(batch[0])


def boxes(examples: int = 11) -> Batch:
    x, y = rows(examples)
    return x, y.clamp(min=0)


def test_a_model_that_returns_losses_in_training_mode_only_is_checked_there() -> None:
    ours, whole = Detector(), Detector()
    step = Accumulator(ours, sgd(ours), batch_loss=of_detector, micro_batch=4).step(boxes())
    assert ours.training
    loss, terms = of_detector(whole, boxes())
    (loss / terms).backward()
    sgd(whole).step()
    assert_exact(step.loss, float(loss.detach()) / terms)
    assert_same_parameters(ours, whole)


def test_in_training_mode_too_a_mean_is_refused() -> None:
    def mean_of_losses(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        return of_detector(model, batch)[0] / len(batch[0]), len(batch[0])

    model = Detector()
    before = fingerprint(model)
    with pytest.raises(InexactStepError, match="does not add up"):
        Accumulator(model, sgd(model), batch_loss=mean_of_losses, micro_batch=4).step(boxes())
    assert fingerprint(model) == before


def test_an_error_in_both_modes_notes_that_a_check_ran() -> None:
    model = Detector(broken=True)
    with pytest.raises(ArithmeticError, match="no gradient flows") as caught:
        Accumulator(model, sgd(model), batch_loss=of_detector, micro_batch=4).step(boxes())
    assert any("two examples, alone and together" in note for note in caught.value.__notes__)


def counted(batch: Batch) -> int:
    return int((batch[1] != -100).sum())


def test_the_short_form_is_the_same_in_every_respect() -> None:
    assert StepOptions(batch_loss=summed) == StepOptions(loss=BatchLoss(summed))
    short, long = small_model(), small_model()
    one = Accumulator(short, sgd(short), batch_loss=summed, micro_batch=4).step(rows())
    two = Accumulator(long, sgd(long), BatchLoss(summed), micro_batch=4).step(rows())
    assert (one.loss, one.terms) == (two.loss, two.terms)
    assert fingerprint(short) == fingerprint(long)
    sent: BatchLoss = pickle.loads(pickle.dumps(BatchLoss(summed, terms=counted)))
    assert sent == BatchLoss(summed, terms=counted)


def test_both_forms_together_are_refused() -> None:
    model = small_model()
    with pytest.raises(TypeError, match="batch_loss takes the place of loss and forward"):
        Accumulator(model, sgd(model), BatchLoss(summed), batch_loss=summed)
    with pytest.raises(TypeError, match="BatchLoss takes the place of forward too"):
        Accumulator(model, sgd(model), BatchLoss(summed), forward=lambda m, b: (m(b[0]), b[1]))
    for wrong in (nn.CrossEntropyLoss, 5):
        with pytest.raises(TypeError, match="BatchLoss needs a callable"):
            BatchLoss(wrong)  # type: ignore[arg-type]  # That is the test.
    with pytest.raises(TypeError, match="terms must be a callable"):
        BatchLoss(summed, terms=7)  # type: ignore[arg-type]  # That is the test.


@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("micro_batch", [11, 4, 1])
def test_terms_that_are_counted_beforehand_give_the_undivided_step(
    micro_batch: int, tensor: bool
) -> None:
    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, object]:
        total, terms = summed(model, batch)
        return total, torch.tensor(terms) if tensor else terms

    ours, whole = small_model(), small_model()
    known = BatchLoss(loss, terms=counted)
    step = Accumulator(ours, sgd(ours), known, micro_batch=micro_batch).step(rows())
    (expected,) = undivided_steps(whole, sgd(whole), F.cross_entropy, [rows()])
    assert_exact(step.loss, expected)
    assert step.terms == 7
    assert_same_parameters(ours, whole)


def test_a_mean_of_means_is_another_step() -> None:
    """Control: a tolerance of 1e-12 separates the exact step from the usual mistake."""
    ours, whole = small_model(), small_model()
    parts = [tuple(part) for part in zip(*(item.split(4) for item in rows()), strict=True)]
    torch.stack([F.cross_entropy(ours(x), y) for x, y in parts]).mean().backward()
    sgd(ours).step()
    undivided_steps(whole, sgd(whole), F.cross_entropy, [rows()])
    with pytest.raises(AssertionError):
        assert_same_parameters(ours, whole)


def test_counted_terms_divide_the_first_backward_pass() -> None:
    """Without ``terms=`` the gradient is rescaled at the end."""
    seen: list[float] = []

    def watched(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        total, terms = summed(model, batch)
        total.register_hook(lambda gradient: seen.append(float(gradient)))
        return total, terms

    for loss, denominator in ((BatchLoss(watched, terms=counted), 7), (BatchLoss(watched), 11)):
        seen.clear()
        model = small_model()
        Accumulator(model, sgd(model), loss, micro_batch=4).step(rows())
        assert seen == [1 / denominator] * 3


def test_a_batch_without_terms_runs_no_forward_pass() -> None:
    def fails(_model: nn.Module, _batch: Batch) -> tuple[Tensor, int]:
        raise AssertionError("the function must not run")

    model = small_model()
    accumulator = Accumulator(model, sgd(model), BatchLoss(fails, terms=counted), micro_batch=4)
    x, y = rows()
    assert accumulator.step((x, torch.full_like(y, -100))).reason == "no valid term"


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        (lambda batch: len(batch[1]), "returns 0 terms .* terms= counts 1"),
        (lambda batch: counted(batch) ** 2, "terms= does not add up over examples"),
        (lambda _: 7, "terms= does not add up over examples"),
    ],
    ids=["examples", "squared", "constant"],
)
def test_terms_that_differ_from_those_of_the_function_are_refused(
    terms: Callable[[Batch], object], words: str
) -> None:
    model = small_model()
    before = fingerprint(model)
    accumulator = Accumulator(model, sgd(model), BatchLoss(summed, terms=terms), micro_batch=4)
    with pytest.raises(InexactStepError, match=words):
        accumulator.step(rows())
    assert fingerprint(model) == before


def test_wrong_terms_are_refused_in_a_whole_batch_and_in_a_later_batch() -> None:
    model = small_model()
    wrong = BatchLoss(summed, terms=lambda batch: len(batch[1]))
    with pytest.raises(InexactStepError, match=r"returns 7 terms .* terms= counts 11"):
        Accumulator(model, sgd(model), wrong).step(rows())
    right = [True]
    fickle = BatchLoss(summed, terms=lambda batch: counted(batch) + (not right[0]))
    accumulator = Accumulator(model, sgd(model), fickle, micro_batch=4)
    for _ in range(2):
        accumulator.step(rows())
    right[0] = False
    before = fingerprint(model)
    with pytest.raises(InexactStepError):
        accumulator.step(rows())  # No check of two examples runs in the third logical batch.
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    ("count", "error"),
    [("7", TypeError), (None, TypeError), (-1, ValueError), (float("nan"), ValueError)],
)
def test_terms_that_are_no_number_are_refused(count: object, error: type[Exception]) -> None:
    model = small_model()
    loss = BatchLoss(summed, terms=lambda _: count)
    with pytest.raises(error, match="terms must return a number"):
        Accumulator(model, sgd(model), loss, micro_batch=4).step(rows())


def test_counted_terms_work_with_a_search_an_evaluation_and_no_nan_check() -> None:
    ours, whole = small_model(), small_model()
    result = find_and_train(
        ours,
        [rows(64)],
        64,
        loss=BatchLoss(summed, terms=counted),
        optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
        memory_limit=9000,
        nonfinite="ignore",
        eval_data=[rows(64)],
        progress=False,
    )
    undivided_steps(whole, sgd(whole), F.cross_entropy, [rows(64)])
    assert result.plan.accumulation_steps > 1
    assert_same_parameters(ours, whole)
    (evaluation,) = result.evaluations
    expected = F.cross_entropy(whole(rows(64)[0]), rows(64)[1])
    assert_exact(evaluation.loss, float(expected.detach()))
