"""Batches that a loader's workers load ahead."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from autobatch import find_and_train
from autobatch.data.worker_memory import worker_memory_warning
from autobatch.training import resume as start

ROWS = TensorDataset(torch.randn(64, 256), torch.randint(0, 3, (64,)))  # 1032 bytes each.
FIRST = ROWS[:8]


def loader(
    workers: int = 1, prefetch_factor: int | None = None
) -> "DataLoader[tuple[torch.Tensor, ...]]":
    return DataLoader(ROWS, batch_size=16, num_workers=workers, prefetch_factor=prefetch_factor)


def test_what_workers_load_ahead_is_held_against_what_the_host_has() -> None:
    """USERS 1.5.4: prefetch times workers times the batch, pinned or not."""
    held = 1 * 6 * 16 * (256 * 4 + 8)
    assert worker_memory_warning(loader(prefetch_factor=6), FIRST, held) == ""
    warning = worker_memory_warning(loader(prefetch_factor=6), FIRST, held - 1)
    assert warning.startswith("1 worker of the loader may hold 6 batches of 16 examples ahead")
    assert "96.8 KiB in all, and the host has 96.7 KiB left" in warning
    assert worker_memory_warning(loader(), FIRST, held // 3) == ""
    assert worker_memory_warning(loader(), FIRST, held // 3 - 1)
    assert worker_memory_warning(
        DataLoader(ROWS, batch_size=16, num_workers=1, pin_memory=True), FIRST, 0
    )


@pytest.mark.parametrize(
    "batches", [loader(0), [FIRST], DataLoader(ROWS, batch_size=None, num_workers=1)]
)
def test_what_loads_nothing_ahead_crowds_nothing(batches: object) -> None:
    assert worker_memory_warning(batches, FIRST, 0) == ""


def test_training_warns_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """USERS 1.5.4."""
    monkeypatch.setattr(start, "host_memory", lambda: (2**30, 1000))
    with pytest.warns(UserWarning, match="1 worker of the loader may hold 2 batches") as caught:
        find_and_train(
            nn.Linear(256, 3), loader(1), 16, max_steps=1, memory_limit="1GiB", device="cpu",
            progress=False,
        )  # fmt: skip
    assert caught[0].filename == __file__
