"""A window of micro-batches by accelerate and by Lightning, where they are installed."""

import contextlib
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from autobatch.compat.torchvision import import_torchvision

Pair = tuple[Tensor, Tensor]
Window = Callable[[], Iterable[Pair]]
"""Takes one optimizer step; ``Fit.drive`` trains on the micro-batches that it yields."""

ACCELERATE: Final = "accelerate"
LIGHTNING: Final = "lightning"
ALL: Final = (ACCELERATE, LIGHTNING)
NOTHING: Final[tuple[Pair, ...]] = ()
LEARNING_RATE: Final = 0.01


def installed() -> list[str]:
    """Return the names of the installed libraries."""
    return [name for name in ALL if importlib.util.find_spec(name)]


def accelerate_window(
    model: nn.Module, micro_batches: Sequence[Pair], device: torch.device
) -> Window:
    """Return a window by accelerate's documented pattern, without its loader, in its favour."""
    from accelerate import Accelerator

    accelerator = Accelerator(
        cpu=device.type == "cpu",
        device_placement=False,  # Else accelerate moves the model to the first GPU.
        gradient_accumulation_steps=len(micro_batches),
    )
    model, optimizer = accelerator.prepare(model, SGD(model.parameters(), lr=LEARNING_RATE))

    def window() -> Iterable[Pair]:
        total = torch.zeros((), device=device)
        for x, y in micro_batches:
            with accelerator.accumulate(model):
                outputs = model(x.to(device, non_blocking=True))
                loss = F.cross_entropy(outputs, y.to(device, non_blocking=True))
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            total += loss.detach()
        total.item()
        return NOTHING

    return window


class Fit:
    """One ``Trainer.fit`` of Lightning, between whose batches the other engines are timed.

    Lightning requests batches, so nobody can call it for a single step. Lightning requests the next
    batch only after it has finished the last one, including the optimizer step. The whole
    measurement therefore is the iterator that Lightning trains from: while Lightning waits for a
    batch, other engines are timed. A second thread would bring a second pool of OpenMP threads.

    Args:
        model: A model on ``device``.
        micro_batches: The micro-batches of one window.
        device: The CPU or a GPU.
    """

    def __init__(
        self, model: nn.Module, micro_batches: Sequence[Pair], device: torch.device
    ) -> None:
        with contextlib.suppress(ImportError):
            import_torchvision()  # Lightning's own import of it may fail beside a CPU build.
        from lightning.pytorch import LightningModule, Trainer

        class Module(LightningModule):  # type: ignore[misc]  # Any to mypy: lightning is optional.
            def __init__(self) -> None:
                super().__init__()
                self.model = model
                self.total = torch.zeros((), device=device)

            def training_step(self, batch: Pair) -> Tensor:
                x, y = batch
                loss = F.cross_entropy(self.model(x), y)
                self.total += loss.detach()
                return loss

            def configure_optimizers(self) -> SGD:
                return SGD(self.parameters(), lr=LEARNING_RATE)

        self._micro_batches = micro_batches
        self._module = Module()
        with silence():
            self._trainer = Trainer(
                **quiet_trainer(device), accumulate_grad_batches=len(micro_batches)
            )

    def window(self) -> Iterator[Pair]:
        """Yield the micro-batches of one window; Lightning takes its step before the end."""
        yield from self._micro_batches
        self._module.total.item()
        self._module.total.zero_()

    def drive(self, work: Iterator[Pair]) -> None:
        """Run ``work``, and train on the micro-batches that it yields.

        Raises:
            RuntimeError: If Lightning ends before the work does.
        """
        with silence():
            self._trainer.fit(self._module, _Feed(work))
        for _ in work:
            raise RuntimeError("Lightning's fit ended before the measurement did")


@dataclass(frozen=True, slots=True)
class _Feed:
    """A loader for Lightning."""

    work: Iterator[Pair]

    def __iter__(self) -> Iterator[Pair]:
        return self.work

    def __len__(self) -> int:
        return 10**9  # Longer than any work. Without a length Lightning loads one batch ahead.


def quiet_trainer(device: torch.device) -> dict[str, Any]:
    """Return the arguments that make Lightning's ``Trainer`` run on a device, without output."""
    on_cpu = device.type == "cpu"
    return {
        "accelerator": "cpu" if on_cpu else "gpu",
        "devices": 1 if on_cpu else [device.index or 0],
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Suppress Lightning's messages about devices, tips and the end of a fit."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # The first is of Lightning 2.6; the second comes if the CPU is measured beside a GPU.
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated")
            warnings.filterwarnings("ignore", "GPU available but not used")
            yield
    finally:
        logger.setLevel(level)
