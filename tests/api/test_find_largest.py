"""The largest size of any function of a size."""

import gc
import random
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from black_box import RAN, BlackBox, hold
from states import fingerprint
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import StepLR

from autobatch import DoesNotFitError, SearchOptions, Verdict, find_largest

MIB = 2**20


@pytest.fixture(autouse=True)
def _forget_what_ran() -> None:
    RAN.clear()


class Duel:
    """A generator and a discriminator with an optimizer each, and a memory of what was made."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.maker = nn.Sequential(
            nn.Linear(8, 256), nn.ReLU(), nn.Dropout(0.1), nn.Linear(256, 64)
        )
        self.judge = nn.Sequential(nn.Linear(64, 256), nn.BatchNorm1d(256), nn.Linear(256, 1))
        self.optimizers = (Adam(self.maker.parameters()), SGD(self.judge.parameters(), lr=0.1))
        self.schedule = StepLR(self.optimizers[0], step_size=1)
        self.made: deque[Tensor] = deque(maxlen=3)
        self.counts = {"steps": 0}
        self.noise = torch.Generator().manual_seed(1)

    @property
    def state(self) -> list[object]:
        held = (self.made, self.counts, self.noise)
        return [self.maker, self.judge, *self.optimizers, self.schedule, *held]

    def step(self, size: int) -> Tensor:
        for optimizer, sign in zip(self.optimizers, (1, -1), strict=True):
            made: Tensor = self.maker(torch.randn(size, 8, generator=self.noise))
            optimizer.zero_grad()
            (sign * self.judge(made).mean()).backward()
            optimizer.step()
        self.schedule.step()
        self.made.append(made.detach()[:1].clone())
        self.counts["steps"] += 1
        random.random()
        return made


def test_two_optimizers_fit_to_the_last_example_and_are_as_they_were() -> None:
    duel = Duel()
    duel.step(4)
    before = fingerprint(*duel.state)
    found = find_largest(duel.step, ceiling=5000, state=duel.state, memory_limit=4 * MIB)
    assert fingerprint(*duel.state) == before
    assert 0 < found.size < 5000
    assert found.limited_by == "memory"
    above = find_largest(
        duel.step,
        ceiling=found.size + 1,
        state=duel.state,
        memory_limit=4 * MIB,
        search=SearchOptions(confirm="failed"),
    )
    assert above.size == found.size
    assert above.upper.reason == "ran out"
    assert duel.counts == {"steps": 1}


class Slotted:
    __slots__ = ("model", "noise")

    def __init__(self, model: nn.Module) -> None:
        self.model, self.noise = model, torch.Generator()


class OwnDict(dict[str, object]):
    """Which may have rules of its own."""


@pytest.mark.parametrize(
    "named",
    [
        lambda duel: duel,
        lambda duel: [duel],
        lambda duel: (part for part in duel.state),
        lambda duel: dict(enumerate(duel.state)),
        lambda duel: [[duel.state[:3]], {"rest": duel.state[3:]}],
    ],
    ids=["an object", "in a list", "a generator", "a mapping", "nested"],
)
def test_state_is_put_back_however_it_is_named(named: Callable[[Duel], object]) -> None:
    duel = Duel()
    duel.step(4)
    before = fingerprint(*duel.state)
    find_largest(duel.step, ceiling=8, state=named(duel))
    assert fingerprint(*duel.state) == before


def test_one_optimizer_need_not_be_in_a_list() -> None:
    duel = Duel()
    before = fingerprint(duel.optimizers[0])
    find_largest(duel.step, ceiling=8, state=duel.optimizers[0])
    assert fingerprint(duel.optimizers[0]) == before


def test_what_is_not_named_is_not_put_back() -> None:
    """The control: the same search without the state."""
    duel = Duel()
    before = fingerprint(*duel.state)
    find_largest(duel.step, ceiling=8)
    assert fingerprint(*duel.state) != before


@pytest.mark.parametrize(("limit", "ceiling"), [(1, 64), (37, 64), (100, 64), (129, 4096)])
def test_it_grows_as_well_as_shrinks(limit: int, ceiling: int) -> None:
    found = find_largest(lambda size: hold(size, limit), ceiling=ceiling)
    assert found.size == min(limit, ceiling)
    assert RAN[-1] == found.size, "what is returned did not run last"


def test_generation_without_gradients_and_in_steps_of_eight() -> None:
    model = BlackBox(77).eval()

    @torch.no_grad()
    def generate(size: int) -> Tensor:
        output: Tensor = model(torch.zeros(size, 1, 5, 5))
        return output

    found = find_largest(generate, ceiling=1000, state=[model], search=SearchOptions(multiple_of=8))
    assert found.size == 72
    assert all(size % 8 == 0 for size in RAN)


def test_nothing_of_a_failed_run_stays_alive() -> None:
    kept: list[Any] = []

    class Marked:
        pass

    def run(size: int) -> None:
        marked = Marked()
        kept.append(weakref.ref(marked))
        hold(size, 5)
        del marked

    find_largest(run, ceiling=100)
    gc.collect()
    assert len(kept) > 3
    assert not any(reference() for reference in kept)


def test_even_the_smallest_may_be_too_much() -> None:
    with pytest.raises(DoesNotFitError, match="a batch of 1 does not fit"):
        find_largest(lambda size: hold(size, 0), ceiling=10)


@pytest.mark.parametrize("error", [IndexError("mine"), KeyboardInterrupt()])
def test_other_errors_pass_through_and_the_state_is_put_back(error: BaseException) -> None:
    duel = Duel()
    before = fingerprint(*duel.state)

    def run(size: int) -> None:
        duel.step(size)
        if size > 2:
            raise error

    with pytest.raises(type(error)):
        find_largest(run, ceiling=100, state=duel.state)
    assert fingerprint(*duel.state) == before


def test_an_index_limit_is_no_memory() -> None:
    def run(size: int) -> None:
        if size > 20:
            raise RuntimeError("integer out of range: canUse32BitIndexMath")

    found = find_largest(run, ceiling=100)
    assert (found.size, found.limited_by) == (20, "kernel")
    assert {trial.failure for trial in found.trials} == {None, Verdict.TOO_LARGE}


def test_one_module_need_not_be_in_a_list() -> None:
    model = nn.Linear(3, 3)
    before = fingerprint(model)

    def run(size: int) -> None:
        model(torch.ones(size, 3)).sum().backward()
        with torch.no_grad():
            model.weight.add_(1)

    assert find_largest(run, ceiling=3, state=model).size == 3
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"run": 3}, TypeError, "run must be callable with a size, got 3"),
        ({"ceiling": 0}, ValueError, "ceiling must be at least 1, got 0"),
        ({"state": [3]}, TypeError, "state must hold the objects that run changes: .*; got 3"),
        ({"state": ["model"]}, TypeError, "got 'model'"),
        ({"state": 3}, TypeError, "state must hold the objects that run changes: .*; got 3"),
        ({"state": None}, TypeError, "got None"),
        ({"state": [Slotted(nn.Linear(1, 1))]}, TypeError, "state must hold .*Slotted"),
        ({"state": [OwnDict()]}, TypeError, "got {}"),
        ({"search": {"confirm": "failed"}}, TypeError, r"search must be SearchOptions\(...\), got"),
        ({"memory_limit": "much"}, ValueError, "memory_limit cannot be read from 'much'"),
        ({"device": "cudo"}, ValueError, "device cannot be read from 'cudo'"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(
    arguments: dict[str, Any], kind: type[Exception], words: str
) -> None:
    given: dict[str, Any] = {"run": lambda size: hold(size, 9), "ceiling": 4} | arguments
    with pytest.raises(kind, match=words):
        find_largest(given.pop("run"), **given)
    assert RAN == []
