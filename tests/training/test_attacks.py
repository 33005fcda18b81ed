"""Models, data and threads that try to break what a search promises: it ran, and left no trace."""

import gc
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from states import fingerprint, identities
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from autobatch import DoesNotFitError, check, find_and_train, find_batch_size

FIT = 20  # Examples.


def rows(examples: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(examples, 4, generator=generator), torch.arange(examples) % 3


def exhausted() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")


class Model(nn.Module):
    """Does something at every forward pass, with itself and how many examples come."""

    def __init__(self, act: Callable[["Model", int], object]) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.seen: list[Any] = [0]
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        self.act(self, len(x))
        outputs: Tensor = self.head(x)
        return outputs


def fails_plainly(_: Model, size: int) -> None:
    if size > FIT:
        raise exhausted()


def fails_while_another_error_is_handled(_: Model, size: int) -> None:
    try:
        raise KeyError("the user's own")
    except KeyError:
        if size > FIT:
            raise exhausted() from None


def fails_in_the_handling_of_itself(_: Model, size: int) -> None:
    try:
        if size > FIT:
            raise exhausted()
    except torch.OutOfMemoryError:
        raise exhausted() from ValueError("a chain")


def wraps(_: Model, size: int) -> None:
    if size > FIT:
        raise RuntimeError("the step failed") from exhausted()


def fails_in_a_finally(_: Model, size: int) -> None:
    try:
        torch.ones(3)
    finally:
        if size > FIT:
            raise exhausted()


def fails_with_itself_in_a_cycle(model: Model, size: int) -> None:
    if size > FIT:
        error = exhausted()
        error.model = model  # type: ignore[attr-defined]  # A cycle with the frame.
        raise error


def fails_only_the_second_time(model: Model, size: int) -> None:
    """The second micro-batch of a window of this size fails."""
    model.seen.append(size)
    if size > FIT and model.seen[-2] == size:
        raise exhausted()


FAILURES = [
    fails_plainly,
    fails_while_another_error_is_handled,
    fails_in_the_handling_of_itself,
    wraps,
    fails_in_a_finally,
    fails_with_itself_in_a_cycle,
    fails_only_the_second_time,
]


@pytest.mark.parametrize("act", FAILURES, ids=lambda act: act.__name__)
def test_however_it_fails_what_is_returned_ran_and_nothing_stays(
    act: Callable[[Model, int], object],
) -> None:
    model = Model(act)
    optimizer = torch.optim.Adam(model.parameters())
    before, objects = fingerprint(model, optimizer), identities(model, optimizer)
    found = find_batch_size(model, rows(), optimizer=optimizer, device="cpu")
    assert found.size == FIT
    assert {trial.size: trial.fits for trial in found.trials}[FIT]
    assert fingerprint(model, optimizer) == before
    assert identities(model, optimizer) == objects
    assert not hasattr(sys, "last_value")


def adds_a_parameter(model: Model, size: int) -> None:
    setattr(model, f"late_{size}", nn.Parameter(torch.ones(2)))


def adds_a_hook(model: Model, _: int) -> None:
    model.head.register_forward_hook(lambda *_: None)


def replaces_a_layer(model: Model, _: int) -> None:
    model.head = nn.Linear(4, 3)


def freezes(model: Model, _: int) -> None:
    model.head.bias.requires_grad_(False)


def grows_a_list(model: Model, size: int) -> None:
    model.seen += [{"size": size, "tensors": [torch.ones(size)]}]
    model.seen[0] += 1


def leaves_evaluation_mode(model: Model, _: int) -> None:
    model.head.eval()


def seeds(_: Model, size: int) -> None:
    torch.manual_seed(size)


def turns_gradients_of_others_off(_: Model, size: int) -> None:
    if size > FIT:
        torch.set_grad_enabled(False)
        raise exhausted()


def changes_the_default_dtype(_: Model, size: int) -> None:
    if size > 2:
        torch.set_default_dtype(torch.float64)


def asks_for_determinism(_: Model, __: int) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)


def tunes_cudnn(_: Model, __: int) -> None:
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.deterministic = True


def takes_a_thread(_: Model, __: int) -> None:
    torch.set_num_threads(1 if torch.get_num_threads() > 1 else 2)


EFFECTS = [
    adds_a_parameter,
    adds_a_hook,
    freezes,
    grows_a_list,
    leaves_evaluation_mode,
    seeds,
    turns_gradients_of_others_off,
    changes_the_default_dtype,
    asks_for_determinism,
    tunes_cudnn,
    takes_a_thread,
]


def settings() -> tuple[object, ...]:
    cudnn = torch.backends.cudnn
    return (
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        (cudnn.enabled, cudnn.benchmark, cudnn.deterministic),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
    )


@pytest.fixture
def _as_it_was() -> Iterator[None]:
    """Of settings that a search does not put back, no other test is to learn."""
    dtype, deterministic, warn_only, cudnn, threads, grad = settings()
    yield
    torch.set_default_dtype(dtype)  # type: ignore[arg-type]
    torch.use_deterministic_algorithms(bool(deterministic), warn_only=bool(warn_only))
    torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, _ = cudnn  # type: ignore[misc]
    torch.backends.cudnn.deterministic = cudnn[2]  # type: ignore[index]
    torch.set_num_threads(threads)  # type: ignore[arg-type]
    torch.set_grad_enabled(bool(grad))


@pytest.mark.usefixtures("_as_it_was")
@pytest.mark.parametrize("act", EFFECTS, ids=lambda act: act.__name__)
def test_what_a_forward_pass_does_to_its_model_and_to_torch_is_undone(
    act: Callable[[Model, int], object],
) -> None:
    model = Model(act)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, lr=0.1)
    before, objects = fingerprint(model, optimizer), identities(model, optimizer)
    hooks, was, seen = dict(model.head._forward_hooks), settings(), list(model.seen)
    check(model, rows(), FIT + 1, optimizer=optimizer, device="cpu")
    assert settings() == was
    assert fingerprint(model, optimizer) == before
    assert identities(model, optimizer) == objects
    assert dict(model.head._forward_hooks) == hooks
    assert model.seen == seen


def test_a_model_that_replaces_what_is_trained_is_refused_and_has_its_own_layers_back() -> None:
    model = Model(replaces_a_layer)
    before, objects = fingerprint(model), identities(model)
    with pytest.raises(ValueError, match="no parameter received a gradient"):
        check(model, rows(), 4, device="cpu")
    assert fingerprint(model) == before
    assert identities(model) == objects


def test_nothing_of_ten_failures_in_a_row_can_be_reached() -> None:
    held: list[weakref.ref[Tensor]] = []

    def keeps(model: Model, size: int) -> None:
        activation = torch.ones(size, 1000)
        held.append(weakref.ref(activation))
        model.seen.append(activation)
        if size > 2:
            raise exhausted()

    model = Model(keeps)
    for size in range(3, 13):
        assert not check(model, rows(), size, device="cpu").fits
    gc.collect()
    assert [one for one in held if one() is not None] == []
    assert model.seen == [0]


def test_two_threads_search_at_a_time_each_its_own_model() -> None:
    import torch._dynamo.eval_frame as frames  # From here on, compiled functions are a concern.

    found, stance = dict[int, int](), frames._stance.stance
    ready = threading.Barrier(3)

    def search(place: int) -> None:
        width = 256 * (place + 1)
        model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 2))
        data = torch.zeros(400, 64), torch.zeros(400, dtype=torch.long)
        ready.wait()
        found[place] = find_batch_size(model, data, memory_limit="4MiB", device="cpu").size

    def alone(place: int) -> int:
        width = 256 * (place + 1)
        model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 2))
        data = torch.zeros(400, 64), torch.zeros(400, dtype=torch.long)
        return find_batch_size(model, data, memory_limit="4MiB", device="cpu").size

    threads = [threading.Thread(target=search, args=(place,)) for place in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert frames._stance.stance == stance, "compiled functions would run eagerly for ever"
    assert found == {place: alone(place) for place in range(3)}


class Rows(Dataset[tuple[Tensor, int]]):
    """Draws at each access, as an augmentation does."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        return torch.randn(4) + place, place % 3


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_hands_out_the_same_after_a_search_as_without(workers: int) -> None:
    def batches(*, searched: bool) -> list[Tensor]:
        torch.manual_seed(3)
        loader = DataLoader(Rows(), batch_size=8, shuffle=True, num_workers=workers)
        model = nn.Linear(4, 3)
        torch.manual_seed(4)
        if searched:
            find_batch_size(model, loader, device="cpu", ceiling=16)
        return [x for x, _ in loader]

    pairs = zip(batches(searched=True), batches(searched=False), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_a_generator_as_data_is_read_once_and_to_its_end() -> None:
    drawn: list[int] = []

    def stream() -> Iterator[tuple[Tensor, Tensor]]:
        x, y = rows(40)
        for place in range(0, 40, 8):
            drawn.append(place)
            yield x[place : place + 8], y[place : place + 8]

    result = find_and_train(Model(fails_plainly), stream(), 40, device="cpu", progress=False)
    assert drawn == [0, 8, 16, 24, 32]
    assert (result.examples, result.steps) == (40, 1)
    assert result.plan.tolerable <= FIT


def test_a_generator_that_fails_in_the_middle_passes_its_own_error_through() -> None:
    def stream() -> Iterator[tuple[Tensor, Tensor]]:
        yield rows(8)
        raise LookupError("no more rows")

    model = Model(fails_plainly)
    before = fingerprint(model)
    with pytest.raises(LookupError, match="no more rows"):
        find_and_train(model, stream(), 40, device="cpu", progress=False)
    assert fingerprint(model) == before


def test_a_limit_that_a_model_eats_up_is_never_returned() -> None:
    """Each pass keeps a little more, as a cache without an end; what is returned ran yet."""

    def hoards(model: Model, _: int) -> None:
        model.seen.append(torch.ones(2000))

    model = Model(hoards)
    try:
        found = find_batch_size(model, rows(), memory_limit="100KB", device="cpu")
    except DoesNotFitError:
        return
    last = {trial.size: trial.fits for trial in found.trials}
    assert last[found.size]
    assert model.seen == [0]
