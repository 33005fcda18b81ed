"""Training and searching by names: what the command line and the demo do."""

import functools
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from autobatch.api import find_and_train, find_batch_size
from autobatch.batches.regroup import Data
from autobatch.commands.arguments import (
    IMAGES,
    ModeChoice,
    OptimizerName,
    PrecisionChoice,
    PreferChoice,
)
from autobatch.commands.reports import (
    Fields,
    Report,
    TrainingReport,
    Watch,
    plan_fields,
    search_fields,
    training_fields,
)
from autobatch.commands.sources import DataSource, accuracy, load_data, load_model
from autobatch.devices.base import Budget
from autobatch.devices.choose import choose_device
from autobatch.events import SearchEnded
from autobatch.plan import check_size
from autobatch.plot import check_plot
from autobatch.prediction.gpu_catalogue import custom_gpu
from autobatch.prediction.predict import predict
from autobatch.prediction.result import Prediction
from autobatch.probing.options import SearchOptions
from autobatch.results import SearchResult
from autobatch.training.precision import check_precision
from autobatch.units import count
from autobatch.writing import check_file, whole_file

_MOMENTUM: Final = 0.9
_BLANK: Final = 16  # As many images as a trace repeats.


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a training and a search share.

    Attributes:
        model: ``torchvision:resnet18`` or ``package.module:factory``.
        data: ``digits``, ``imagefolder:PATH`` or ``package.module:factory``.
        pixels: Height and width of the digits, and of a folder's images.
        optimizer: AdamW, or SGD with a momentum of 0.9.
        lr: Learning rate.
        memory_limit: For the whole process, as bytes or text.
        headroom: What is kept free where there is no such limit; None is the standard.
        device: As torch names it; None is an accelerator if there is one.
        seed: Of the model's weights and the order of the data; None draws one.
        precision: What forward passes compute in.
    """

    model: str
    data: str = "digits"
    pixels: int = 64
    optimizer: OptimizerName = OptimizerName.ADAMW
    lr: float = 1e-3
    memory_limit: int | str | None = None
    headroom: int | str | None = None
    device: str | None = None
    seed: int | None = None
    precision: PrecisionChoice = PrecisionChoice.FP32

    def __post_init__(self) -> None:
        check_size("pixels", self.pixels)
        Budget.parse(self.memory_limit, self.headroom)  # Refuses.

    def load(self, watch: Watch) -> tuple[nn.Module, DataSource]:
        """Return the model and the data, and say what they are."""
        choose_device(self.device, torch.device("cpu"))  # Refuses, before anything slow.
        if self.seed is not None:
            torch.manual_seed(self.seed)
        source = load_data(self.data, pixels=self.pixels)
        model = load_model(self.model, source.classes)
        watch.log(f"{self.model} on {self.data}{_described(source)}")
        return model, source

    @property
    def make_optimizer(self) -> Callable[[Iterable[Tensor]], Optimizer]:
        """The factory that the api takes."""
        if self.optimizer is OptimizerName.SGD:
            return functools.partial(torch.optim.SGD, lr=self.lr, momentum=_MOMENTUM)
        return functools.partial(torch.optim.AdamW, lr=self.lr)


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchRun(Setting):
    """The largest size, by names.

    Attributes:
        ceiling: The largest size of interest; None goes as far as the data.
        mode: What is rehearsed.
        multiple_of: Only multiples of this are tried.
        plot: Where the picture of memory over size goes, or None.
    """

    ceiling: int | None = None
    mode: ModeChoice = ModeChoice.TRAIN
    multiple_of: int = 1
    plot: Path | None = None

    def run(self, watch: Watch) -> Report:
        """Find the tolerable batch."""
        if self.plot is not None:
            check_plot(self.plot)
        model, source = self.load(watch)
        search = find_batch_size(
            model,
            source.train,
            ceiling=self.ceiling,
            optimizer=self.make_optimizer,
            device=self.device,
            precision=check_precision(self.precision),
            memory_limit=self.memory_limit,
            headroom=self.headroom,
            mode="inference" if self.mode is ModeChoice.INFERENCE else "train",
            search=SearchOptions(multiple_of=self.multiple_of),
            # How it ended is the report itself.
            progress=lambda event: None if isinstance(event, SearchEnded) else watch(event),
        )
        paragraphs = [str(search), "" if search.breakdown is None else str(search.breakdown)]
        if self.plot is not None:
            paragraphs.append(_drawn(search, self.plot, "memory over size"))
        names = {"model": self.model, "data": self.data}
        return Report(
            text="\n\n".join(filter(None, paragraphs)), fields=names | search_fields(search)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRun(Setting):
    """A training, by names.

    Attributes:
        desired: Examples per optimizer step.
        epochs: How often all data is seen.
        max_steps: Optimizer steps after which it ends, or None.
        save: Where the trained weights go, or None.
        prefer: The largest size, or the fastest.
        clip_grad_norm: The largest norm of a step's gradient, or None.
        checkpoint_dir: Where checkpoints go and are trained on from, or None.
    """

    desired: int = 256
    epochs: int = 1
    max_steps: int | None = None
    save: Path | None = None
    prefer: PreferChoice = PreferChoice.LARGEST
    clip_grad_norm: float | None = None
    checkpoint_dir: Path | None = None

    def run(self, watch: Watch) -> TrainingReport:
        """Train, and measure before and after where there is something to measure with."""
        if self.save is not None:
            check_file(self.save, "save")
        model, source = self.load(watch)
        before = _measure(model, source, self.device)
        if before is not None:
            watch.log(f"test accuracy before training: {before:.1%}")
        result = find_and_train(
            model,
            source.train,
            self.desired,
            optimizer=self.make_optimizer,
            epochs=self.epochs,
            max_steps=self.max_steps,
            device=self.device,
            precision=check_precision(self.precision),
            memory_limit=self.memory_limit,
            headroom=self.headroom,
            clip_grad_norm=self.clip_grad_norm,
            prefer="fastest" if self.prefer is PreferChoice.FASTEST else "largest",
            checkpoint_dir=self.checkpoint_dir,
            seed=self.seed,
            progress=watch,
        )
        after = _measure(model, source, self.device)
        if self.save is not None:
            with whole_file(self.save) as unfinished:
                torch.save(model.state_dict(), unfinished)
        names = {"model": self.model, "data": self.data}
        text, measured = str(result), {"test_accuracy": {"before": before, "after": after}}
        if after is not None:
            text += f"\ntest accuracy {before:.1%} before, {after:.1%} after"
        if self.save is not None:
            text += f"\nthe weights are in {self.save}"
        return TrainingReport(
            text=text,
            fields=names | training_fields(result) | measured,
            result=result,
            before=before,
            after=after,
        )


def _drawn(found: SearchResult | Prediction, path: Path, what: str) -> str:
    """Draw it, and say so; what was found is told though the disk be full."""
    try:
        found.plot(path)
    except OSError as error:
        return f"{what} could not be drawn: {error}"
    return f"{what} is drawn in {path}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictionRun(Setting):
    """The tolerable batch of GPUs that are not here, by names.

    Attributes:
        gpus: As ``find_gpu`` knows them; ``("all",)`` is the catalogue.
        memory: Of a card that is in no catalogue, in the place of a name.
        desired: Examples per optimizer step, or None.
        ceiling: The largest size of interest; None goes as far as the data, if any is named.
        mode: What is predicted.
        plot: Where the picture of the peak over the batch goes, or None.
    """

    gpus: tuple[str, ...] = ()
    memory: str | None = None
    desired: int | None = None
    ceiling: int | None = None
    mode: ModeChoice = ModeChoice.TRAIN
    plot: Path | None = None

    def run(self, watch: Watch) -> Report:
        """Predict, for each GPU."""
        if bool(self.gpus) == (self.memory is not None):
            raise ValueError(
                'pass one of --gpu "RTX 4090" (--gpu all is the catalogue) and --memory 24GiB, got '
                + ("both" if self.gpus else "neither")
            )
        if self.plot is not None:
            check_plot(self.plot)
        asked = [custom_gpu(self.memory)] if self.memory is not None else list(self.gpus)
        model, data = self.load_sample(watch)
        prediction = predict(
            model,
            data,
            gpu="all" if asked == ["all"] else asked,
            desired=self.desired,
            ceiling=self._ceiling(data),
            optimizer=self.make_optimizer,
            precision=check_precision(self.precision),
            mode="inference" if self.mode is ModeChoice.INFERENCE else "train",
        )
        every = [prediction, *prediction.others]
        fields: Fields = {
            "model": self.model,
            "data": self.data,
            "predictions": [prediction_fields(each) for each in every],
        }
        text = str(prediction) if len(every) == 1 else prediction.lines
        if self.plot is not None:
            text += f"\n\n{_drawn(prediction, self.plot, 'the peak over the batch')}"
        return Report(text=text, fields=fields)

    def _ceiling(self, data: Data) -> int | None:
        """What was asked for, or what the data holds: blank images are a sample of any number."""
        held = None if self.data == IMAGES else _examples(data)
        return held if self.ceiling is None else self.ceiling

    def load_sample(self, watch: Watch) -> tuple[nn.Module, Data]:
        """Return the model and a sample: blank images, unless other data is named."""
        if self.data != IMAGES:
            model, source = self.load(watch)
            return model, source.train
        images = torch.zeros(_BLANK, 3, self.pixels, self.pixels)
        return load_model(self.model), (images, torch.zeros(_BLANK, dtype=torch.long))


def prediction_fields(prediction: Prediction) -> Fields:
    """Return the prediction as JSON takes it."""
    return {
        "gpu": prediction.gpu.name,
        "precision": prediction.precision,
        "mode": prediction.mode,
        "tolerable": prediction.tolerable,
        "largest": prediction.largest,
        "limited_by": prediction.limited_by,
        "plan": None if prediction.plan is None else plan_fields(prediction.plan),
        "size": prediction.size,
        "peak_allocated_bytes": prediction.peak_allocated_bytes,
        "peak_reserved_bytes": prediction.peak_reserved_bytes,
        "capacity_bytes": prediction.gpu.capacity_bytes,
        "breakdown_bytes": prediction.breakdown.parts,
        "at_peak": prediction.at_peak._asdict(),
        "what_ifs": {what_if.change: what_if.tolerable for what_if in prediction.what_ifs},
        "notes": list(prediction.notes),
    }


def _described(source: DataSource) -> str:
    """What is known of the data's sizes, to follow its name."""
    parts = [(source.train, "to train on"), (source.test, "to test on")]
    sizes = [f"{size} {use}" for data, use in parts if (size := _examples(data)) is not None]
    classes = [] if source.classes is None else [count(source.classes, "class", "classes")]
    return f": {', '.join(sizes + classes)}" if sizes or classes else ""


def _examples(data: object) -> int | None:
    """How many examples ``data`` holds, where it says so by itself."""
    if isinstance(data, tuple) and data and isinstance(data[0], Sized):
        return len(data[0])
    dataset = getattr(data, "dataset", data)
    return len(dataset) if isinstance(dataset, Dataset) and isinstance(dataset, Sized) else None


def _measure(model: nn.Module, source: DataSource, device: str | None) -> float | None:
    """Return the accuracy on the test data, measured where training runs; None without labels."""
    if source.test is None or source.classes is None:
        return None
    home = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    try:
        return accuracy(model.to(choose_device(device, home)), source.test)
    finally:
        model.to(home)
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # The search is to find the memory as it was.
