"""Gradient accumulation by each engine's documentation, where the engine is installed."""

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
from benchmarks.engine.peers import quiet_trainer, silence
from benchmarks.exactness.tasks import IGNORED, ObservedTraining

Engine = Callable[[ObservedTraining], None]
OURS: Final = "autobatch"
CONTROL: Final = "mean of means, by hand"


def undivided(training: ObservedTraining) -> None:
    """Take each step on its whole batch: the reference."""
    model, optimizer = training.begin()
    batches = [_on_device(batch, training) for batch in training.task.logical_batches]
    undivided_steps(model, optimizer, training.task.loss, batches)


def autobatch(training: ObservedTraining) -> None:
    """Take each step with ``Accumulator``."""
    model, optimizer = training.begin()
    task = training.task
    accumulator = Accumulator(model, optimizer, task.loss, micro_batch=task.micro_batch)
    for batch in task.logical_batches:
        accumulator.step(batch)


def mean_of_means(training: ObservedTraining) -> None:
    """Run the usual loop: each micro-batch's mean over the number of accumulation steps."""
    model, optimizer = training.begin()
    loader, count = _loader(training), training.task.accumulation_steps
    optimizer.zero_grad()
    for number, batch in enumerate(loader, 1):
        x, y = _on_device(batch, training)
        (training.task.loss(model(x), y) / count).backward()
        if number % count == 0 or number == len(loader):
            optimizer.step()
            optimizer.zero_grad()


def accelerate(training: ObservedTraining) -> None:
    """Train by the pattern ``with accelerator.accumulate(model)``."""
    _accumulate(
        training, *training.begin(), training.task.micro_batch, training.task.accumulation_steps
    )


def accelerate_by_hand(training: ObservedTraining) -> None:
    """Train by the recipe for unequal micro-batches: sums, over the items of all of them."""
    from accelerate import Accelerator

    count, loss = training.task.accumulation_steps, training.task.loss
    accelerator = Accelerator(
        cpu=training.task.device.type == "cpu", gradient_accumulation_steps=count
    )
    model, optimizer, loader = accelerator.prepare(*training.begin(), _loader(training))
    batches = list(loader)
    for first in range(0, len(batches), count):
        window = batches[first : first + count]
        items = sum((y != IGNORED).sum() for _, y in window) if loss.reduction == "mean" else 1
        for x, y in window:
            share = _summed(model(x), y) / items
            accelerator.backward(share * count)  # accelerate divides by the count.
        optimizer.step()
        optimizer.zero_grad()


def accelerate_outside(training: ObservedTraining) -> None:
    """Wrap the epoch in ``find_executable_batch_size``, with the model outside."""
    from accelerate.utils import find_executable_batch_size

    model, optimizer = training.begin()
    desired = training.task.micro_batch * training.task.accumulation_steps

    def train(batch_size: int) -> None:
        _accumulate(training, model, optimizer, batch_size, desired // batch_size)

    find_executable_batch_size(train, starting_batch_size=training.task.micro_batch)()


def accelerate_inside(training: ObservedTraining) -> None:
    """Wrap the epoch in ``find_executable_batch_size``, with a new model inside, as documented."""
    from accelerate.utils import find_executable_batch_size

    desired = training.task.micro_batch * training.task.accumulation_steps

    def train(batch_size: int) -> None:
        _accumulate(training, *training.begin(), batch_size, desired // batch_size)

    find_executable_batch_size(train, starting_batch_size=training.task.micro_batch)()


def _accumulate(
    training: ObservedTraining, model: nn.Module, optimizer: Optimizer, batch_size: int, count: int
) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(
        cpu=training.task.device.type == "cpu", gradient_accumulation_steps=count
    )
    loader = _loader(training, batch_size)
    model, prepared, loader = accelerator.prepare(model, optimizer, loader)
    for x, y in loader:
        with accelerator.accumulate(model):
            accelerator.backward(training.task.loss(model(x), y))
            prepared.step()
            prepared.zero_grad()


def lightning(training: ObservedTraining) -> None:
    """Train with ``Trainer(accumulate_grad_batches=...)``."""
    with contextlib.suppress(ImportError):
        import_torchvision()  # Lightning's own import of it may fail beside a CPU build.
    from lightning.pytorch import LightningModule, Trainer

    model, optimizer = training.begin()
    device = training.task.device

    class Module(LightningModule):  # type: ignore[misc]  # Any to mypy: lightning is optional.
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Pair) -> Tensor:
            x, y = batch
            loss: Tensor = training.task.loss(self.model(x), y)
            return loss

        def configure_optimizers(self) -> Optimizer:
            return optimizer

    with silence(), warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.filterwarnings("ignore", "The 'train_dataloader' does not have many workers")
        Trainer(
            **quiet_trainer(device),
            accumulate_grad_batches=training.task.accumulation_steps,
            default_root_dir=folder,
        ).fit(Module(), _loader(training))


class _AnyModel(nn.Module):
    """A model that returns its own loss, as ``Trainer`` of transformers requires."""

    def __init__(self, body: nn.Module, loss: nn.CrossEntropyLoss) -> None:
        super().__init__()
        self.body, self.loss = body, loss

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": self.loss(self.body(x), labels)}


class _CountingModel(_AnyModel):
    """A model that takes the number of items, as the models of transformers do."""

    def forward(self, x: Tensor, labels: Tensor, **known: Tensor) -> dict[str, Tensor]:
        total = _summed(self.body(x), labels)
        mean = self.loss.reduction == "mean"
        return {"loss": total / known["num_items_in_batch"] if mean else total}


def transformers(training: ObservedTraining) -> None:
    """Train with ``Trainer`` and a user's own model."""
    _trainer(training, _AnyModel)


def transformers_counting(training: ObservedTraining) -> None:
    """Train with ``Trainer`` and a model that takes ``num_items_in_batch``."""
    _trainer(training, _CountingModel)


def transformers_smaller(training: ObservedTraining) -> None:
    """Train with ``Trainer`` and ``auto_find_batch_size``."""
    _trainer(training, _CountingModel, auto_find_batch_size=True)


def _trainer(training: ObservedTraining, wrap: type[_AnyModel], **options: Any) -> None:
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import PrinterCallback, Trainer, TrainingArguments

    body, optimizer = training.begin()
    examples = [{"x": x, "labels": y} for x, y in zip(*training.task.data, strict=True)]
    with tempfile.TemporaryDirectory() as folder, _quiet_transformers():
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=training.task.micro_batch,
            gradient_accumulation_steps=training.task.accumulation_steps,
            num_train_epochs=1,
            max_grad_norm=0,  # No clipping.
            train_sampling_strategy="sequential",
            use_cpu=training.task.device.type == "cpu",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            **options,
        )
        trainer = Trainer(
            model=wrap(body, training.task.loss),
            args=arguments,
            train_dataset=examples,
            optimizers=(optimizer, LambdaLR(optimizer, lambda _: 1.0)),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Suppress the reports and warnings of transformers and of its imports."""
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


def _loader(
    training: ObservedTraining, batch_size: int | None = None
) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(
        TensorDataset(*training.task.data), batch_size=batch_size or training.task.micro_batch
    )


def _on_device(batch: Any, training: ObservedTraining) -> Pair:
    x, y = batch
    return x.to(training.task.device), y.to(training.task.device)


_NEEDS: Final = {"transformers": ("accelerate",)}  # Its Trainer needs accelerate.


def absent(package: str) -> bool:
    """Return whether a package, or a package that it needs, is not installed."""
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
"""The engines by name, each with the package that it needs."""

FAILURES: Final[Mapping[str, tuple[str, Engine]]] = {
    OURS: ("autobatch", autobatch),
    "plain loop": ("torch", mean_of_means),
    "accelerate, model outside": ("accelerate", accelerate_outside),
    "accelerate, all rebuilt inside": ("accelerate", accelerate_inside),
    "Lightning": ("lightning", lightning),
    "transformers, auto_find_batch_size": ("transformers", transformers_smaller),
}
"""The engines by name, each in its own way to survive when memory runs out, where it has one."""
