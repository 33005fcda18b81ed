"""Gradient accumulation as each engine's documentation says, where it is installed."""

import contextlib
import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from reference import Pair, undivided_steps
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from autobatch import Accumulator
from autobatch.compat.torchvision import import_torchvision
from benchmarks.engine_peers import quiet_trainer, silence
from benchmarks.lessons import IGNORED, Watch

Engine = Callable[[Watch], None]
OURS: Final = "autobatch"
CONTROL: Final = "mean of means, by hand"


def undivided(watch: Watch) -> None:
    """Take each step on its whole batch: the truth."""
    model, optimizer = watch.begin()
    batches = [_moved(batch, watch) for batch in watch.lesson.logical_batches]
    undivided_steps(model, optimizer, watch.lesson.loss, batches)


def autobatch(watch: Watch) -> None:
    """Take each step by ``Accumulator``."""
    model, optimizer = watch.begin()
    lesson = watch.lesson
    accumulator = Accumulator(model, optimizer, lesson.loss, micro_batch=lesson.micro_batch)
    for batch in lesson.logical_batches:
        accumulator.step(batch)


def mean_of_means(watch: Watch) -> None:
    """The usual loop: each micro-batch's mean over the number of accumulation steps."""
    model, optimizer = watch.begin()
    loader, count = _loader(watch), watch.lesson.accumulation_steps
    optimizer.zero_grad()
    for number, batch in enumerate(loader, 1):
        x, y = _moved(batch, watch)
        (watch.lesson.loss(model(x), y) / count).backward()
        if number % count == 0 or number == len(loader):
            optimizer.step()
            optimizer.zero_grad()


def accelerate(watch: Watch) -> None:
    """The pattern ``with accelerator.accumulate(model)``."""
    _accumulate(watch, *watch.begin(), watch.lesson.micro_batch, watch.lesson.accumulation_steps)


def accelerate_by_hand(watch: Watch) -> None:
    """The recipe for losses whose terms differ: the sum over the items of all micro-batches."""
    from accelerate import Accelerator

    count, loss = watch.lesson.accumulation_steps, watch.lesson.loss
    accelerator = Accelerator(
        cpu=watch.lesson.device.type == "cpu", gradient_accumulation_steps=count
    )
    model, optimizer, loader = accelerator.prepare(*watch.begin(), _loader(watch))
    batches = list(loader)
    for first in range(0, len(batches), count):
        window = batches[first : first + count]
        items = sum((y != IGNORED).sum() for _, y in window) if loss.reduction == "mean" else 1
        for x, y in window:
            share = _summed(model(x), y) / items
            accelerator.backward(share * count)  # It divides by that.
        optimizer.step()
        optimizer.zero_grad()


def accelerate_outside(watch: Watch) -> None:
    """``find_executable_batch_size`` around the epoch; the model lives outside."""
    from accelerate.utils import find_executable_batch_size

    model, optimizer = watch.begin()
    desired = watch.lesson.micro_batch * watch.lesson.accumulation_steps

    def train(batch_size: int) -> None:
        _accumulate(watch, model, optimizer, batch_size, desired // batch_size)

    find_executable_batch_size(train, starting_batch_size=watch.lesson.micro_batch)()


def accelerate_inside(watch: Watch) -> None:
    """``find_executable_batch_size`` as documented: everything is made anew inside."""
    from accelerate.utils import find_executable_batch_size

    desired = watch.lesson.micro_batch * watch.lesson.accumulation_steps

    def train(batch_size: int) -> None:
        _accumulate(watch, *watch.begin(), batch_size, desired // batch_size)

    find_executable_batch_size(train, starting_batch_size=watch.lesson.micro_batch)()


def _accumulate(
    watch: Watch, model: nn.Module, optimizer: Optimizer, batch_size: int, count: int
) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(
        cpu=watch.lesson.device.type == "cpu", gradient_accumulation_steps=count
    )
    loader = _loader(watch, batch_size)
    model, prepared, loader = accelerator.prepare(model, optimizer, loader)
    for x, y in loader:
        with accelerator.accumulate(model):
            accelerator.backward(watch.lesson.loss(model(x), y))
            prepared.step()
            prepared.zero_grad()


def lightning(watch: Watch) -> None:
    """``Trainer(accumulate_grad_batches=...)``."""
    with contextlib.suppress(ImportError):
        import_torchvision()  # Lightning imports it; beside a CPU build it needs our detour.
    from lightning.pytorch import LightningModule, Trainer

    model, optimizer = watch.begin()
    device = watch.lesson.device

    class Module(LightningModule):  # type: ignore[misc]  # Any to mypy: it is optional.
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Pair) -> Tensor:
            x, y = batch
            loss: Tensor = watch.lesson.loss(self.model(x), y)
            return loss

        def configure_optimizers(self) -> Optimizer:
            return optimizer

    with silence(), warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.filterwarnings("ignore", "The 'train_dataloader' does not have many workers")
        Trainer(
            **quiet_trainer(device),
            accumulate_grad_batches=watch.lesson.accumulation_steps,
            default_root_dir=folder,
        ).fit(Module(), _loader(watch))


class _AnyModel(nn.Module):
    """What ``Trainer`` of transformers takes: a model that returns its own loss."""

    def __init__(self, body: nn.Module, loss: nn.CrossEntropyLoss) -> None:
        super().__init__()
        self.body, self.loss = body, loss

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": self.loss(self.body(x), labels)}


class _CountingModel(_AnyModel):
    """One that takes the number of items, as the models of transformers do."""

    def forward(self, x: Tensor, labels: Tensor, **known: Tensor) -> dict[str, Tensor]:
        total = _summed(self.body(x), labels)
        mean = self.loss.reduction == "mean"
        return {"loss": total / known["num_items_in_batch"] if mean else total}


def transformers(watch: Watch) -> None:
    """``Trainer``, with a model of one's own."""
    _trainer(watch, _AnyModel)


def transformers_counting(watch: Watch) -> None:
    """``Trainer``, with a model that takes ``num_items_in_batch``."""
    _trainer(watch, _CountingModel)


def transformers_smaller(watch: Watch) -> None:
    """``Trainer`` with ``auto_find_batch_size``."""
    _trainer(watch, _CountingModel, auto_find_batch_size=True)


def _trainer(watch: Watch, wrap: type[_AnyModel], **options: Any) -> None:
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import PrinterCallback, Trainer, TrainingArguments

    body, optimizer = watch.begin()
    examples = [{"x": x, "labels": y} for x, y in zip(*watch.lesson.data, strict=True)]
    with tempfile.TemporaryDirectory() as folder, _quiet_transformers():
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=watch.lesson.micro_batch,
            gradient_accumulation_steps=watch.lesson.accumulation_steps,
            num_train_epochs=1,
            max_grad_norm=0,  # No clipping.
            train_sampling_strategy="sequential",
            use_cpu=watch.lesson.device.type == "cpu",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            **options,
        )
        trainer = Trainer(
            model=wrap(body, watch.lesson.loss),
            args=arguments,
            train_dataset=examples,
            optimizers=(optimizer, LambdaLR(optimizer, lambda _: 1.0)),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep back its report and its warnings, and those of what it imports."""
    loggers = [logging.getLogger(name) for name in ("transformers", "accelerate")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _summed(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, targets, reduction="sum")


def _loader(watch: Watch, batch_size: int | None = None) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(
        TensorDataset(*watch.lesson.data), batch_size=batch_size or watch.lesson.micro_batch
    )


def _moved(batch: Any, watch: Watch) -> Pair:
    x, y = batch
    return x.to(watch.lesson.device), y.to(watch.lesson.device)


_NEEDS: Final = {"transformers": ("accelerate",)}  # Its Trainer, that is.


def absent(package: str) -> bool:
    """Whether it cannot be measured here."""
    return any(
        importlib.util.find_spec(name) is None for name in (package, *_NEEDS.get(package, ()))
    )


GRADIENTS: Final[Mapping[str, tuple[str, Engine]]] = {
    OURS: ("autobatch", autobatch),
    CONTROL: ("torch", mean_of_means),
    "accelerate, accumulate()": ("accelerate", accelerate),
    "accelerate, its recipe by hand": ("accelerate", accelerate_by_hand),
    "Lightning": ("lightning", lightning),
    "transformers, any model": ("transformers", transformers),
    "transformers, model takes num_items_in_batch": ("transformers", transformers_counting),
}
"""By name: the package that must be there, and the engine."""

FAILURES: Final[Mapping[str, tuple[str, Engine]]] = {
    OURS: ("autobatch", autobatch),
    "plain loop": ("torch", mean_of_means),
    "accelerate, model outside": ("accelerate", accelerate_outside),
    "accelerate, all rebuilt inside": ("accelerate", accelerate_inside),
    "Lightning": ("lightning", lightning),
    "transformers, auto_find_batch_size": ("transformers", transformers_smaller),
}
"""Each in the way in which it survives most, where it has one."""
