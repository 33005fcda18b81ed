"""Load models and data by the names of the command line."""

import difflib
import importlib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from autobatch.cli.arguments import DATA_NAMES, MODEL_NAMES, factory_of
from autobatch.compat.torchvision import import_torchvision
from autobatch.data.source import Data
from autobatch.devices.base import HOST
from autobatch.validation import check_size

_DIGITS_TEST: Final = 360
_IMAGENET_MEAN: Final = (0.485, 0.456, 0.406)
_IMAGENET_STD: Final = (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSource:
    """Data that was loaded by name.

    Attributes:
        train: Training data, as ``find_and_train`` takes it.
        test: Test data, to measure the accuracy; None without test data.
        classes: The number of classes; None if the labels are not class labels.
    """

    train: Data
    test: "Data | None" = None  # Data holds forward references, so ``|`` fails at runtime.
    classes: int | None = None


def load_model(name: str, classes: int | None = None) -> nn.Module:
    """Return the model called ``name``.

    Args:
        name: ``torchvision:resnet18`` for a classifier of torchvision with random weights, or
            ``package.module:factory`` for a callable without arguments. The working directory is
            searched first.
        classes: The number of outputs of a torchvision classifier; None keeps the default, 1000.

    Raises:
        ValueError: If there is no such name.
        TypeError: If the factory returns no module.
    """
    kind, _, rest = name.partition(":")
    if kind == "torchvision":
        return _torchvision_model(rest, classes)
    found = _find(name, what="model", names=MODEL_NAMES)
    model = found() if callable(found) and not isinstance(found, nn.Module) else found
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name} must give a torch.nn.Module, got {_kind(model)}")
    return model


def load_data(name: str, *, pixels: int = 64) -> DataSource:
    """Return the data called ``name``.

    * ``digits``: the 1797 handwritten digits of scikit-learn, 360 of them for testing.
    * ``imagefolder:PATH``: the folders ``PATH/train`` and, if it exists, ``PATH/val`` or
      ``PATH/test``. Without ``PATH/train``, all of ``PATH`` is training data.
    * ``package.module:factory``: a callable without arguments. A pair in which neither item is a
      tensor or an array is ``(train, test)``; any other value is training data.

    Args:
        name: One of these three forms.
        pixels: Height and width of the images, for the first two.

    Raises:
        ValueError: If there is no such name, or the folder holds no image.
    """
    check_size("pixels", pixels)
    kind, colon, rest = name.partition(":")
    if name == "digits":
        return _digits(pixels)
    if kind == "imagefolder" and colon:
        return _image_folder(Path(rest), pixels)
    found = _find(name, what="data", names=DATA_NAMES)
    data = found() if callable(found) else found
    if isinstance(data, DataSource):
        return data
    train, test = _train_and_test(data)
    # find_and_train raises if ``train`` is no data.
    return DataSource(
        train=cast("Data", train),
        test=cast("Data | None", test),
        classes=_count_classes(train),
    )


def accuracy(model: nn.Module, test: object, *, batch: int = 64) -> float:
    """Return the accuracy of ``model`` on ``test``, a share of 1.

    The model runs in evaluation mode on its own device. The mode of every module is restored.

    Args:
        model: Maps the inputs of a batch to outputs of shape ``(batch, classes, ...)``.
        test: A pair of inputs and integer labels (tensors or arrays), a dataset of such pairs, or
            an iterable of batches ``(inputs, labels)``.
        batch: Examples per forward pass; an iterable keeps its own batches.

    Raises:
        TypeError: If the labels are not integers, or the outputs are no tensor.
        ValueError: If ``test`` is empty.
    """
    device = next((p.device for p in model.parameters()), HOST)
    right = total = 0
    with _eval_mode(model), torch.no_grad():
        for inputs, labels in _pairs(test, batch):
            outputs = model(inputs.to(device))
            if not isinstance(outputs, Tensor) or labels.is_floating_point():
                raise TypeError(
                    "accuracy needs outputs of shape (batch, classes) and integer labels, got "
                    f"{_kind(outputs)} and {labels.dtype}"
                )
            right += int((outputs.argmax(1) == labels.to(device)).sum())
            total += labels.numel()
    if total == 0:
        raise ValueError("accuracy needs at least one example, got none")
    return right / total


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _pairs(test: object, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    check_size("batch", batch)
    if isinstance(test, tuple) and len(test) == 2 and all(map(_is_array, test)):
        inputs, labels = map(torch.as_tensor, test)
        yield from zip(inputs.split(batch), labels.split(batch), strict=True)
        return
    if isinstance(test, Dataset):
        # A loader draws a seed: from this generator, so that the global one is not changed.
        test = DataLoader(test, batch_size=batch, generator=torch.Generator())
    if not isinstance(test, Iterable):
        raise TypeError(f"test data must be tensors, a dataset or a loader, got {_kind(test)}")
    for item in test:
        if not (isinstance(item, tuple | list) and len(item) == 2 and all(map(_is_array, item))):
            raise TypeError(f"a batch of test data must be (inputs, labels), got {_kind(item)}")
        yield torch.as_tensor(item[0]), torch.as_tensor(item[1])


def _torchvision_model(name: str, classes: int | None) -> nn.Module:
    models = import_torchvision().models
    known: list[str] = models.list_models(module=models)  # Classifiers only.
    if name not in known:
        raise ValueError(_unknown("torchvision.models", name, known))
    more = {} if classes is None else {"num_classes": classes}
    model: nn.Module = models.get_model(name, weights=None, **more)
    return model


def _digits(pixels: int) -> DataSource:
    """The digits as float32 images of shape ``(examples, 3, pixels, pixels)``."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ImportError(
            f"the digits need {error.name}, which is not installed: "
            "pip install 'torch-autobatch[demo]'",
            name=error.name,
        ) from None
    digits = load_digits()
    images = torch.as_tensor(digits.images, dtype=torch.float32)[:, None]  # (1797, 1, 8, 8)
    labels = torch.as_tensor(digits.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order[:_DIGITS_TEST], order[_DIGITS_TEST:]
    images = (images - images[train].mean()) / images[train].std()
    large = F.interpolate(images, size=(pixels, pixels), mode="bilinear", align_corners=False)

    def part(rows: Tensor) -> tuple[Tensor, Tensor]:
        return large[rows].repeat(1, 3, 1, 1), labels[rows]

    return DataSource(train=part(train), test=part(test), classes=10)


def _image_folder(path: Path, pixels: int) -> DataSource:
    """Images in one folder per class, resized and center-cropped to ``pixels``."""
    parts = [path / name for name in ("train", "val", "test") if (path / name).is_dir()]
    has_train = bool(parts) and parts[0].name == "train"
    train = _read_folder(parts[0] if has_train else path, pixels)
    test = _read_folder(parts[1], pixels) if has_train and len(parts) > 1 else None
    classes: list[str] = train.classes  # type: ignore[attr-defined]  # ImageFolder's.
    others: list[str] = classes if test is None else test.classes  # type: ignore[attr-defined]
    if classes != others:
        raise ValueError(
            f"the classes of {parts[0]} and {parts[1]} must be the same, got {classes} and {others}"
        )
    return DataSource(train=train, test=test, classes=len(classes))


def _read_folder(path: Path, pixels: int) -> Dataset[object]:
    vision = import_torchvision()
    transforms = vision.transforms
    steps = [
        transforms.Resize(pixels),
        transforms.CenterCrop(pixels),
        transforms.ToTensor(),
        transforms.Normalize(_IMAGENET_MEAN, _IMAGENET_STD),
    ]
    try:
        folder: Dataset[object] = vision.datasets.ImageFolder(path, transforms.Compose(steps))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"no images by class in {path}: {error}") from None
    return folder


def _find(name: str, *, what: str, names: str) -> object:
    """Return the object ``package.module:attribute``; search the working directory first."""
    module_name, parts = factory_of(name, what=what, names=names)
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # Not removed later: the module may import other modules later.
    found: object = _import(module_name, name)
    for part in parts:
        if not hasattr(found, part):
            raise ValueError(_unknown(module_name, part, dir(found)))
        found = getattr(found, part)
    return found


def _import(module_name: str, name: str) -> object:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if f"{module_name}.".startswith(f"{error.name}."):  # The module or one of its packages.
            absent = error.name
        else:
            raise
    raise ValueError(
        f"there is no module {absent} for {name!r}, in the working directory or installed"
    )


def _train_and_test(data: object) -> tuple[object, object | None]:
    if isinstance(data, tuple) and len(data) == 2 and not any(map(_is_array, data)):
        return data
    return data, None


def _count_classes(train: object) -> int | None:
    """Return the length of the dataset's ``classes``, or the largest integer label plus 1."""
    dataset = getattr(train, "dataset", train)
    if isinstance(names := getattr(dataset, "classes", None), list | tuple):
        return len(names)
    pair = getattr(dataset, "tensors", dataset)
    if not (isinstance(pair, tuple) and len(pair) == 2 and all(map(_is_array, pair))):
        return None
    labels = torch.as_tensor(pair[1])
    integers = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    return int(labels.max()) + 1 if integers and labels.ndim == 1 and len(labels) else None


def _is_array(value: object) -> bool:
    return isinstance(value, Tensor | np.ndarray)


def _kind(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _unknown(where: str, name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name.lower(), list(known), n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    return f"{where} has no {name!r}{hint}"
