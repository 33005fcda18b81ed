"""The fastest size, not only the largest: what is timed, how, and what is chosen."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_results import SEARCH
from torch import Tensor, nn

import autobatch.tuner
from autobatch import TrainingResult, find_and_train
from autobatch.devices.base import MemoryDevice
from autobatch.events import Event, SizesTimed, TrainingStarted
from autobatch.results.plan import useful_sizes
from autobatch.results.search import Speed
from autobatch.search.throughput import sizes_to_time, speeds


@given(desired=st.integers(1, 10**5), data=st.data())
def test_a_few_sizes_are_timed_the_largest_among_them(desired: int, data: st.DataObject) -> None:
    candidates = useful_sizes(desired)
    largest = data.draw(st.sampled_from(candidates))
    timed = sizes_to_time(candidates, largest)
    assert timed == tuple(sorted(set(timed)))
    assert set(timed) <= set(candidates)
    assert timed[-1] == largest
    assert 1 <= len(timed) <= 6


def test_the_sizes_for_256_are_these() -> None:
    assert sizes_to_time(useful_sizes(256), 86) == (10, 20, 32, 43, 64, 86)
    assert sizes_to_time((1,), 1) == (1,)


@dataclass
class Track:
    """A device and a step whose clock is set by ``took``: sizes to seconds, window by window."""

    took: Callable[[int, int], float]
    now: float = 0.0
    ran: list[int] = field(default_factory=list)
    inside: bool = False

    def prepare(self, sizes: Sequence[int], _mark: Callable[[], None]) -> Callable[[], None]:
        def window() -> None:
            assert self.inside, "training runs inside the limit"
            self.ran.append(sizes[0])
            self.now += self.took(sizes[0], self.ran.count(sizes[0]) - 1)

        return window

    @contextmanager
    def limited(self) -> Iterator[None]:
        self.inside = True
        yield
        self.inside = False

    def verify(self, size: int, peak_bytes: int) -> str:  # noqa: ARG002  # The protocol's.
        return ""

    def clear(self) -> None: ...

    def release_cached(self) -> None: ...

    def synchronize(self) -> None: ...


def timed(track: Track, monkeypatch: pytest.MonkeyPatch) -> tuple[Speed, ...]:
    monkeypatch.setattr(time, "perf_counter", lambda: track.now)
    windows = {8: (8,) * 8, 16: (16,) * 4, 32: (32, 32)}
    device: Any = track
    return speeds(track, device, windows, track.limited)


def test_the_median_of_whole_windows_counts_and_the_first_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def took(size: int, place: int) -> float:
        return {0: 100.0, 2: 50.0}.get(place, 64 / size)  # A slow start, and an accident.

    track = Track(took)
    found = timed(track, monkeypatch)
    assert [(s.size, s.examples_per_second) for s in found] == [(8, 8.0), (16, 16.0), (32, 32.0)]
    assert {s.windows for s in found} == {3}, "5 seconds are over after three rounds"
    assert track.ran == [8, 16, 32] * 4, "in turns"


def test_quick_windows_are_timed_seven_times(monkeypatch: pytest.MonkeyPatch) -> None:
    found = timed(Track(lambda *_: 0.001), monkeypatch)
    assert {s.windows for s in found} == {7}


def test_a_size_that_runs_out_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def took(size: int, _: int) -> float:
        if size == 16:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return 1.0

    assert [s.size for s in timed(Track(took), monkeypatch)] == [8, 32]


def test_a_size_that_runs_out_later_is_left_out_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def took(size: int, place: int) -> float:
        if size == 16 and place == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return 1.0

    assert [s.size for s in timed(Track(took), monkeypatch)] == [8, 32]


def test_another_error_passes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    def took(*_: int) -> float:
        raise IndexError("mine")

    with pytest.raises(IndexError, match="mine"):
        timed(Track(took), monkeypatch)


@pytest.mark.parametrize(
    ("rates", "fastest"),
    [
        ({8: 90, 16: 98, 32: 100}, 16),
        ({8: 90, 16: 97.9, 32: 100}, 32),
        ({8: 100, 16: 100, 32: 100}, 8),
        ({8: 100, 16: 50, 32: 20}, 8),
        ({32: 1}, 32),
    ],
)
def test_the_smallest_within_two_per_cent_is_the_fastest(
    rates: dict[int, float], fastest: int
) -> None:
    found = tuple(Speed(size=n, examples_per_second=r, windows=3) for n, r in rates.items())
    assert replace(SEARCH, speeds=found).fastest == fastest
    assert replace(SEARCH, speeds=()).fastest == SEARCH.size


def data(examples: int = 64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(examples, 4), torch.randint(0, 3, (examples,))


LONG = 40  # Epochs: longer than timing six sizes takes.


def test_training_prefers_the_fastest_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[dict[int, Sequence[int]]] = []

    def measured(
        _program: object, _device: MemoryDevice, windows: dict[int, Sequence[int]], _: object
    ) -> tuple[Speed, ...]:
        timed.append(windows)
        rates = {size: 400.0 if size == 16 else 100.0 for size in windows}
        return tuple(Speed(size=n, examples_per_second=r, windows=3) for n, r in rates.items())

    monkeypatch.setattr(autobatch.tuner, "speeds", measured)
    events: list[Event] = []
    result = find_and_train(
        nn.Linear(4, 3), data(), 64, prefer="fastest", epochs=LONG, progress=events.append
    )
    assert timed == [{n: (n,) * (64 // n) if 64 % n == 0 else timed[0][n] for n in timed[0]}]
    assert all(sum(sizes) == 64 for sizes in timed[0].values()), "whole logical batches"
    assert (result.search.size, result.search.fastest) == (64, 16)
    assert result.plan.micro_batch_sizes == (16,) * 4
    assert any("faster than the tolerable batch of 64: 400 exam" in n for n in result.notes)
    started = [event.plan.tolerable for event in events if isinstance(event, TrainingStarted)]
    assert started == [16]
    assert any(isinstance(event, SizesTimed) for event in events)


def test_a_training_shorter_than_its_timing_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autobatch.tuner, "speeds", None)  # Must not be called.
    events: list[Event] = []
    result = find_and_train(
        nn.Linear(4, 3), data(), 64, prefer="fastest", max_steps=20, epochs=LONG,
        progress=events.append,
    )  # fmt: skip
    assert result.search.speeds == ()
    assert result.plan.micro_batch_sizes == (64,)
    note = (
        'prefer="fastest" timed nothing: timing takes 20 steps or more, and the training takes 20'
    )
    assert note in result.notes
    assert [e.search.notes for e in events if isinstance(e, SizesTimed)] == [(note,)]


def test_the_fastest_is_found_without_a_trace() -> None:
    """The same losses as without the timing, for the same micro-batches."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    start = {name: value.clone() for name, value in model.state_dict().items()}
    fast = find_and_train(model, data(), 16, prefer="fastest", epochs=8, seed=1, progress=False)
    model.load_state_dict(start)
    plain = find_and_train(model, data(), 16, epochs=8, seed=1, progress=False)
    assert fast.search.speeds
    assert plain.search.speeds == ()
    if fast.plan == plain.plan:
        assert fast.losses == plain.losses
    assert fast.steps == plain.steps == 32


def test_a_resumed_training_keeps_its_size_and_times_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def measured(
        _program: object, _device: MemoryDevice, windows: dict[int, Sequence[int]], _: object
    ) -> tuple[Speed, ...]:
        rates = {size: 400.0 if size == 16 else 100.0 for size in windows}
        return tuple(Speed(size=n, examples_per_second=r, windows=3) for n, r in rates.items())

    def trained(epochs: int) -> TrainingResult:
        torch.manual_seed(0)
        return find_and_train(
            nn.Linear(4, 3), data(), desired=64, prefer="fastest", epochs=epochs, seed=1,
            checkpoint_dir=tmp_path, progress=False,
        )  # fmt: skip

    monkeypatch.setattr(autobatch.tuner, "speeds", measured)
    assert trained(LONG).plan.micro_batch_sizes == (16,) * 4
    monkeypatch.setattr(autobatch.tuner, "speeds", None)  # Must not be called.
    resumed = trained(LONG + 1)
    assert resumed.plan.micro_batch_sizes == (16,) * 4
    assert not any("preferred" in note for note in resumed.notes)


def test_what_is_to_be_preferred_is_checked() -> None:
    with pytest.raises(ValueError, match=r"prefer must be one of .* got 'slowest'"):
        find_and_train(nn.Linear(4, 3), data(), 16, prefer="slowest")  # type: ignore[arg-type]


def test_waiting_for_data_is_counted_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    class Slow(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            nonlocal now
            now += 1.0
            return torch.ones(4), torch.tensor(index % 3)

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    result = find_and_train(nn.Linear(4, 3), Slow(), desired=4, progress=False, epochs=2)
    assert result.loading_seconds == 12.0, "the first batch was read for the search"
    assert any("waited for data in 100% of the time" in note for note in result.notes)
    quick = find_and_train(nn.Linear(4, 3), data(), desired=16, progress=False)
    assert not any("waited" in note for note in quick.notes)
