"""The slow, obvious way: one undivided batch after another, and the usual mistake beside it."""

import copy
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

LossFunction = Callable[[Tensor, Tensor], Tensor]
Pair = tuple[Tensor, Tensor]


def undivided_steps(
    model: nn.Module, optimizer: Optimizer, loss: LossFunction, batches: Iterable[Pair]
) -> list[float]:
    """Plain training: forward, loss, backward and step on each whole batch."""
    losses = []
    for inputs, targets in batches:
        optimizer.zero_grad()
        value = loss(model(inputs), targets)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def mean_of_means_steps(
    model: nn.Module,
    optimizer: Optimizer,
    loss: LossFunction,
    batches: Iterable[Pair],
    sizes: Sequence[int],
) -> None:
    """The usual mistake: each micro-batch's own mean, divided by the number of micro-batches."""
    for inputs, targets in batches:
        optimizer.zero_grad()
        for x, y in zip(inputs.split(list(sizes)), targets.split(list(sizes)), strict=True):
            (loss(model(x), y) / len(sizes)).backward()
        optimizer.step()


def sgd(model: nn.Module) -> Optimizer:
    """A step of learning rate 1: the update is the gradient."""
    return torch.optim.SGD(model.parameters(), lr=1.0)


def twin(model: nn.Module) -> nn.Module:
    """An independent copy with the same values."""
    return copy.deepcopy(model)


def assert_exact(one: object, other: object) -> None:
    """Equal at 1e-12: tensors, numbers or nestings of them."""
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def assert_same_parameters(one: nn.Module, other: nn.Module) -> None:
    """Every parameter and buffer equal at 1e-12."""
    assert_exact(one.state_dict(), other.state_dict())


def small_model(seed: int = 0, inputs: int = 5, classes: int = 3) -> nn.Sequential:
    """A float64 net without dropout or BatchNorm."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, classes)).double()


def token_model(seed: int = 0, vocabulary: int = 7, classes: int = 4) -> nn.Sequential:
    """A float64 net from tokens ``(batch, time)`` to scores ``(batch, classes, time)``."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Embedding(vocabulary, 6), nn.Tanh(), nn.Linear(6, classes), _ClassesSecond()
    ).double()


class _ClassesSecond(nn.Module):
    def forward(self, scores: Tensor) -> Tensor:
        return scores.transpose(1, 2)
