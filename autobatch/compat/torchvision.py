"""torchvision, importable also where its compiled operators do not load."""

import functools
import importlib
from types import ModuleType

import torch


def import_torchvision() -> ModuleType:
    """Return torchvision; models and transforms work whether or not its operators load.

    torchvision's default build is for CUDA. Beside a CPU build of torch its operators do not load,
    and since 0.28 that ends the import itself: it gives the operator ``torchvision::nms`` a fake
    implementation (``_meta_registrations.py``) although nothing has defined it. Then, and only
    then, the operator's schema is defined here and the import is run again. Calling the operator
    (in detection models) fails as before; classification never does.

    Raises:
        ImportError: If torchvision or Pillow is not installed.
    """
    missing = ""
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        if error.name not in {"torchvision", "PIL"}:
            raise
        missing = error.name
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    if missing:
        raise ImportError(
            f"this needs {missing}, which is not installed: pip install 'torch-autobatch[vision]'",
            name=missing,
        )
    _define_schemas()
    return importlib.import_module("torchvision")


@functools.cache
def _define_schemas() -> torch.library.Library:
    """Define what torchvision 0.28 expects to find, once. The schemas live as long as the library.

    Both stand in torchvision/csrc/ops/nms.cpp and quantized/cpu/qnms_kernel.cpp. To be deleted when
    ``import torchvision`` succeeds beside a CPU build of torch (test_vision.py tells).
    """
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library
