"""The search for the largest size as others do it, where they are installed."""

import importlib
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from autobatch.compat.torchvision import import_torchvision
from benchmarks.engine_peers import quiet_trainer, silence


@dataclass(frozen=True, slots=True)
class Task:
    """What a search is given.

    Attributes:
        attempt: Runs a window with micro-batches of a size, or raises ``torch.OutOfMemoryError``.
        ceiling: The largest size of interest.
        model: What the window trains, for those that save it and put it back.
        optimizer: Its optimizer.
    """

    attempt: Callable[[int], None]
    ceiling: int
    model: nn.Module
    optimizer: Optimizer


Search = Callable[[Task], int]


def installed() -> list[str]:
    """Import what can be measured here, for an import is no part of a search; return the names."""
    found = [name for name, (package, _) in PEERS.items() if _is_installed(package)]
    with suppress(ImportError):
        import_torchvision()  # Lightning imports it; beside a CPU build it needs our detour.
    with silence():
        return [name for name in found if _imports(PEERS[name][0])]


def _imports(package: str) -> bool:
    """Whether it is not only there, but whole."""
    try:
        importlib.import_module(package)
    except ImportError:
        return False
    return True


def largest_by_doubling(fits: Callable[[int], bool], ceiling: int) -> int:
    """The slow, obvious way: 2, 4, 8 and so on until one fails, then bisection.

    It begins at 2 and comes to 1 last, for BatchNorm may refuse a single example.
    """
    good, bad, size = 0, ceiling + 1, min(2, ceiling)
    while bad - good > 1:
        if fits(size):
            good = size
        else:
            bad = size
        size = min(2 * good, ceiling) if bad > ceiling else (good + bad) // 2
    return good


def doubling(task: Task) -> int:
    """Double, then bisect."""

    def fits(size: int) -> bool:
        try:
            task.attempt(size)
        except torch.OutOfMemoryError:
            return False
        return True

    return largest_by_doubling(fits, task.ceiling)


def accelerate(task: Task) -> int:
    """From the ceiling down, a tenth less at a time."""
    from accelerate.utils import find_executable_batch_size

    def train(batch_size: int) -> int:
        task.attempt(batch_size)
        return batch_size

    found: int = find_executable_batch_size(train, starting_batch_size=task.ceiling)()
    return found


def toma(task: Task) -> int:
    """From the ceiling down, by halves."""
    from toma import simple  # Without the cache, which would know sizes of earlier cases.

    def train(batch_size: int) -> int:
        task.attempt(batch_size)
        return batch_size

    found: int = simple.batch(train, task.ceiling)
    return found


def torch_max_mem(task: Task) -> int:
    """From the ceiling down, by halves. Its default, multiples of 32, would find less."""
    from torch_max_mem import maximize_memory_utilization

    @maximize_memory_utilization(q=1)  # type: ignore[untyped-decorator]  # Any to mypy: optional.
    def train(batch_size: int) -> int:
        task.attempt(batch_size)
        return batch_size

    found: int = train(batch_size=task.ceiling)
    return found


def lightning(mode: str) -> Search:
    """Lightning's batch size finder.

    Its step is ours, by manual optimization, and one of them makes a trial. All in its favour:
    three is its default; no margin is taken off; the data is longer than the ceiling, for else
    its binary search may not end.

    Args:
        mode: ``"power"`` or ``"binsearch"``.
    """

    def search(task: Task) -> int:
        from lightning.pytorch import LightningModule, Trainer
        from lightning.pytorch.tuner import Tuner

        class Module(LightningModule):  # type: ignore[misc]  # Any to mypy: it is optional.
            def __init__(self) -> None:
                super().__init__()
                self.automatic_optimization = False
                self.batch_size = 2
                self.model = task.model

            def training_step(self, batch: torch.Tensor) -> None:
                task.attempt(len(batch))

            def configure_optimizers(self) -> Optimizer:
                return task.optimizer

            def train_dataloader(self) -> DataLoader[int]:
                """Return one batch of what only has a length; the attempt has the data."""
                numbers, batch = range(task.ceiling + 1), range(self.batch_size)
                return DataLoader(numbers, batch_size=len(batch), sampler=batch)  # type: ignore[arg-type]  # A range is a sequence of int.

        device = next(task.model.parameters()).device
        with silence(), tempfile.TemporaryDirectory() as folder, _back_on(device, task):
            trainer = Trainer(**quiet_trainer(device), default_root_dir=folder)
            found: int | None = Tuner(trainer).scale_batch_size(
                Module(), mode=mode, steps_per_trial=1, max_val=task.ceiling, margin=0.0
            )
        return found or 0

    return search


@contextmanager
def _back_on(device: torch.device, task: Task) -> Iterator[None]:
    """Bring model and optimizer back from the CPU, where Lightning leaves them."""
    try:
        yield
    finally:
        if next(task.model.parameters()).device != device:
            task.model.to(device)
            task.optimizer.load_state_dict(task.optimizer.state_dict())  # It follows the model.


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package.partition(".")[0]) is not None


PEERS: Final[dict[str, tuple[str, Search]]] = {
    "doubling": ("torch", doubling),
    "accelerate": ("accelerate", accelerate),
    "lightning power": ("lightning.pytorch", lightning("power")),
    "lightning binsearch": ("lightning.pytorch", lightning("binsearch")),
    "toma": ("toma", toma),
    "torch-max-mem": ("torch_max_mem", torch_max_mem),
}
"""By name: the package that is imported, and the search."""
