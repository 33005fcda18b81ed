"""The parameter cache sees every change of the model and the optimizer between two steps."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim import SGD, Optimizer

from autobatch.training.model_state.parameter_cache import ParameterCache

Change = Callable[[nn.Sequential, Optimizer], object]


def model() -> nn.Sequential:
    inner = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    return nn.Sequential(inner, nn.Flatten(), nn.Linear(2, 3), nn.Linear(3, 3))


def replaced(net: nn.Sequential, _: Optimizer) -> None:
    net[2] = nn.Linear(2, 3)


def deep(net: nn.Sequential, _: Optimizer) -> None:
    inner = net[0]
    assert isinstance(inner, nn.Sequential)
    inner[1] = nn.BatchNorm2d(2)


def swapped(net: nn.Sequential, _: Optimizer) -> None:
    net[2], net[3] = net[3], net[2]


def new_parameter(net: nn.Sequential, _: Optimizer) -> None:
    net[2].weight = nn.Parameter(torch.zeros(3, 2))


def tied(net: nn.Sequential, _: Optimizer) -> None:
    net[3].bias = net[2].bias


def bare(net: nn.Sequential, _: Optimizer) -> None:
    net[2].register_parameter("bias", None)


def another_group(_: nn.Sequential, optimizer: Optimizer) -> None:
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


def shorter_group(_: nn.Sequential, optimizer: Optimizer) -> None:
    group = optimizer.param_groups[0]
    group["params"] = group["params"][:1]


def loaded(_: nn.Sequential, optimizer: Optimizer) -> None:
    optimizer.load_state_dict(optimizer.state_dict())  # Binds new groups, of the same.


CHANGES: list[Change] = [
    replaced,
    deep,
    swapped,
    new_parameter,
    tied,
    bare,
    another_group,
    shorter_group,
    loaded,
    lambda net, _: net.append(nn.BatchNorm1d(3)),
    lambda net, _: net.pop(3),
    lambda net, _: parametrizations.weight_norm(net[2]),
    lambda net, _: net[2].requires_grad_(requires_grad=False),
    lambda net, _: net.to(torch.float64),
    lambda _net, _: None,
]


def of(optimizer: Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def contents(cache: ParameterCache) -> list[list[int]]:
    kinds = (cache.batch_norms, cache.modules, cache.parameters)
    return [sorted(map(id, kind)) for kind in kinds]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_two_steps_is_seen_and_one_more_on_top(change: Change) -> None:
    net, loss = model(), nn.BCEWithLogitsLoss(weight=torch.ones(3))
    optimizer = SGD(net.parameters(), lr=0.1)
    cache = ParameterCache(net, [loss], lambda: of(optimizer))
    for altered in (change, lambda net, _: net.append(nn.Linear(3, 3)), change):
        try:
            altered(net, optimizer)
        except (RuntimeError, IndexError):  # Not every one can be made twice.
            continue
        cache.refresh()
        assert contents(cache) == contents(ParameterCache(net, [loss], lambda: of(optimizer)))
