import random
import types
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from states import fingerprint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, Subset, TensorDataset

from autobatch.state.rng import random_state

Draw = Callable[[], object]

GLOBAL: dict[str, Draw] = {
    "torch": lambda: torch.rand(3).tolist(),
    "torch normal": lambda: torch.randn(17).tolist(),  # It caches half of what it draws.
    "numpy": lambda: np.random.rand(3).tolist(),
    "numpy gauss": lambda: np.random.standard_normal(1).tolist(),  # So does this.
    "python": random.random,
    "python gauss": lambda: random.gauss(0, 1),
}


def own_generators() -> list[tuple[object, Draw]]:
    """One of each kind that data may own, and a draw from it."""
    of_torch = torch.Generator().manual_seed(1)
    of_numpy = np.random.default_rng(1)
    legacy = np.random.RandomState(1)
    of_python = random.Random(1)
    return [
        (of_torch, lambda: torch.rand(3, generator=of_torch).tolist()),
        (of_numpy, lambda: of_numpy.random(3).tolist()),
        (legacy, lambda: legacy.standard_normal(1).tolist()),
        (of_python, lambda: of_python.gauss(0, 1)),
    ]


KINDS = ["torch", "numpy", "numpy legacy", "python"]


@dataclass
class Settings:
    seeds: dict[str, Any] = field(default_factory=dict)


class Augmented(Dataset[Tensor]):
    """A dataset as people write them: the generator is somewhere inside."""

    def __init__(self, generator: object) -> None:
        self.settings = Settings({"augment": [("flip", generator)]})

    def __len__(self) -> int:
        return 4

    def __getitem__(self, row: int) -> Tensor:
        return torch.tensor(row)


class Node:
    def __init__(self, inside: object) -> None:
        self.inside = inside

    def itself(self) -> "Node":
        return self


class Slotted:
    __slots__ = ("inside", "never")

    def __init__(self, inside: object) -> None:
        self.inside = inside


def with_attribute(inside: object) -> nn.Module:
    module = nn.ReLU()
    module.transform = Node(inside)  # type: ignore[assignment]  # Any attribute will do.
    return module


def cyclic(generator: object) -> Node:
    node = Node(None)
    node.inside = [node, {"generator": generator, "again": node}]
    return node


PLACES: dict[str, Callable[[Any], object]] = {
    "itself": lambda generator: generator,
    "in a list": lambda generator: [1, "two", [generator]],
    "in a tuple": lambda generator: (None, (generator,)),
    "in a mapping": lambda generator: {"a": {"b": generator}},
    "in an object": Node,
    "in a cycle": cyclic,
    "in a dataset": Augmented,
    "in a module": lambda generator: nn.Sequential(nn.ReLU(), with_attribute(generator)),
    "in a closure": lambda generator: lambda: generator,
    "in a partial": lambda generator: partial(print, generator, flush=True),
    "in the keyword of a partial": lambda generator: partial(print, end=[generator]),
    "in what a method is bound to": lambda generator: Node(generator).itself,
    "in slots": lambda generator: Slotted(generator),
    "in a subset": lambda generator: Subset(Augmented(generator), [0, 2]),
    "in the loader's dataset": lambda generator: DataLoader(Augmented(generator), batch_size=2),
}


@pytest.mark.parametrize("name", GLOBAL)
def test_a_global_generator_goes_on_as_if_nothing_had_been_drawn(name: str) -> None:
    draw = GLOBAL[name]
    draw()  # In the middle of a pair, where draws come in pairs.
    put_back = random_state()
    first = draw()
    for each in GLOBAL.values():
        each()
    put_back()
    assert draw() == first


@pytest.mark.parametrize("name", GLOBAL)
def test_the_control_draws_something_else(name: str) -> None:
    assert GLOBAL[name]() != GLOBAL[name]()


@settings(deadline=None, max_examples=30, derandomize=True)
@given(draws=st.lists(st.sampled_from(list(GLOBAL)), max_size=6), seed=st.integers(0, 2**32 - 1))
def test_every_global_generator_is_put_back_bit_by_bit(draws: list[str], seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    before = fingerprint()
    put_back = random_state()
    for name in draws:
        GLOBAL[name]()
    assert (fingerprint() == before) == (not draws)
    put_back()
    assert fingerprint() == before


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", range(len(KINDS)), ids=KINDS)
def test_a_generator_that_the_data_owns_is_found_and_put_back(kind: int, place: str) -> None:
    generator, draw = own_generators()[kind]
    draw()
    put_back = random_state([PLACES[place](generator)])
    first = draw()
    put_back()
    assert draw() == first


@pytest.mark.parametrize("kind", range(len(KINDS)), ids=KINDS)
def test_the_control_does_not_put_back_what_it_was_not_given(kind: int) -> None:
    _, draw = own_generators()[kind]
    put_back = random_state([Augmented(own_generators()[kind][0])])
    first = draw()
    put_back()
    assert draw() != first


@pytest.mark.parametrize(
    "make",
    [
        lambda data, generator: DataLoader(data, batch_size=3, shuffle=True, generator=generator),
        lambda data, generator: DataLoader(data, sampler=RandomSampler(data, generator=generator)),
    ],
    ids=["loader", "sampler"],
)
def test_a_loader_with_a_generator_repeats_its_order(
    make: Callable[[TensorDataset, torch.Generator], DataLoader[Any]],
) -> None:
    loader = make(TensorDataset(torch.arange(20)), torch.Generator().manual_seed(0))

    def order() -> list[int]:
        return torch.cat([batch[0] for batch in loader]).tolist()

    put_back = random_state([loader])
    first, second = order(), order()
    assert first != second
    put_back()
    assert [order(), order()] == [first, second]


def test_putting_back_works_as_often_as_it_is_called() -> None:
    generator, draw = own_generators()[1]
    put_back = random_state([generator])
    firsts = []
    for _ in range(3):
        firsts.append((draw(), [each() for each in GLOBAL.values()]))
        put_back()
    assert firsts[0] == firsts[1] == firsts[2]


def test_taking_the_state_draws_nothing() -> None:
    generators = own_generators()
    before = fingerprint(*[generator for generator, _ in generators])
    random_state([generator for generator, _ in generators])
    assert fingerprint(*[generator for generator, _ in generators]) == before


class Raising:
    """Data that answers to nothing but its attributes."""

    def __init__(self, generator: object) -> None:
        self.generator = generator

    def __iter__(self) -> Iterator[object]:
        raise AssertionError("it was iterated")

    def __len__(self) -> int:
        raise AssertionError("it was measured")

    def __eq__(self, other: object) -> bool:
        raise AssertionError("it was compared")

    __hash__ = None  # type: ignore[assignment]  # As for any class that only compares.


def test_data_is_looked_at_and_never_asked() -> None:
    generator, draw = own_generators()[0]
    put_back = random_state([Raising(generator)])
    first = draw()
    put_back()
    assert draw() == first


@pytest.mark.parametrize(
    "source",
    [
        None,
        "text",
        5,
        range(10**9),
        [0] * 10**5,
        random.SystemRandom(),  # Has no state, and says so by an error.
        Node(random.SystemRandom()),
        nn.Linear(2, 2),
        torch.ones(3),
        np.ones(3),
        torch,
        Node(np),  # All of NumPy would be looked through.
        lambda: None,
        (number for number in range(3)),
        object(),
        Node,
        types.MappingProxyType({"a": 1}),
        deque([1]),
    ],
    ids=lambda source: type(source).__name__,
)
def test_anything_may_be_handed_over(source: object) -> None:
    before = fingerprint()
    put_back = random_state([source])
    for draw in GLOBAL.values():
        draw()
    put_back()
    assert fingerprint() == before


def test_a_generator_that_is_held_twice_is_put_back_once_more_to_no_harm() -> None:
    generator, draw = own_generators()[3]
    put_back = random_state([generator, [generator], Node(generator)])
    first = draw()
    put_back()
    assert draw() == first


def test_a_normal_number_that_waits_is_not_mistaken_for_one_that_was_handed_out() -> None:
    np.random.seed(0)
    np.random.standard_normal()  # A second one waits; handing it out changes nothing else.
    waiting = random_state()
    np.random.standard_normal()
    random_state()
    waiting()
    again = random_state()
    expected = np.random.standard_normal()
    again()
    assert np.random.standard_normal() == expected
