import sys
from collections.abc import Sized
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from autobatch.cli.loaders import DataSource, accuracy, load_data, load_model

CODE = """
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from autobatch.cli.loaders import DataSource

x, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
dataset = TensorDataset(x, y)

def linear(): return nn.Linear(4, 3)
class Holder:
    model = staticmethod(linear)
model = nn.Linear(4, 2)
def number(): return 3
def needs(size): return nn.Linear(size, 3)
def fails(): raise ValueError("the user's own")

def pair(): return x, y
def arrays(): return np.zeros((6, 4)), np.zeros(6)
def nested(): return (x, x), y
def two_pairs(): return (x, y), (x[:2], y[:2])
def two_sets(): return dataset, dataset
def no_test(): return dataset, None
def loader(): return DataLoader(dataset, batch_size=2)
def batches(): return [(x, y), (x, y)]
def mapping(): return {"x": x, "labels": y}
def source(): return DataSource(train=dataset, classes=7)
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the working directory, which is not on the path."""
    (tmp_path / "mine_for_tests.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.delitem(sys.modules, "mine_for_tests", raising=False)
    return "mine_for_tests"


def pair_of(data: object) -> tuple[Tensor, Tensor]:
    assert isinstance(data, tuple)
    x, y = data
    return x, y


def test_a_torchvision_model_has_as_many_outputs_as_there_are_classes() -> None:
    model = load_model("torchvision:shufflenet_v2_x0_5", 7)
    assert model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 7)


def test_without_classes_a_torchvision_model_keeps_its_own() -> None:
    model = load_model("torchvision:squeezenet1_1")
    assert model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("resnet81", "has no 'resnet81'; did you mean resnet18"),
        ("ResNet18", "did you mean resnet18"),
        ("fasterrcnn_resnet50_fpn", "did you mean"),  # No classifier.
        ("", "has no ''$"),
    ],
)
def test_an_unknown_torchvision_model_is_refused_with_close_names(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match=hint):
        load_model(f"torchvision:{name}", 10)


@pytest.mark.parametrize("attribute", ["linear", "Holder.model", "model"])
def test_a_factory_in_the_working_directory_gives_a_model(mine: str, attribute: str) -> None:
    assert isinstance(load_model(f"{mine}:{attribute}"), nn.Linear)


def test_a_factory_in_a_package_gives_a_model() -> None:
    assert isinstance(load_model("torch.nn:Identity"), nn.Identity)


@pytest.mark.parametrize(
    "name", ["resnet18", "", ":", "package:", ":factory", "a/b.py:make", "a b:c", "..a:c"]
)
def test_a_name_of_no_known_form_is_refused_with_the_forms(name: str) -> None:
    with pytest.raises(ValueError, match=r"model must be torchvision:.* or package\.module:"):
        load_model(name)
    with pytest.raises(ValueError, match="data must be digits, imagefolder:PATH or"):
        load_data(name)


@pytest.mark.parametrize("module", ["nowhere_at_all", "nowhere_at_all.deeper", "torch.nowhere"])
def test_a_module_that_is_not_there_is_a_bad_argument(module: str) -> None:
    with pytest.raises(ValueError, match=r"there is no module .*nowhere"):
        load_model(f"{module}:make")


def test_a_module_that_misses_another_one_says_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_for_tests.py").write_text("import nowhere_at_all")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(ModuleNotFoundError, match="nowhere_at_all"):
        load_model("broken_for_tests:make")


def test_a_missing_attribute_is_refused_with_close_names(mine: str) -> None:
    with pytest.raises(ValueError, match=f"{mine} has no 'liner'; did you mean linear"):
        load_model(f"{mine}:liner")


def test_what_is_no_model_is_refused(mine: str) -> None:
    with pytest.raises(TypeError, match=r"must give a torch\.nn\.Module, got builtins\.int"):
        load_model(f"{mine}:number")


def test_the_factorys_own_error_passes_through(mine: str) -> None:
    with pytest.raises(ValueError, match="the user's own"):
        load_model(f"{mine}:fails")


def test_digits_are_as_promised() -> None:
    source = load_data("digits", pixels=16)
    (x, y), (x_test, y_test) = pair_of(source.train), pair_of(source.test)
    assert (x.shape, x_test.shape) == ((1437, 3, 16, 16), (360, 3, 16, 16))
    assert (x.dtype, y.dtype, source.classes) == (torch.float32, torch.int64, 10)
    assert abs(float(x.mean())) < 0.05
    assert 0.5 < float(x.std()) < 1.5
    assert torch.equal(x[:, 0], x[:, 2])
    assert y.bincount(minlength=10).min() > 100
    assert y_test.bincount(minlength=10).min() > 20


def test_digits_are_split_the_same_way_each_time_and_disturb_no_generator() -> None:
    torch.manual_seed(1)
    first = load_data("digits", pixels=8)
    drawn = torch.rand(1)
    torch.manual_seed(2)
    second = load_data("digits", pixels=8)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), drawn)
    for one, other in zip(pair_of(first.test), pair_of(second.test), strict=True):
        assert torch.equal(one, other)


def test_no_test_digit_is_trained_on() -> None:
    source = load_data("digits", pixels=8)
    train = {tuple(image.flatten().tolist()) for image in pair_of(source.train)[0]}
    test = {tuple(image.flatten().tolist()) for image in pair_of(source.test)[0]}
    assert not train & test


@pytest.mark.parametrize("pixels", [0, -1])
def test_images_without_pixels_are_refused(pixels: int) -> None:
    with pytest.raises(ValueError, match=f"pixels must be at least 1, got {pixels}"):
        load_data("digits", pixels=pixels)


def write_images(folder: Path, classes: list[str], each: int = 2) -> None:
    image_module = pytest.importorskip("PIL.Image")
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(each):
            values = np.full((20, 30, 3), 100 * number, dtype=np.uint8)
            image_module.fromarray(values).save(folder / name / f"{index}.png")


@pytest.mark.parametrize("test_name", ["val", "test"])
def test_an_image_folder_is_cropped_and_normalised(tmp_path: Path, test_name: str) -> None:
    write_images(tmp_path / "train", ["cat", "dog"])
    write_images(tmp_path / test_name, ["cat", "dog"], each=1)
    source = load_data(f"imagefolder:{tmp_path}", pixels=8)
    assert isinstance(source.train, Dataset)
    image, label = source.train[0]
    assert (image.shape, label, source.classes) == ((3, 8, 8), 0, 2)
    assert image[0, 0, 0] == pytest.approx(-0.485 / 0.229)
    assert isinstance(source.test, Sized)
    assert len(source.test) == 2


def test_a_folder_without_parts_is_all_for_training(tmp_path: Path) -> None:
    write_images(tmp_path, ["cat", "dog", "owl"])
    source = load_data(f"imagefolder:{tmp_path}", pixels=8)
    assert (source.classes, source.test) == (3, None)


def test_folders_whose_classes_differ_are_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "train", ["cat", "dog"])
    write_images(tmp_path / "val", ["dog", "owl"])
    with pytest.raises(ValueError, match=r"must be the same, got \['cat', 'dog'\] and \['dog'"):
        load_data(f"imagefolder:{tmp_path}")


def test_a_folder_without_images_is_a_bad_argument(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no images by class in"):
        load_data(f"imagefolder:{tmp_path}")
    with pytest.raises(ValueError, match="no images by class in"):
        load_data(f"imagefolder:{tmp_path / 'absent'}")


@pytest.mark.parametrize(
    ("attribute", "has_test", "classes"),
    [
        ("pair", False, 3),
        ("arrays", False, None),  # Floating labels are no classes.
        ("nested", False, None),
        ("two_pairs", True, 3),
        ("two_sets", True, 3),
        ("no_test", False, 3),
        ("loader", False, 3),
        ("dataset", False, 3),  # An object instead of a factory.
        ("batches", False, None),
        ("mapping", False, None),
        ("source", False, 7),
    ],
)
def test_a_pair_without_tensors_is_train_and_test_and_all_else_is_data(
    mine: str, attribute: str, has_test: bool, classes: int | None
) -> None:
    source = load_data(f"{mine}:{attribute}")
    assert isinstance(source, DataSource)
    assert (source.test is not None, source.classes) == (has_test, classes)


class Parity(nn.Module):
    """Right where the label is the parity of the only feature; wrong in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.BatchNorm1d(1).eval()

    def forward(self, x: Tensor) -> Tensor:
        parity = x[:, 0].long() % 2
        return nn.functional.one_hot(1 - parity if self.training else parity, 2)


FEATURES = torch.arange(10.0)[:, None]
LABELS = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1, 1, 0])  # The last two are wrong.


@pytest.mark.parametrize(
    "test",
    [
        (FEATURES, LABELS),
        (FEATURES.numpy(), LABELS.numpy()),
        TensorDataset(FEATURES, LABELS),
        DataLoader(TensorDataset(FEATURES, LABELS), batch_size=4),
        [(FEATURES[:7], LABELS[:7]), (FEATURES[7:], LABELS[7:])],
    ],
    ids=["tensors", "arrays", "dataset", "loader", "batches"],
)
@pytest.mark.parametrize("batch", [1, 3, 100])
def test_accuracy_is_the_fraction_that_is_right_however_it_is_cut(test: object, batch: int) -> None:
    assert accuracy(Parity(), test, batch=batch) == 0.8


def test_every_module_keeps_its_own_mode() -> None:
    model = Parity()
    accuracy(model, (FEATURES, LABELS))
    assert (model.training, model.frozen.training) == (True, False)
    model.eval()
    accuracy(model, (FEATURES, LABELS))
    assert not model.training


def test_the_mode_comes_back_after_an_error_too() -> None:
    model = Parity()
    with pytest.raises(TypeError):
        accuracy(model, (FEATURES, LABELS.float()))
    assert model.training


def test_measuring_draws_no_random_number() -> None:
    before = torch.get_rng_state()
    accuracy(Parity(), TensorDataset(FEATURES, LABELS))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("test", "error", "words"),
    [
        ((FEATURES[:0], LABELS[:0]), ValueError, "at least one example"),
        ((FEATURES, LABELS.float()), TypeError, "integer labels, got .* torch.float32"),
        ([FEATURES], TypeError, r"must be \(inputs, labels\), got torch.Tensor"),
        (3, TypeError, "must be tensors, a dataset or a loader, got builtins.int"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    test: object, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        accuracy(Parity(), test)


def test_digits_without_scikit_learn_name_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'torch-autobatch\[demo\]'"):
        load_data("digits")
