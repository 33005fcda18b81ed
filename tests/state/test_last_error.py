"""The error that a notebook keeps, and what stays alive with it."""

import gc
import sys
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from autobatch import SearchOptions, check, find_and_train, find_batch_size, find_largest
from autobatch.events import ErrorForgotten, Event

ALIVE: list[weakref.ref[Tensor]] = []
KEPT: list[object] = []  # As IPython does: the traceback, elsewhere too.
FORGETS = SearchOptions(forget_errors=True)
MODEL = nn.Linear(4, 3)
ROWS = (torch.randn(64, 4), torch.randint(0, 3, (64,)))


def fail_holding(tensor: Tensor) -> None:
    held = {"activations": [tensor * 2]}
    ALIVE.append(weakref.ref(held["activations"][0]))
    raise torch.OutOfMemoryError("CUDA out of memory.")


def fail_again() -> None:
    large = torch.zeros(1000, 1000)
    ALIVE.append(weakref.ref(large))
    try:
        fail_holding(large[:10])
    except torch.OutOfMemoryError as error:
        raise RuntimeError("the layer failed") from error


NAMES = ("last_exc", "last_type", "last_value", "last_traceback")


def remember() -> None:
    """Do as IPython does: keep the traceback elsewhere too, and read every frame's variables."""
    try:
        fail_again()
    except RuntimeError as error:
        values = (error, type(error), error, error.__traceback__)
        vars(sys).update(zip(NAMES, values, strict=True))
        KEPT.append(error.__traceback__)
        for _ in [entry.f_locals for entry, _ in traceback.walk_tb(error.__traceback__)]:
            pass


@contextmanager
def a_notebook_after_an_error() -> Iterator[None]:
    """Not a fixture: pytest deletes ``sys.last_*`` before it calls a test."""
    ALIVE.clear()
    remember()
    gc.collect()
    assert all(tensor() is not None for tensor in ALIVE)
    try:
        yield
        assert KEPT, "it is still kept elsewhere"
    finally:
        KEPT.clear()
        for name in NAMES:
            vars(sys).pop(name, None)


def train(search: SearchOptions, observer: Callable[[Event], None]) -> None:
    find_and_train(MODEL, ROWS, 8, device="cpu", search=search, progress=observer)


def find(search: SearchOptions, observer: Callable[[Event], None]) -> None:
    find_batch_size(MODEL, ROWS, ceiling=8, device="cpu", search=search, progress=observer)


def try_one(search: SearchOptions, observer: Callable[[Event], None]) -> None:
    check(MODEL, ROWS, 8, device="cpu", search=search)
    observer(ErrorForgotten())  # ``check`` has no observer.


def largest(search: SearchOptions, observer: Callable[[Event], None]) -> None:
    find_largest(lambda _: None, ceiling=8, search=search, progress=observer)


@pytest.mark.parametrize("call", [train, find, try_one, largest])
def test_a_search_lets_go_of_a_stale_error_if_it_is_asked_to(
    call: Callable[[SearchOptions, Callable[[Event], None]], None],
) -> None:
    """USERS 1.1.8: by every entry point, wherever else the traceback is kept."""
    events: list[Event] = []
    with a_notebook_after_an_error():
        call(FORGETS, events.append)
        assert not hasattr(sys, "last_value")
        assert not hasattr(sys, "last_traceback")
        assert not any(tensor() is not None for tensor in ALIVE)
    assert sum(isinstance(event, ErrorForgotten) for event in events) == 1


def test_without_being_asked_a_search_leaves_it() -> None:
    events: list[Event] = []
    with a_notebook_after_an_error():
        find(SearchOptions(), events.append)
        assert isinstance(sys.last_value, RuntimeError)
        assert all(tensor() is not None for tensor in ALIVE)
    assert not any(isinstance(event, ErrorForgotten) for event in events)


def test_without_an_error_no_event_is_sent() -> None:
    events: list[Event] = []
    find(FORGETS, events.append)
    assert not any(isinstance(event, ErrorForgotten) for event in events)


def test_a_frame_that_still_runs_keeps_its_variables() -> None:
    running = torch.zeros(3)
    with a_notebook_after_an_error():
        try:
            raise ValueError
        except ValueError as error:
            vars(sys)["last_value"] = error
        find(FORGETS, lambda _: None)
        alive = weakref.ref(running)
        del running
        assert alive() is None, "no copy of the frame's variables stays behind"
