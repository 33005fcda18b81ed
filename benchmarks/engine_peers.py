"""A window of micro-batches as accelerate and Lightning take it, where they are installed."""

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
"""Takes one optimizer step; what it yields must be trained on by ``Fit.drive`` on its way."""

ACCELERATE: Final = "accelerate"
LIGHTNING: Final = "lightning"
ALL: Final = (ACCELERATE, LIGHTNING)
NOTHING: Final[tuple[Pair, ...]] = ()
LEARNING_RATE: Final = 0.01


def installed() -> list[str]:
    """Return the names of those that can be measured here."""
    return [name for name in ALL if importlib.util.find_spec(name)]


def accelerate_window(
    model: nn.Module, micro_batches: Sequence[Pair], device: torch.device
) -> Window:
    """Return a window by accelerate's documented pattern; its loader is left out, in its favour."""
    from accelerate import Accelerator

    accelerator = Accelerator(
        cpu=device.type == "cpu",
        device_placement=False,  # It would choose the first GPU; the model is where it belongs.
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
    """One ``Trainer.fit`` of Lightning's, between whose batches the others have their turns.

    Lightning is the one that calls for batches, so it cannot be called for a step. But it asks for
    the next batch only when it is done with the last, its optimizer step included. So the whole
    measurement is the iterator that it trains from: while it waits for a batch, others are timed.
    There is no second thread, which would come with a second pool of OpenMP threads.

    Args:
        model: On ``device``.
        micro_batches: Of one window.
        device: The CPU or a GPU.
    """

    def __init__(
        self, model: nn.Module, micro_batches: Sequence[Pair], device: torch.device
    ) -> None:
        with contextlib.suppress(ImportError):
            import_torchvision()  # Lightning imports it; beside a CPU build it needs our detour.
        from lightning.pytorch import LightningModule, Trainer

        class Module(LightningModule):  # type: ignore[misc]  # Any to mypy: it is optional.
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
        """Yield the micro-batches of one window to ``drive``; the step is taken when it ends."""
        yield from self._micro_batches
        self._module.total.item()
        self._module.total.zero_()

    def drive(self, work: Iterator[Pair]) -> None:
        """Go through ``work`` and train on what it yields.

        Raises:
            RuntimeError: If Lightning ended before the work did.
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
        return 10**9  # Longer than any work. Without a length it is asked for one batch ahead.


def quiet_trainer(device: torch.device) -> dict[str, Any]:
    """Return what Lightning's ``Trainer`` is told here: where it runs, and to say nothing."""
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
    """Keep back what Lightning tells everyone: devices, tips, that it ended."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # torch's, of Lightning 2.6; and Lightning's, if the CPU is measured beside a GPU.
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated")
            warnings.filterwarnings("ignore", "GPU available but not used")
            yield
    finally:
        logger.setLevel(level)
