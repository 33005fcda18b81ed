"""What the allocator held when memory ran out in training, written for people."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_oom_retry import Flaky, adam, windows

from autobatch import Accumulator, find_and_train, find_batch_size
from autobatch.devices.memory_snapshot import write_snapshot


@pytest.fixture
def dumped(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a GPU in use is asked to write."""
    names: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", names.append)
    return names


def test_a_window_that_memory_ends_is_written_and_a_trial_is_not(
    dumped: list[str], tmp_path: Path
) -> None:
    """USERS 4.3: the search's trials are there to run out."""
    model = Flaky(above=3)
    folder = tmp_path / "new" / "snapshots"
    found = find_batch_size(model, windows()[0], ceiling=10, device="cpu")
    assert (found.size, dumped) == (3, [])
    accumulator = Accumulator(model, adam(model), micro_batch=3, snapshot_on_oom=folder)
    accumulator.step(windows()[0])
    assert dumped == []
    accumulator.micro_batch = 5
    accumulator.step(windows()[1])
    assert dumped
    assert set(dumped) == {str(folder / "out-of-memory-step-2.pickle")}
    assert folder.is_dir()


def test_a_training_writes_too_and_whoever_did_not_ask_gets_none(
    dumped: list[str], tmp_path: Path
) -> None:
    """USERS 4.3."""

    def trained(**options: object) -> None:
        model = Flaky()

        def observe(event: object) -> None:
            if type(event).__name__ == "TrainingStarted":
                model.above = 3

        find_and_train(model, windows(), 10, device="cpu", progress=observe, **options)  # type: ignore[arg-type]

    trained()
    assert dumped == []
    trained(snapshot_on_oom=str(tmp_path))
    assert set(dumped) == {str(tmp_path / "out-of-memory-step-1.pickle")}


def no_space(_: str) -> None:
    raise OSError(28, "No space left on device")


def gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cuda.memory, "_dump_snapshot")


def full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", no_space)


@pytest.mark.usefixtures("dumped")
@pytest.mark.parametrize("broken", [gone, full])
def test_training_does_not_end_where_none_can_be_written(
    broken: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken(monkeypatch)
    with pytest.warns(UserWarning, match="no snapshot was written to .*step-7.pickle"):
        write_snapshot(tmp_path, 7)


def test_without_a_gpu_nothing_is_written(tmp_path: Path) -> None:
    if torch.cuda.is_initialized():
        pytest.skip("a GPU is in use")
    write_snapshot(tmp_path / "none", 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("folder", "error", "match"),
    [(7, TypeError, "snapshot_on_oom must be a folder's path"), (__file__, ValueError, "a file")],
)
def test_what_is_no_folder_is_refused(folder: object, error: type[Exception], match: str) -> None:
    model = Flaky()
    with pytest.raises(error, match=match):
        Accumulator(model, adam(model), snapshot_on_oom=folder)  # type: ignore[arg-type]
