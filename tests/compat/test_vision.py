import importlib
import subprocess
import sys
from types import ModuleType

import pytest
import torch

from autobatch.compat import torchvision


def in_a_fresh_process(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_a_resnet_can_be_built_whatever_build_torchvision_is() -> None:
    run = in_a_fresh_process(
        "import torch; from autobatch.compat.torchvision import import_torchvision as load\n"
        "assert load() is load()\n"
        "model = load().models.resnet18(num_classes=10)\n"
        "assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)"
    )
    assert run.returncode == 0, run.stderr


def test_the_detour_is_still_needed_where_it_is_taken() -> None:
    """The control: when this fails, ``_define_schemas`` can go."""
    if torch.version.cuda is not None:
        pytest.skip("torchvision's operators load beside this torch")
    run = in_a_fresh_process("import torchvision")
    if run.returncode == 0:
        pytest.skip("this torchvision imports by itself")
    assert "operator torchvision::nms does not exist" in run.stderr


def test_nothing_is_defined_where_torchvision_imports_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    healthy = ModuleType("torchvision")
    monkeypatch.setitem(sys.modules, "torchvision", healthy)
    monkeypatch.setattr(torchvision, "_define_schemas", lambda: pytest.fail("defined all the same"))
    assert torchvision.import_torchvision() is healthy


def importing_raises(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def refuse(_name: str) -> ModuleType:
        raise error

    monkeypatch.setattr(importlib, "import_module", refuse)


@pytest.mark.parametrize("name", ["torchvision", "PIL"])
def test_what_is_not_installed_is_named_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    importing_raises(monkeypatch, ModuleNotFoundError(f"No module named {name!r}", name=name))
    with pytest.raises(ImportError, match=rf"{name}.*pip install 'torch-autobatch\[vision\]'"):
        torchvision.import_torchvision()


@pytest.mark.parametrize(
    "error",
    [ModuleNotFoundError("No module named 'numpy'", name="numpy"), RuntimeError("CUDA mismatch")],
)
def test_any_other_failure_passes_through(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    importing_raises(monkeypatch, error)
    monkeypatch.setattr(torchvision, "_define_schemas", lambda: pytest.fail("not the reason"))
    with pytest.raises(type(error)) as caught:
        torchvision.import_torchvision()
    assert caught.value is error
