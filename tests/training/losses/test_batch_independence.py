"""A model whose examples depend on one another is refused when its batch is cut."""

from collections.abc import Callable

import pytest
import torch
from reference import sgd, small_model
from states import fingerprint
from torch import Tensor, nn

from autobatch import Accumulator, InexactStepError, find_and_train

BATCH = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3


class Mixing(nn.Module):
    """A linear layer and a function of its outputs."""

    def __init__(self, mix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(5, 3)
        self.mix = mix

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.layer(x))


def standardised(h: Tensor) -> Tensor:
    return (h - h.mean(0)) / (h.std(0, correction=0) + 1e-5)


def attended(h: Tensor) -> Tensor:
    return (h @ h.T).softmax(1) @ h


MIXES = [standardised, attended, lambda h: h - h.mean(0), lambda h: h + h.flip(0)]


@pytest.mark.parametrize("mix", MIXES, ids=["statistics", "attention", "centred", "flipped"])
@pytest.mark.parametrize("loss", [None, nn.CrossEntropyLoss(), nn.functional.cross_entropy])
def test_a_model_that_mixes_examples_is_refused_when_its_batch_is_cut(
    mix: Callable[[Tensor], Tensor], loss: Callable[..., object] | None
) -> None:
    model = Mixing(mix)
    before = fingerprint(model)
    with pytest.raises(InexactStepError, match="the model mixes examples"):
        Accumulator(model, sgd(model), loss, micro_batch=4).step(BATCH)
    assert fingerprint(model) == before
    Accumulator(model, sgd(model), loss).step(BATCH)  # A whole batch is exact.


def test_find_and_train_refuses_it_before_anything_has_changed() -> None:
    model = Mixing(standardised)
    before = fingerprint(model)
    with pytest.raises(InexactStepError, match="WholeBatch"):
        find_and_train(model, [BATCH], 12, memory_limit="1KiB", progress=False)
    assert fingerprint(model) == before


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)  # In evaluation mode too, as a VAE does.


class NeedsTwo(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        assert len(x) > 1, "squeezes its batch away"
        return x


@pytest.mark.parametrize(
    "layer",
    [
        nn.Identity(),
        nn.Dropout(0.5),
        nn.BatchNorm1d(5),
        nn.BatchNorm1d(5, track_running_stats=False),
        nn.LayerNorm(5),
        Noisy(),
        NeedsTwo(),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_other_models_are_cut_and_the_check_leaves_no_trace(layer: nn.Module) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(layer, nn.Linear(5, 3))
    calls: list[bool] = []
    model.register_forward_pre_hook(lambda module, _: calls.append(module.training))
    accumulator = Accumulator(model, sgd(model), micro_batch=4)
    assert accumulator.step(BATCH).micro_batch_sizes == (4, 4, 4)
    trained = calls.count(True)
    accumulator.step(BATCH)
    assert trained == 3
    assert model.training


def test_a_model_is_checked_once_if_the_check_has_an_answer() -> None:
    model = small_model().float()
    calls: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    accumulator = Accumulator(model, sgd(model), micro_batch=6)
    for _ in range(4):
        accumulator.step(BATCH)
    assert calls == [1, 1, 2, 2] + [6, 6] * 4
