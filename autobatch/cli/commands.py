"""Run the commands: load the model and the data by name, call the library, make a report."""

import functools
from collections.abc import Callable, Iterable, Sized
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from autobatch.api.batch_size import find_batch_size
from autobatch.api.train import find_and_train
from autobatch.cli.arguments import (
    IMAGES,
    FindArguments,
    LocalArguments,
    ModeChoice,
    ModelArguments,
    OptimizerName,
    PredictArguments,
    PreferChoice,
    TrainArguments,
)
from autobatch.cli.loaders import DataSource, accuracy, load_data, load_model
from autobatch.cli.reports import (
    Fields,
    ProgressLog,
    Report,
    TrainingReport,
    plan_fields,
    search_fields,
    training_fields,
)
from autobatch.data.source import Data
from autobatch.devices.base import HOST
from autobatch.devices.budget import Budget
from autobatch.devices.factory import choose_device, open_device
from autobatch.events import SearchEnded
from autobatch.files import atomic_file, check_file
from autobatch.prediction.gpu_catalogue import custom_gpu
from autobatch.prediction.predict import predict as predict_batch
from autobatch.prediction.result import Prediction
from autobatch.results.plot import check_plot
from autobatch.results.search import SearchResult
from autobatch.search.options import SearchOptions
from autobatch.training.batchnorm.modes import check_batch_norm
from autobatch.training.engine.precision import check_precision
from autobatch.training.options import StepOptions
from autobatch.units import count

_MOMENTUM: Final = 0.9
_BLANK: Final = 16  # The number of blank images in the data of a prediction.


def train(arguments: TrainArguments, progress: ProgressLog) -> TrainingReport:
    """Train a model; measure its accuracy before and after if there is test data.

    Raises:
        ValueError: If an argument is invalid.
    """
    if arguments.save is not None:
        check_file(arguments.save, "save")
    model, source = _load_here(arguments, progress)
    before = _measure(model, source, arguments.device)
    if before is not None:
        progress.log(f"test accuracy before training: {before:.1%}")
    result = find_and_train(
        model,
        source.train,
        arguments.desired,
        optimizer=_optimizer(arguments, arguments.lr),
        epochs=arguments.epochs,
        max_steps=arguments.max_steps,
        device=arguments.device,
        memory_limit=arguments.memory_limit,
        headroom=arguments.headroom,
        prefer="fastest" if arguments.prefer is PreferChoice.FASTEST else "largest",
        checkpoint_dir=arguments.checkpoint_dir,
        seed=arguments.seed,
        progress=progress,
        options=_step(arguments),
    )
    after = _measure(model, source, arguments.device)
    text, measured = str(result), {"test_accuracy": {"before": before, "after": after}}
    if after is not None:
        text += f"\ntest accuracy {before:.1%} before, {after:.1%} after"
    if arguments.save is not None:
        with atomic_file(arguments.save) as unfinished:
            torch.save(model.state_dict(), unfinished)
        text += f"\nthe weights are in {arguments.save}"
    return TrainingReport(
        text=text,
        fields=_names(arguments) | training_fields(result) | measured,
        result=result,
        before=before,
        after=after,
    )


def find(arguments: FindArguments, progress: ProgressLog) -> Report:
    """Find the tolerable batch of a model.

    Raises:
        ValueError: If an argument is invalid.
    """
    if arguments.plot is not None:
        check_plot(arguments.plot)
    model, source = _load_here(arguments, progress)
    search = find_batch_size(
        model,
        source.train,
        ceiling=arguments.ceiling,
        optimizer=_optimizer(arguments, arguments.lr),
        device=arguments.device,
        memory_limit=arguments.memory_limit,
        headroom=arguments.headroom,
        mode="inference" if arguments.mode is ModeChoice.INFERENCE else "train",
        search=SearchOptions(multiple_of=arguments.multiple_of),
        # The report shows the end of the search.
        progress=lambda event: None if isinstance(event, SearchEnded) else progress(event),
        options=_step(arguments),
    )
    paragraphs = [str(search), "" if search.breakdown is None else str(search.breakdown)]
    if arguments.plot is not None:
        paragraphs.append(_drawn(search, arguments.plot, "memory over size"))
    return Report(
        text="\n\n".join(filter(None, paragraphs)),
        fields=_names(arguments) | search_fields(search),
    )


def predict(arguments: PredictArguments, progress: ProgressLog) -> Report:
    """Predict the tolerable batch of a model for each named GPU.

    Raises:
        ValueError: If an argument is invalid.
    """
    gpus = arguments.gpu or []
    if bool(gpus) == (arguments.memory is not None):
        raise ValueError(
            'pass either --gpu "RTX 4090" (or --gpu all for all known GPUs) or --memory 24GiB, got '
            + ("both" if gpus else "neither")
        )
    if arguments.plot is not None:
        check_plot(arguments.plot)
    cards = gpus if arguments.memory is None else [custom_gpu(arguments.memory)]
    examples = None  # There are as many blank images as the prediction needs.
    if arguments.data == IMAGES:
        images = torch.zeros(_BLANK, 3, arguments.pixels, arguments.pixels)
        data: Data = (images, torch.zeros(_BLANK, dtype=torch.long))
        model = load_model(arguments.model)
    else:
        model, source = _load(arguments, progress)
        data, examples = source.train, _examples(source.train)
    prediction = predict_batch(
        model,
        data,
        gpu="all" if cards == ["all"] else cards,
        desired=arguments.desired,
        ceiling=examples if arguments.ceiling is None else arguments.ceiling,
        optimizer=_optimizer(arguments),
        mode="inference" if arguments.mode is ModeChoice.INFERENCE else "train",
        options=_step(arguments),
    )
    every = [prediction, *prediction.others]
    text = str(prediction) if len(every) == 1 else prediction.lines
    if arguments.plot is not None:
        text += f"\n\n{_drawn(prediction, arguments.plot, 'the peak over the batch')}"
    predictions: Fields = {"predictions": [prediction_fields(each) for each in every]}
    return Report(text=text, fields=_names(arguments) | predictions)


def _names(arguments: ModelArguments) -> Fields:
    return {"model": arguments.model, "data": arguments.data}


def _step(arguments: ModelArguments) -> StepOptions:
    return StepOptions(
        precision=check_precision(arguments.precision),
        clip_grad_norm=arguments.clip_grad_norm,
        batch_norm=check_batch_norm(arguments.batch_norm),
    )


def _optimizer(
    arguments: ModelArguments, lr: float = 1e-3
) -> Callable[[Iterable[Tensor]], Optimizer]:
    """Return a factory of the optimizer: AdamW, or SGD with a momentum of 0.9."""
    if arguments.optimizer is OptimizerName.SGD:
        return functools.partial(torch.optim.SGD, lr=lr, momentum=_MOMENTUM)
    return functools.partial(torch.optim.AdamW, lr=lr)


def _load_here(arguments: LocalArguments, progress: ProgressLog) -> tuple[nn.Module, DataSource]:
    """Check the arguments that are quick to check, then return the model and the data."""
    _step(arguments)
    Budget.parse(arguments.memory_limit, arguments.headroom)
    choose_device(arguments.device, HOST)
    if arguments.seed is not None:
        torch.manual_seed(arguments.seed)
    return _load(arguments, progress)


def _load(arguments: ModelArguments, progress: ProgressLog) -> tuple[nn.Module, DataSource]:
    """Return the model and the data, and log their names and sizes."""
    source = load_data(arguments.data, pixels=arguments.pixels)
    model = load_model(arguments.model, source.classes)
    progress.log(f"{arguments.model} on {arguments.data}{_described(source)}")
    return model, source


def _drawn(found: SearchResult | Prediction, path: Path, what: str) -> str:
    """Plot the result and return a line about the file; an OSError does not lose the result."""
    try:
        found.plot(path)
    except OSError as error:
        return f"{what} could not be plotted: {error}"
    return f"{what} is plotted in {path}"


def prediction_fields(prediction: Prediction) -> Fields:
    """Return the prediction as values for JSON."""
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
    """Return the known sizes of the data, as text to append to its name."""
    parts = [(source.train, "to train on"), (source.test, "to test on")]
    sizes = [f"{size} {use}" for data, use in parts if (size := _examples(data)) is not None]
    classes = [] if source.classes is None else [count(source.classes, "class", "classes")]
    return f": {', '.join(sizes + classes)}" if sizes or classes else ""


def _examples(data: object) -> int | None:
    """Return the number of examples in ``data``; None if it has no length."""
    if isinstance(data, tuple) and data and isinstance(data[0], Sized):
        return len(data[0])
    dataset = getattr(data, "dataset", data)
    return len(dataset) if isinstance(dataset, Dataset) and isinstance(dataset, Sized) else None


def _measure(model: nn.Module, source: DataSource, device: str | None) -> float | None:
    """Return the accuracy on the test data, on the training device; None without labels."""
    if source.test is None or source.classes is None:
        return None
    home = next((parameter.device for parameter in model.parameters()), HOST)
    chosen = choose_device(device, home)
    try:
        return accuracy(model.to(chosen), source.test)
    finally:
        model.to(home)
        open_device(chosen).release_cached()  # The search needs the memory.
