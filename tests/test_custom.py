"""A function of the user's own, (model, batch) -> (sum, terms)."""

import pytest
import torch
import torch.nn.functional as F
from reference import assert_exact, assert_same_parameters, sgd, small_model, twin, undivided_steps
from states import fingerprint
from torch import Tensor, nn

from autobatch import Accumulator, InexactStepError, find_and_train
from autobatch.training.custom import BatchLoss

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


def test_through_find_and_train_with_a_note_that_it_is_the_user_s_word() -> None:
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
def test_what_does_not_add_up_is_refused_when_the_batch_is_cut(wrong: BatchLoss) -> None:
    model = small_model()
    before = fingerprint(model)
    accumulator = Accumulator(model, sgd(model), batch_loss=wrong, micro_batch=4)
    with pytest.raises(InexactStepError, match="does not add up over examples"):
        accumulator.step(rows())
    assert fingerprint(model) == before


@pytest.mark.parametrize("wrong", [mean, constant_terms, contrastive])
def test_a_batch_that_fits_whole_may_be_coupled(wrong: BatchLoss) -> None:
    model = small_model()
    Accumulator(model, sgd(model), batch_loss=wrong).step(rows())


def test_random_numbers_in_it_are_no_reason_to_refuse_it() -> None:
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


def test_two_ways_to_say_the_loss_are_refused() -> None:
    model = small_model()
    with pytest.raises(TypeError, match="batch_loss takes the place of loss and forward"):
        Accumulator(model, sgd(model), nn.CrossEntropyLoss(), batch_loss=summed)
    with pytest.raises(TypeError, match="batch_loss must return"):
        Accumulator(model, sgd(model), batch_loss=lambda m, b: m(b[0]).sum()).step(rows())


class Detector(nn.Module):
    """As torchvision's: losses in training mode, and in evaluation mode what was detected."""

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


def test_a_model_that_returns_losses_in_training_alone_is_asked_there() -> None:
    ours, whole = Detector(), Detector()
    step = Accumulator(ours, sgd(ours), batch_loss=of_detector, micro_batch=4).step(boxes())
    assert ours.training
    loss, terms = of_detector(whole, boxes())
    (loss / terms).backward()
    sgd(whole).step()
    assert_exact(step.loss, float(loss.detach()) / terms)
    assert_same_parameters(ours, whole)


def test_there_too_what_does_not_add_up_is_refused() -> None:
    def mean_of_losses(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        return of_detector(model, batch)[0] / len(batch[0]), len(batch[0])

    model = Detector()
    before = fingerprint(model)
    with pytest.raises(InexactStepError, match="does not add up"):
        Accumulator(model, sgd(model), batch_loss=mean_of_losses, micro_batch=4).step(boxes())
    assert fingerprint(model) == before


def test_what_fails_in_both_modes_says_that_it_was_a_check() -> None:
    model = Detector(broken=True)
    with pytest.raises(ArithmeticError, match="no gradient flows") as caught:
        Accumulator(model, sgd(model), batch_loss=of_detector, micro_batch=4).step(boxes())
    assert any("two examples, alone and together" in note for note in caught.value.__notes__)
