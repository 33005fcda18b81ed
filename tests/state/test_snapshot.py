"""What is disturbed inside ``preserved`` is put back: every bit, and every object.

Each disturbance is run twice: inside, where nothing may be left of it, and as a control without,
where the comparison must see it.
"""

import os
import random
import signal
import threading
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from states import bits, fingerprint, identities
from torch import Tensor, nn
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
)
from torch.optim.lr_scheduler import OneCycleLR, StepLR
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from autobatch.signals import deferred_interrupt
from autobatch.state import snapshot
from autobatch.state.rng import random_state
from autobatch.state.snapshot import preserved, training_mode

Factory = Callable[[Iterator[nn.Parameter]], Optimizer]
Disturbance = Callable[[], object]

OPTIMIZERS: dict[str, Factory] = {
    "sgd": lambda p: SGD(p, 0.1),
    "momentum": lambda p: SGD(p, 0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: Adam(p, 0.1, foreach=False),
    "adam foreach": lambda p: Adam(p, 0.1, foreach=True),
    "adam fused": lambda p: Adam(p, 0.1, fused=True),
    "adam with its rate in a tensor": lambda p: Adam(p, torch.tensor(0.1), foreach=False),
    "amsgrad": lambda p: Adam(p, 0.1, amsgrad=True),
    "adamw": lambda p: AdamW(p, 0.1),
    "adadelta": lambda p: Adadelta(p, 0.1),
    "nadam": lambda p: NAdam(p, 0.1),
    "radam": lambda p: RAdam(p, 0.1),
    "rmsprop": lambda p: RMSprop(p, 0.1, momentum=0.5, centered=True),
    "adagrad": lambda p: Adagrad(p, 0.1),  # Its state exists before any step.
    "adamax": lambda p: Adamax(p, 0.1),
    "adafactor": lambda p: Adafactor(p, 0.1),
    "asgd": lambda p: ASGD(p, 0.1),
    "rprop": lambda p: Rprop(p, 0.1),
}


@dataclass
class Scene:
    """What is to be preserved, and what is done to it."""

    modules: Sequence[nn.Module]
    disturb: Disturbance
    optimizers: Sequence[Optimizer] = ()
    sources: Sequence[object] = ()

    def everything(self) -> list[object]:
        return [*self.modules, *self.optimizers, *self.sources]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2))


def step(model: nn.Module, optimizer: Optimizer | None = None, width: int = 4) -> None:
    """One step of training, as a trial takes it."""
    parameter = next(model.parameters())
    outputs = model(torch.randn(5, width, dtype=parameter.dtype))
    outputs.float().square().mean().backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()


def trained(model: nn.Module, optimizer: Optimizer, steps: int = 2) -> Disturbance:
    def disturb() -> None:
        for _ in range(steps):
            step(model, optimizer)

    return disturb


SCENES: dict[str, Callable[[], Scene]] = {}


def scene(make: Callable[[], Scene]) -> Callable[[], Scene]:
    """Have a scene played both ways."""
    SCENES[make.__name__.replace("_", " ")] = make
    return make


def optimizer_scene(factory: Factory, *, warm: bool, gradients: bool) -> Scene:
    model = network()
    optimizer = factory(model.parameters())
    if warm:
        step(model, optimizer)
    if gradients:
        step(model)
    return Scene([model], trained(model, optimizer), [optimizer])


for _name, _factory in OPTIMIZERS.items():
    for _warm in (False, True):
        SCENES[f"{_name} {'warm' if _warm else 'fresh'}"] = lambda f=_factory, w=_warm: (  # type: ignore[misc]  # Bound now.
            optimizer_scene(f, warm=w, gradients=w)
        )


@scene
def the_learning_rate_is_changed() -> Scene:
    model = network()
    optimizer = SGD(
        [
            {"params": [model[0].weight], "lr": 0.5},
            {"params": [model[3].weight], "betas": [0.1, 0.2]},
        ],
        lr=0.1,
    )

    def disturb() -> None:
        optimizer.param_groups[0]["lr"] = 9.0
        optimizer.param_groups[1]["extra"] = "new"
        del optimizer.param_groups[1]["betas"]
        optimizer.param_groups[0]["params"].append(model[0].bias)

    return Scene([model], disturb, [optimizer])


@scene
def the_groups_are_replaced_by_a_loaded_state() -> Scene:
    model = network()
    optimizer = Adam(model.parameters(), 0.1)
    step(model, optimizer)

    def disturb() -> None:
        loaded = optimizer.state_dict()
        step(model, optimizer)
        optimizer.load_state_dict(loaded)
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
        optimizer.param_groups = list(optimizer.param_groups)

    return Scene([model], disturb, [optimizer])


@scene
def the_optimizers_state_is_cleared() -> Scene:
    model = network()
    optimizer = Adam(model.parameters(), 0.1)
    step(model, optimizer)

    def disturb() -> None:
        optimizer.state.clear()
        step(model, optimizer)

    return Scene([model], disturb, [optimizer])


class Keeping(SGD):
    """Keeps more than tensors: what it did, and in its state lists and objects of its own."""

    def __init__(self, parameters: Iterator[nn.Parameter]) -> None:
        super().__init__(parameters, 0.1)
        self.history: list[int] = []

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # Takes no closure.
        super().step(closure)
        self.history.append(len(self.history))
        for group in self.param_groups:
            for parameter in group["params"]:
                entry = self.state[parameter]
                entry.setdefault("norms", []).append(parameter.detach().norm())
                entry.setdefault("factors", [parameter.detach().clone()])[0].mul_(2)
                entry.setdefault("generator", random.Random(1)).random()


@scene
def an_optimizer_keeps_more_than_tensors() -> Scene:
    model = network()
    optimizer = Keeping(model.parameters())
    step(model, optimizer)
    return Scene([model], trained(model, optimizer), [optimizer])


@scene
def a_scheduler_steps_after_the_optimizer() -> Scene:
    model = network()
    optimizer = SGD(model.parameters(), 0.1, momentum=0.9)
    schedulers = [StepLR(optimizer, 1), OneCycleLR(optimizer, 0.5, total_steps=20)]

    def disturb() -> None:
        for scheduler in schedulers:
            step(model, optimizer)
            scheduler.step()

    return Scene([model], disturb, [optimizer])


@scene
def two_optimizers_share_a_model() -> Scene:
    model = network()
    one, other = Adam(model[:2].parameters(), 0.1), SGD(model[3:].parameters(), 0.1, momentum=0.9)

    def disturb() -> None:
        for optimizer in (one, other):
            step(model, optimizer)

    return Scene([model], disturb, [one, other])


@scene
def the_loss_is_a_module_with_parameters() -> Scene:
    model, loss = network(), nn.PReLU()
    optimizer = Adam([*model.parameters(), *loss.parameters()], 0.1)

    def disturb() -> None:
        loss(model(torch.randn(5, 4))).sum().backward()
        optimizer.step()

    return Scene([model, loss], disturb, [optimizer])


@scene
def the_optimizer_holds_parameters_of_another_module() -> Scene:
    model, other = network(), nn.Linear(2, 2)
    optimizer = Adam([*model.parameters(), *other.parameters()], 0.1)

    def disturb() -> None:
        other(model(torch.randn(5, 4))).sum().backward()
        optimizer.step()

    return Scene([model], disturb, [optimizer])


@scene
def weights_are_tied() -> Scene:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    optimizer = Adam(model.parameters(), 0.1)
    return Scene([model], trained(model, optimizer), [optimizer])


@scene
def some_parameters_are_frozen() -> Scene:
    model = network()
    model[0].requires_grad_(requires_grad=False)
    optimizer = Adam(model.parameters(), 0.1)
    return Scene([model], trained(model, optimizer), [optimizer])


@scene
def parameters_are_thawed_and_frozen() -> Scene:
    model = network()
    model[0].requires_grad_(requires_grad=False)

    def disturb() -> None:
        model[0].requires_grad_()
        model[3].requires_grad_(requires_grad=False)

    return Scene([model], disturb)


@scene
def precisions_are_mixed() -> Scene:
    torch.manual_seed(0)
    layers = [nn.Linear(3, 3), nn.Linear(3, 3).half(), nn.Linear(3, 3).bfloat16()]
    model = nn.Sequential(*layers, nn.Linear(3, 3).double())
    optimizer = Adam(model.parameters(), 0.1)

    def disturb() -> None:
        for layer in model:
            step(layer, width=3)
        optimizer.step()

    disturb()
    return Scene([model], disturb, [optimizer])


@scene
def the_model_is_cast() -> Scene:
    model = network()
    step(model)
    return Scene([model], lambda: model.double())


@scene
def the_model_is_cast_and_trained() -> Scene:
    model = network()
    optimizer = Adam(model.parameters(), 0.1)
    step(model, optimizer)
    step(model)

    def disturb() -> None:
        model.double()
        optimizer.state.clear()
        step(model, optimizer)

    return Scene([model], disturb, [optimizer])


@scene
def the_data_of_parameters_is_replaced() -> Scene:
    model = network()

    def disturb() -> None:
        for parameter in model.parameters():
            parameter.data = torch.zeros_like(parameter)
        model[0].weight.data = torch.zeros(7, 9)

    return Scene([model], disturb)


@scene
def the_data_is_looked_at_in_another_way() -> Scene:
    """The same memory, of another shape, order or type."""
    model = nn.Bilinear(4, 4, 4)
    model.register_buffer("numbers", torch.rand(4))

    def disturb() -> None:
        model.weight.data = model.weight.data.transpose(1, 2)
        model.bias.data = model.bias.data[:2]
        for numbers in model.buffers():
            numbers.data = numbers.data.view(torch.int32)

    return Scene([model], disturb)


@scene
def parameters_share_their_data_with_others() -> Scene:
    """As flattened parameters do: views into one buffer."""
    model = nn.Linear(3, 2)
    flat = torch.arange(8.0)
    model.weight.data, model.bias.data = flat[:6].view(2, 3), flat[6:]

    def disturb() -> None:
        flat.zero_()
        model.weight.data = model.weight.data.clone()

    return Scene([model], disturb)


@scene
def the_memory_is_in_another_order() -> Scene:
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch does not say that it may.

    def disturb() -> None:
        model.weight.data = model.weight.data.contiguous() + 1

    return Scene([model], disturb)


@scene
def layers_and_parameters_are_replaced() -> Scene:
    model = network()

    def disturb() -> None:
        model[0] = nn.Linear(4, 6)
        model[3].weight = nn.Parameter(torch.ones(2, 6))
        model.append(nn.ReLU())
        model[1].register_parameter("bias", None)

    return Scene([model], disturb)


@scene
def modes_are_changed() -> Scene:
    model = network()
    model[1].eval()
    return Scene([model], lambda: model.train(mode=not model.training))


@scene
def a_mode_below_the_root_is_changed() -> Scene:
    model = network()
    model[1].eval()
    return Scene([model], lambda: model.train())


class Odd(nn.Module):
    """Keeps all kinds of things beside its parameters, and changes them in its forward."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("late", None)
        self.register_buffer("passing", torch.zeros(1), persistent=False)
        self.calls = 0
        self.seen: list[int] = [1]
        self.counts = {"a": 1}
        self.ordered = OrderedDict(a=1)
        self.names = {"one"}
        self.recent: deque[int] = deque([1, 2], maxlen=2)
        self.plain = torch.zeros(2)
        self.learned = torch.ones(2, requires_grad=True)
        self.history = [torch.zeros(2)]
        self.table = {"key": torch.zeros(2)}
        self.nested = {"a": [{"b": ([1], torch.zeros(2))}]}
        self.tally = Counter("aab")
        self.grouped: defaultdict[str, list[int]] = defaultdict(list, a=[1])
        self.jagged = torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged)
        self.sketch = torch.ones(2, device="meta")
        self.generator = torch.Generator().manual_seed(1)
        self.of_numpy = np.random.default_rng(1)

    def forward(self, inputs: Tensor) -> Tensor:
        self.mean = self.mean + inputs.mean(0)  # Another tensor, as BatchNorm's never is.
        return self.linear(inputs) * self.learned  # type: ignore[no-any-return]  # A tensor.


def odd(disturb: Callable[[Odd], object]) -> Callable[[], Scene]:
    def make() -> Scene:
        model = Odd()
        return Scene([model], lambda: disturb(model))

    return make


def in_place(*tensors: Tensor) -> None:
    with torch.no_grad():
        for tensor in tensors:
            tensor.add_(1)


SCENES |= {
    "a buffer is replaced": odd(lambda m: m(torch.ones(3, 4))),
    "a buffer is made": odd(lambda m: setattr(m, "late", torch.ones(1))),
    "a buffer is added": odd(lambda m: m.register_buffer("new", torch.ones(1), persistent=False)),
    "a buffer is removed": odd(lambda m: delattr(m, "passing")),
    "a counter counts": odd(lambda m: setattr(m, "calls", 1)),
    "an attribute is made": odd(lambda m: setattr(m, "fresh", 1)),
    "an attribute is deleted": odd(lambda m: delattr(m, "calls")),
    "a list grows": odd(lambda m: m.seen.append(2)),
    "a list is replaced": odd(lambda m: setattr(m, "seen", [1, 2])),
    "a mapping changes": odd(lambda m: m.counts.update(a=2, b=3)),
    "an ordered mapping changes": odd(lambda m: m.ordered.update(a=2, b=3)),
    "a set changes": odd(lambda m: m.names.add("two")),
    "a queue moves on": odd(lambda m: m.recent.append(3)),
    "a plain tensor changes": odd(lambda m: in_place(m.plain)),
    "a tensor in a list changes": odd(lambda m: in_place(*m.history)),
    "a tensor in a mapping changes": odd(lambda m: in_place(m.table["key"])),
    "a list deep inside grows": odd(lambda m: m.nested["a"][0]["b"][0].append(2)),
    "a tensor deep inside changes": odd(lambda m: in_place(m.nested["a"][0]["b"][1])),
    "a list in a list is removed": odd(lambda m: m.nested["a"].clear()),
    "a tally changes": odd(lambda m: m.tally.update("abc")),
    "a list in a mapping grows": odd(lambda m: m.grouped["a"].append(2)),
    "a mapping with defaults grows": odd(lambda m: m.grouped["new"]),
    "a jagged tensor changes": odd(lambda m: in_place(m.jagged.values())),
    "a list of tensors is replaced": odd(lambda m: m.history.__setitem__(0, torch.ones(2))),
    "a tensor that is no parameter gets a gradient": odd(lambda m: m.learned.sum().backward()),
    "a generator of the model is drawn from": odd(lambda m: torch.rand(3, generator=m.generator)),
    "a NumPy generator of the model is drawn from": odd(lambda m: m.of_numpy.random()),
    "a module is added": odd(lambda m: m.add_module("more", nn.Linear(2, 2))),
}


@scene
def a_generator_lies_under_many_layers() -> Scene:
    odd = Odd()
    model: nn.Module = odd
    for _ in range(12):
        model = nn.ModuleList([*(nn.ReLU() for _ in range(70)), model])
    return Scene([model], lambda: torch.rand(3, generator=odd.generator))


@scene
def a_hook_is_added() -> Scene:
    model = network()
    return Scene([model], lambda: model.register_forward_hook(lambda *_: None))


@scene
def a_buffer_is_expanded() -> Scene:
    model = nn.Module()
    row = torch.arange(3.0)
    model.register_buffer("rows", row.expand(5, 3))
    return Scene([model], lambda: row.add_(1))


@scene
def an_expanded_buffer_becomes_a_whole_one() -> Scene:
    model = nn.Module()
    model.register_buffer("rows", torch.arange(3.0).expand(5, 3))
    return Scene([model], lambda: setattr(model, "rows", torch.ones(5, 3)))


@scene
def buffers_are_of_every_kind() -> Scene:
    model = nn.Module()
    with torch.inference_mode():
        made_without_gradients = torch.ones(3)
    kinds = {
        "counts": torch.tensor(5),
        "flags": torch.tensor([True, False]),
        "numbers": torch.tensor([1 + 2j]),
        "nothing": torch.ones(0, 3),
        "not_a_number": torch.tensor([float("nan"), -0.0]),
        "sparse": torch.eye(3).to_sparse(),
        "strided": torch.arange(12.0).view(3, 4)[:, 1],
        "inference": made_without_gradients,
    }
    for name, value in kinds.items():
        model.register_buffer(name, value)

    def disturb() -> None:
        for buffer in model.buffers():
            with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                buffer.zero_()

    return Scene([model], disturb)


@scene
def gradients_are_sparse() -> Scene:
    model = nn.Embedding(9, 3, sparse=True)
    optimizer = SGD(model.parameters(), 0.1)
    model(torch.tensor([1, 2])).sum().backward()

    def disturb() -> None:
        model(torch.tensor([3, 3, 4])).sum().backward()
        optimizer.step()

    return Scene([model], disturb, [optimizer])


@scene
def gradients_are_added_to() -> Scene:
    model = network()
    step(model)
    return Scene([model], lambda: step(model))


@scene
def gradients_are_made() -> Scene:
    model = network()
    return Scene([model], lambda: step(model))


@scene
def gradients_are_views_of_one_buffer() -> Scene:
    model = nn.Linear(3, 2)
    flat = torch.arange(8.0)
    model.weight.grad, model.bias.grad = flat[:6].view(2, 3), flat[6:]

    def disturb() -> None:
        model(torch.ones(1, 3)).sum().backward()

    return Scene([model], disturb)


@scene
def a_recurrent_network_keeps_its_flat_weights() -> Scene:
    torch.manual_seed(0)
    model = nn.LSTM(3, 4, num_layers=2)
    optimizer = Adam(model.parameters(), 0.1)

    def disturb() -> None:
        model(torch.randn(5, 2, 3))[0].sum().backward()
        optimizer.step()
        model.double()
        model.flatten_parameters()

    return Scene([model], disturb, [optimizer])


@scene
def a_parametrized_layer_is_trained() -> Scene:
    torch.manual_seed(0)
    model = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3))
    optimizer = Adam(model.parameters(), 0.1)
    return Scene([model], trained(model, optimizer), [optimizer])


@scene
def the_generators_are_drawn_from() -> Scene:
    own = np.random.default_rng(1)

    def disturb() -> None:
        torch.rand(1)
        np.random.rand()
        random.random()
        own.random()

    return Scene([], disturb, sources=[own])


@pytest.mark.parametrize("name", SCENES)
def test_everything_is_put_back_bit_by_bit_into_the_same_objects(name: str) -> None:
    played = SCENES[name]()
    values, objects = fingerprint(*played.everything()), identities(*played.everything())
    with preserved(played.modules, played.optimizers, random_sources=played.sources):
        played.disturb()
    assert fingerprint(*played.everything()) == values
    assert identities(*played.everything()) == objects


@pytest.mark.parametrize("name", SCENES)
def test_the_control_is_seen_by_the_comparison(name: str) -> None:
    played = SCENES[name]()
    before = fingerprint(*played.everything())
    played.disturb()
    assert fingerprint(*played.everything()) != before


def test_the_comparison_of_objects_can_fail() -> None:
    """A state that is loaded is equal, and nothing of it is the same."""
    model = network()
    optimizer = Adam(model.parameters(), 0.1)
    step(model, optimizer)
    before = identities(model, optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    after = identities(model, optimizer)
    changed = {name for name in before if before[name] != after[name]}
    assert {"1:group 0", "1:entry 0", "0:3.weight"} <= changed


@pytest.mark.parametrize("played", ["adam warm", "momentum warm", "the model is cast and trained"])
def test_training_goes_on_as_if_nothing_had_been(played: str) -> None:
    """The same steps after it as without it: the state is not only equal, it works."""

    def afterwards(*, disturbed: bool) -> dict[str, object]:
        found = SCENES[played]()
        (model,), (optimizer,) = found.modules, found.optimizers
        torch.manual_seed(1)
        if disturbed:
            with preserved([model], [optimizer]):
                found.disturb()
        trained(model, optimizer, steps=3)()
        return fingerprint(model, optimizer)

    assert afterwards(disturbed=True) == afterwards(disturbed=False)


def test_inside_there_are_no_gradients_and_the_values_are_the_same() -> None:
    model = network()
    step(model)
    values = [bits(parameter) for parameter in model.parameters()]
    with preserved([model]):
        assert all(parameter.grad is None for parameter in model.parameters())
        assert [bits(parameter) for parameter in model.parameters()] == values
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    "error", [ValueError, torch.OutOfMemoryError, KeyboardInterrupt, SystemExit]
)
def test_an_error_inside_passes_through_when_everything_is_back(
    error: type[BaseException],
) -> None:
    played = SCENES["adam warm"]()
    values = fingerprint(*played.everything())
    objects = identities(*played.everything())
    raised = error("from inside")

    def disturb() -> None:
        with preserved(played.modules, played.optimizers):
            played.disturb()
            raise raised

    with pytest.raises(error) as caught:
        disturb()
    assert caught.value is raised
    assert fingerprint(*played.everything()) == values
    assert identities(*played.everything()) == objects


def test_what_cannot_be_put_back_hides_no_error_and_keeps_nothing_else_from_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """USERS 1.2.9: a device that is lost takes no values, and the reason must be heard."""
    played = SCENES["adam warm"]()
    objects = identities(*played.everything())
    drawn = random_state()
    first = torch.rand(3)
    drawn()

    def lost(*_: object) -> None:
        raise RuntimeError("the device is dead")

    def disturb(error: Exception | None) -> None:
        with preserved(played.modules, played.optimizers):
            played.disturb()
            monkeypatch.setattr(snapshot, "_fill", lost)
            if error is not None:
                raise error

    with pytest.raises(KeyError, match="the reason") as caught:
        disturb(KeyError("the reason"))
    assert caught.value.__notes__ == ["not everything could be put back: the device is dead"]
    assert identities(*played.everything()) == objects
    assert torch.equal(torch.rand(3), first)
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="dead"):
        disturb(None)


def test_one_inside_another_puts_back_each_its_own() -> None:
    model = network()
    optimizer = Adam(model.parameters(), 0.1)
    outer = fingerprint(model, optimizer)
    with preserved([model], [optimizer]):
        step(model, optimizer)
        step(model)
        inner = fingerprint(model, optimizer)
        with preserved([model], [optimizer]):
            step(model, optimizer)
        assert fingerprint(model, optimizer) == inner
    assert fingerprint(model, optimizer) == outer


def test_a_snapshot_that_fails_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Host memory may run out while the copies are made."""
    played = SCENES["adam warm"]()
    values = fingerprint(*played.everything())
    objects = identities(*played.everything())

    def fail(_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(snapshot, "random_state", fail)
    with pytest.raises(MemoryError), preserved(played.modules, played.optimizers):
        pytest.fail("it was entered")
    assert fingerprint(*played.everything()) == values
    assert identities(*played.everything()) == objects


def test_it_works_outside_the_main_thread_too() -> None:
    played = SCENES["adam warm"]()
    values = fingerprint(*played.everything())

    def run() -> None:
        with preserved(played.modules, played.optimizers):
            played.disturb()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert fingerprint(*played.everything()) == values


# Ctrl-C.


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@dataclass
class Pressing:
    """Does what it wraps, and has Ctrl-C pressed after it has been done, at one of its calls."""

    wrapped: Callable[..., object]
    at_call: int
    calls: int = 0
    after: list[int] = field(default_factory=list)

    def __call__(self, *args: object) -> object:
        self.calls += 1
        result = self.wrapped(*args)
        if self.calls == self.at_call:
            press_ctrl_c()
        elif self.calls > self.at_call:
            self.after.append(self.calls)
        return result


@pytest.mark.parametrize("at_call", [1, 5])
def test_ctrl_c_during_the_restoring_comes_when_it_is_complete(
    monkeypatch: pytest.MonkeyPatch, at_call: int
) -> None:
    played = SCENES["adam warm"]()
    values = fingerprint(*played.everything())
    objects = identities(*played.everything())
    fill = Pressing(snapshot._fill, at_call)
    monkeypatch.setattr(snapshot, "_fill", fill)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), preserved(played.modules, played.optimizers):
        played.disturb()
    assert fill.after, "it was pressed too late to show anything"
    assert fingerprint(*played.everything()) == values
    assert identities(*played.everything()) == objects
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_ctrl_c_before_it_can_be_held_back_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    """As the restoring begins, and again, and in the middle of torch's no_grad."""
    played = SCENES["adam warm"]()
    values = fingerprint(*played.everything())
    pressed: list[int] = []

    def hold() -> AbstractContextManager[None]:
        pressed.append(1)
        if len(pressed) in range(2, 2 + calls):  # The first is for the gradients.
            raise KeyboardInterrupt
        return deferred_interrupt()

    monkeypatch.setattr(snapshot, "deferred_interrupt", hold)

    def interrupted() -> None:
        with preserved(played.modules, played.optimizers):
            played.disturb()
            torch.set_grad_enabled(False)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert torch.is_grad_enabled()
    assert fingerprint(*played.everything()) == values


@pytest.mark.parametrize("at_call", range(1, 13))  # Some of them are parameters with gradients.
def test_ctrl_c_while_gradients_are_set_aside_loses_none(
    monkeypatch: pytest.MonkeyPatch, at_call: int
) -> None:
    played = SCENES["adam warm"]()
    values = fingerprint(*played.everything())
    objects = identities(*played.everything())
    monkeypatch.setattr(
        snapshot, "_gradient_set_aside", Pressing(snapshot._gradient_set_aside, at_call)
    )
    with pytest.raises(KeyboardInterrupt), preserved(played.modules, played.optimizers):
        pytest.fail("it was entered")
    assert fingerprint(*played.everything()) == values
    assert identities(*played.everything()) == objects


def test_ctrl_c_after_an_error_keeps_both(monkeypatch: pytest.MonkeyPatch) -> None:
    played = SCENES["adam warm"]()
    monkeypatch.setattr(snapshot, "_fill", Pressing(snapshot._fill, 1))
    with (
        pytest.raises(KeyboardInterrupt) as caught,
        preserved(played.modules, played.optimizers),
    ):
        raise ValueError("the first")
    assert isinstance(caught.value.__context__, ValueError)


# Modes.


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def test_a_root_in_evaluation_mode_trains_inside_and_is_put_back_layer_by_layer() -> None:
    model = network().eval()
    model[2].train()
    before = modes(model)

    def fail() -> None:
        with training_mode(model):
            assert all(modes(model))
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail()
    assert modes(model) == before == [False, False, False, True, False]


def test_a_root_in_training_mode_keeps_its_frozen_layers_in_evaluation() -> None:
    model = network()
    model[1].eval()
    before = modes(model)
    with training_mode(model):
        assert modes(model) == before
    assert modes(model) == before == [True, True, False, True, True]


def test_a_mode_that_is_left_on_is_ended_and_the_users_own_stays() -> None:
    """As Ctrl-C at the very end of a context leaves it."""

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Callable[..., Any], _: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return func(*args, **(kwargs or {}))

    own, left = Mode(), Mode()  # type: ignore[no-untyped-call]  # torch's.
    with own:
        with preserved([nn.Linear(1, 1)]):
            left.__enter__()  # type: ignore[no-untyped-call]  # torch's.
        assert _get_current_dispatch_mode_stack() == [own]
    assert _get_current_dispatch_mode_stack() == []
