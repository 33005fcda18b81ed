"""The options of all commands, with their help, defined without importing torch.

Importing torch takes seconds, and ``--help`` and invalid arguments are answered without it.
"""

import enum
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

from typer import Argument, Option

from autobatch.units import parse_bytes, parse_headroom

MODEL_NAMES: Final = "torchvision:resnet18 or package.module:factory"
DATA_NAMES: Final = "digits, imagefolder:PATH or package.module:factory"
IMAGES: Final = "images"  # The default data of a prediction.


class OptimizerName(enum.StrEnum):
    """The optimizers of ``--optimizer``."""

    ADAMW = "adamw"
    SGD = "sgd"


class PrecisionChoice(enum.StrEnum):
    """The number formats of ``--precision``."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


class BatchNormChoice(enum.StrEnum):
    """The modes of ``--batch-norm``."""

    MICRO = "micro"
    FROZEN = "frozen"
    REFUSE = "refuse"


class PreferChoice(enum.StrEnum):
    """The choices of ``--prefer``."""

    LARGEST = "largest"
    FASTEST = "fastest"


class ModeChoice(enum.StrEnum):
    """The choices of ``--mode``."""

    TRAIN = "train"
    INFERENCE = "inference"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelArguments:
    """Options of every command that runs a model: the model, its data and the training step.

    Raises:
        ValueError: If the name of the model or of the data has an invalid form.
    """

    model: Annotated[
        str,
        Argument(metavar="MODEL", help=f"{MODEL_NAMES} (a function of yours).", show_default=False),
    ]
    data: Annotated[str, Option(help=f"Data: {DATA_NAMES}.")] = "digits"
    pixels: Annotated[int, Option(min=1, help="Height and width of the images.")] = 64
    optimizer: Annotated[OptimizerName, Option(help="The optimizer, whose state takes memory.")] = (
        OptimizerName.ADAMW
    )
    precision: Annotated[PrecisionChoice, Option(help="Number format of forward passes.")] = (
        PrecisionChoice.FP32
    )
    clip_grad_norm: Annotated[
        float | None, Option(help="Clip the gradient to this 2-norm. Default: no clipping.")
    ] = None
    batch_norm: Annotated[
        BatchNormChoice,
        Option(
            help="BatchNorm in micro-batches: normalize each alone (micro), use the running "
            "statistics (frozen), or end with an error (refuse)."
        ),
    ] = BatchNormChoice.MICRO

    def __post_init__(self) -> None:
        if not self.model.startswith("torchvision:"):
            factory_of(self.model, what="model", names=MODEL_NAMES)
        if self.data not in ("digits", IMAGES) and not self.data.startswith("imagefolder:"):
            factory_of(self.data, what="data", names=DATA_NAMES)


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalArguments(ModelArguments):
    """Options of the commands that run a model on this machine: memory, device, seed.

    Raises:
        ValueError: If a name or a size is invalid, with its value.
    """

    memory_limit: Annotated[
        str | None,
        Option(help='Memory for the whole process: "256MiB", "24GiB". Default: all of the device.'),
    ] = None
    headroom: Annotated[
        str | None,
        Option(help='Memory to keep free: "1GiB", or 0. Default: 2 %, at least 300 MiB.'),
    ] = None
    device: Annotated[
        str | None,
        Option(help='Device: "cpu", "cuda" or "cuda:1". Default: a GPU if there is one.'),
    ] = None
    lr: Annotated[float, Option(min=0, help="Learning rate.")] = 1e-3
    seed: Annotated[int | None, Option(help="Seed of weights and data order. Default: random.")] = (
        None
    )

    def __post_init__(self) -> None:
        ModelArguments.__post_init__(self)
        if self.memory_limit is not None:
            parse_bytes(self.memory_limit, name="memory_limit")
        if self.headroom is not None:
            parse_headroom(self.headroom)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainArguments(LocalArguments):
    """The options of ``autobatch train``."""

    desired: Annotated[int, Option(min=1, help="Examples per optimizer step.")] = 256
    epochs: Annotated[int, Option(min=1, help="Passes over the training data.")] = 1
    max_steps: Annotated[
        int | None, Option(min=1, help="Stop after this many optimizer steps.")
    ] = None
    prefer: Annotated[
        PreferChoice,
        Option(help="Micro-batch size: the largest that fits, or the one with most examples/s."),
    ] = PreferChoice.LARGEST
    checkpoint_dir: Annotated[
        Path | None,
        Option(help="Save checkpoints here, each epoch and at Ctrl-C; resume from the last one."),
    ] = None
    save: Annotated[Path | None, Option(help="Write the trained weights to this file.")] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FindArguments(LocalArguments):
    """The options of ``autobatch find``."""

    ceiling: Annotated[
        int | None, Option(min=1, help="Largest batch to try. Default: all examples of the data.")
    ] = None
    mode: Annotated[
        ModeChoice, Option(help="Run training steps, or forward passes without gradients.")
    ] = ModeChoice.TRAIN
    multiple_of: Annotated[int, Option(min=1, help="Try only multiples of this size.")] = 1
    plot: Annotated[
        Path | None, Option(help="Plot memory over batch size to this file (.png, .svg, .pdf).")
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictArguments(ModelArguments):
    """The options of ``autobatch predict``."""

    data: Annotated[str, Option(help=f"Data: {IMAGES} (blank, 1000 classes), {DATA_NAMES}.")] = (
        IMAGES
    )
    pixels: Annotated[int, Option(min=1, help="Height and width of the images.")] = 224
    gpu: Annotated[
        list[str] | None,
        Option(help='Name of a GPU: "RTX 4090". Repeat for several; "all" for all known GPUs.'),
    ] = None
    memory: Annotated[str | None, Option(help='Memory of a GPU instead of its name: "24GiB".')] = (
        None
    )
    desired: Annotated[int | None, Option(min=1, help="Examples per optimizer step.")] = None
    ceiling: Annotated[
        int | None, Option(min=1, help="Largest batch to try. Default: all examples of the data.")
    ] = None
    mode: Annotated[
        ModeChoice, Option(help="Run training steps, or forward passes without gradients.")
    ] = ModeChoice.TRAIN
    plot: Annotated[
        Path | None,
        Option(help="Plot peak memory over batch size to this file (.png, .svg, .pdf)."),
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputArguments:
    """Options for the output of a command; progress goes to standard error."""

    as_json: Annotated[bool, Option("--json", help="Write the result as JSON.")] = False
    quiet: Annotated[bool, Option("--quiet", "-q", help="Write no progress.")] = False
    debug: Annotated[bool, Option("--debug", help="Write the traceback after an error.")] = False


def factory_of(name: str, *, what: str, names: str) -> tuple[str, list[str]]:
    """Split ``package.module:attribute.attribute`` into the module and the list of attributes.

    Args:
        name: The name to split.
        what: The name of the argument, for the error.
        names: The valid forms, for the error.

    Raises:
        ValueError: If ``name`` has another form.
    """
    module, _, path = name.partition(":")
    parts = path.split(".")
    if not all(part.isidentifier() for part in [*module.split("."), *parts]):
        raise ValueError(f"{what} must be {names}, got {name!r}")
    return module, parts
