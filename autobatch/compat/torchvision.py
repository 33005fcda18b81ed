"""An import of torchvision that succeeds even if torchvision's compiled operators do not load."""

import functools
import importlib
from types import ModuleType

import torch


def import_torchvision() -> ModuleType:
    """Return torchvision; its models and transforms work whether or not its operators load.

    torchvision's default build is for CUDA. Its operators do not load beside a CPU build of torch,
    and since torchvision 0.28 the import itself fails there: torchvision registers a fake
    implementation of the operator ``torchvision::nms`` (``_meta_registrations.py``), and no library
    has defined that operator. Only in this case this function defines the operator's schema and
    imports torchvision again. A call of the operator, which detection models contain, still fails;
    classification models do not call the operator.

    Raises:
        ImportError: If torchvision or Pillow is not installed.

    Example:
        >>> model = import_torchvision().models.resnet18(num_classes=10)
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
    """Define the operators that torchvision 0.28 expects, once.

    The schemas are those of torchvision/csrc/ops/nms.cpp and quantized/cpu/qnms_kernel.cpp. They
    exist as long as the returned library. This function can be deleted when ``import torchvision``
    succeeds beside a CPU build of torch; a test in test_vision.py fails then.
    """
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library
