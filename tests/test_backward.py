"""A backward pass that begins with a gradient of one's own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autobatch.training import backward as module
from autobatch.training.backward import backward


def gradients(begin: Callable[[Tensor, Tensor], object], dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)
    for _ in range(2):  # The second is added.
        begin(net(torch.ones(5, 3, dtype=dtype)).square().sum(), torch.tensor(0.25, dtype=dtype))
    return [parameter.grad for parameter in net.parameters() if parameter.grad is not None]


def publicly(loss: Tensor, gradient: Tensor) -> None:
    loss.backward(gradient=gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("private", [True, False])
def test_the_gradients_are_those_of_the_public_way(
    monkeypatch: pytest.MonkeyPatch, private: bool, dtype: torch.dtype
) -> None:
    if not private:
        monkeypatch.setattr(module, "_ENGINE", None)
    ours, torchs = gradients(backward, dtype), gradients(publicly, dtype)
    assert len(ours) == 4
    assert all(map(torch.equal, ours, torchs))


def test_this_torch_has_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    engine: Callable[..., Any] | None = module._ENGINE
    assert engine is not None

    def counted(*args: object, **named: object) -> object:
        calls.append(args)
        return engine(*args, **named)

    monkeypatch.setattr(module, "_ENGINE", counted)
    gradients(backward, torch.float32)
    assert len(calls) == 2


@pytest.mark.parametrize("owner", [Tensor, torch.autograd])
def test_whoever_has_replaced_the_public_way_is_asked(
    monkeypatch: pytest.MonkeyPatch, owner: object
) -> None:
    asked: list[object] = []
    public: Callable[..., object] = getattr(owner, "backward")  # noqa: B009  # Not typed.

    def mine(*args: Any, **named: Any) -> object:
        asked.append(args[0])
        return public(*args, **named)

    monkeypatch.setattr(owner, "backward", mine)
    gradients(backward, torch.float32)
    assert len(asked) == 2


def test_a_loss_of_another_class_is_asked_itself() -> None:
    asked: list[object] = []

    class Mine(Tensor):
        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> object:
            if func is Tensor.backward:
                asked.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]  # Torch's.

    x = torch.ones(2, requires_grad=True)
    backward((x * 3).sum().as_subclass(Mine), torch.tensor(2.0))
    assert asked
    assert x.grad is not None
    assert x.grad.tolist() == [6, 6]


def test_a_graph_is_let_go() -> None:
    x = torch.ones(2, requires_grad=True)
    loss = x.square().sum()
    backward(loss, torch.tensor(1.0))
    with pytest.raises(RuntimeError, match="second time"):
        backward(loss, torch.tensor(1.0))
