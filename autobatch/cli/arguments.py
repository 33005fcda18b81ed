"""The names that the command line knows, and what of them can be refused before torch is there."""

import enum
from typing import Final

from autobatch.units import parse_bytes, parse_headroom

MODEL_NAMES: Final = "torchvision:resnet18 or package.module:factory"
DATA_NAMES: Final = "digits, imagefolder:PATH or package.module:factory"
IMAGES: Final = "images"  # The data of a prediction that names none.


class OptimizerName(enum.StrEnum):
    """What the command line can optimize with."""

    ADAMW = "adamw"
    SGD = "sgd"


class PrecisionChoice(enum.StrEnum):
    """What forward passes can compute in."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


class PreferChoice(enum.StrEnum):
    """What training can prefer."""

    LARGEST = "largest"
    FASTEST = "fastest"


class ModeChoice(enum.StrEnum):
    """What a search can rehearse."""

    TRAIN = "train"
    INFERENCE = "inference"


def check_names(
    model: str, data: str, memory_limit: str | None = None, headroom: str | None = None
) -> None:
    """Refuse what can only be a slip: importing torch takes seconds, and this does not.

    Raises:
        ValueError: With the value that came.
    """
    if not model.startswith("torchvision:"):
        factory_of(model, what="model", names=MODEL_NAMES)
    if data not in ("digits", IMAGES) and not data.startswith("imagefolder:"):
        factory_of(data, what="data", names=DATA_NAMES)
    if memory_limit is not None:
        parse_bytes(memory_limit, name="memory_limit")
    if headroom is not None:
        parse_headroom(headroom)


def factory_of(name: str, *, what: str, names: str) -> tuple[str, list[str]]:
    """Return the module and the attributes that ``package.module:factory`` names.

    Raises:
        ValueError: If it is no such name.
    """
    module, _, path = name.partition(":")
    parts = path.split(".")
    if not all(part.isidentifier() for part in [*module.split("."), *parts]):
        raise ValueError(f"{what} must be {names}, got {name!r}")
    return module, parts
