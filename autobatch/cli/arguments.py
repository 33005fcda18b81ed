"""What the commands can be told: every option once, with its help, and no import of torch.

Importing torch takes seconds, and help or a wrong argument should be answered before that.
"""

import enum
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

from typer import Argument, Option

from autobatch.units import parse_bytes, parse_headroom

MODEL_NAMES: Final = "torchvision:resnet18 or package.module:factory"
DATA_NAMES: Final = "digits, imagefolder:PATH or package.module:factory"
IMAGES: Final = "images"  # The data of a prediction that names none.


class OptimizerName(enum.StrEnum):
    """The optimizers that the command line knows."""

    ADAMW = "adamw"
    SGD = "sgd"


class PrecisionChoice(enum.StrEnum):
    """What forward passes can compute in."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


class BatchNormChoice(enum.StrEnum):
    """What BatchNorm can do in a batch that is cut."""

    MICRO = "micro"
    FROZEN = "frozen"
    REFUSE = "refuse"


class PreferChoice(enum.StrEnum):
    """Which of the sizes that fit training can take."""

    LARGEST = "largest"
    FASTEST = "fastest"


class ModeChoice(enum.StrEnum):
    """What a search can try."""

    TRAIN = "train"
    INFERENCE = "inference"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelArguments:
    """What every command that runs a model takes: the model, its data and the step's options.

    Raises:
        ValueError: If a name cannot be right, with the name.
    """

    model: Annotated[str, Argument(metavar="MODEL", help=f"{MODEL_NAMES}.", show_default=False)]
    data: Annotated[str, Option(help=f"{DATA_NAMES}.")] = "digits"
    pixels: Annotated[int, Option(min=1, help="Height and width of the images.")] = 64
    optimizer: Annotated[OptimizerName, Option(help="Its state takes memory as well.")] = (
        OptimizerName.ADAMW
    )
    precision: Annotated[PrecisionChoice, Option(help="What forward passes compute in.")] = (
        PrecisionChoice.FP32
    )
    clip_grad_norm: Annotated[
        float | None, Option(help="Largest norm of a step's gradient. Default: no clipping.")
    ] = None
    batch_norm: Annotated[
        BatchNormChoice, Option(help="What BatchNorm does in a batch that is cut.")
    ] = BatchNormChoice.MICRO

    def __post_init__(self) -> None:
        if not self.model.startswith("torchvision:"):
            factory_of(self.model, what="model", names=MODEL_NAMES)
        if self.data not in ("digits", IMAGES) and not self.data.startswith("imagefolder:"):
            factory_of(self.data, what="data", names=DATA_NAMES)


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalArguments(ModelArguments):
    """What the commands take that run a model here: the memory, the device, the seed.

    Raises:
        ValueError: If a name or a size cannot be right, with its value.
    """

    memory_limit: Annotated[
        str | None,
        Option(help='For the whole process: "256MiB", "24GiB". Default: what the device has.'),
    ] = None
    headroom: Annotated[
        str | None, Option(help='Keep so much free: "1GiB", or 0. Default: 2 %, at least 300 MiB.')
    ] = None
    device: Annotated[
        str | None, Option(help='"cpu", "cuda" or "cuda:1". Default: a GPU if there is one.')
    ] = None
    lr: Annotated[float, Option(min=0, help="Learning rate.")] = 1e-3
    seed: Annotated[int | None, Option(help="For weights and order. Default: a new one.")] = None

    def __post_init__(self) -> None:
        ModelArguments.__post_init__(self)
        if self.memory_limit is not None:
            parse_bytes(self.memory_limit, name="memory_limit")
        if self.headroom is not None:
            parse_headroom(self.headroom)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainArguments(LocalArguments):
    """What ``autobatch train`` takes."""

    desired: Annotated[int, Option(min=1, help="Examples per optimizer step.")] = 256
    epochs: Annotated[int, Option(min=1, help="How often all data is seen.")] = 1
    max_steps: Annotated[int | None, Option(min=1, help="End after so many steps.")] = None
    prefer: Annotated[
        PreferChoice, Option(help="The fewest micro-batches, or the most examples a second.")
    ] = PreferChoice.LARGEST
    checkpoint_dir: Annotated[
        Path | None,
        Option(help="Save here after each epoch and at Ctrl-C, and continue from what is here."),
    ] = None
    save: Annotated[Path | None, Option(help="Write the trained weights here.")] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FindArguments(LocalArguments):
    """What ``autobatch find`` takes."""

    ceiling: Annotated[
        int | None, Option(min=1, help="Largest size of interest. Default: the data's.")
    ] = None
    mode: Annotated[
        ModeChoice, Option(help="A training step, or a forward pass without gradients.")
    ] = ModeChoice.TRAIN
    multiple_of: Annotated[int, Option(min=1, help="Try only multiples of this.")] = 1
    plot: Annotated[
        Path | None, Option(help="Draw memory over size into this file: memory.png.")
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictArguments(ModelArguments):
    """What ``autobatch predict`` takes."""

    data: Annotated[str, Option(help=f"{IMAGES}: blank ones, of 1000 classes; {DATA_NAMES}.")] = (
        IMAGES
    )
    pixels: Annotated[int, Option(min=1, help="Height and width of the images.")] = 224
    gpu: Annotated[
        list[str] | None,
        Option(help='"RTX 4090"; several times for several, "all" for the catalogue.'),
    ] = None
    memory: Annotated[
        str | None, Option(help='Of any other card: "24GiB", in the place of --gpu.')
    ] = None
    desired: Annotated[int | None, Option(min=1, help="Examples per optimizer step.")] = None
    ceiling: Annotated[
        int | None, Option(min=1, help="Largest size of interest. Default: the data's.")
    ] = None
    mode: Annotated[
        ModeChoice, Option(help="A training step, or a forward pass without gradients.")
    ] = ModeChoice.TRAIN
    plot: Annotated[
        Path | None, Option(help="Draw the peak over the batch into this file: peak.png.")
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputArguments:
    """How a command writes its result; progress goes to the standard error."""

    as_json: Annotated[bool, Option("--json", help="Write the result as JSON.")] = False
    quiet: Annotated[bool, Option("--quiet", "-q", help="Write the result only.")] = False
    debug: Annotated[bool, Option("--debug", help="Write the traceback of an error.")] = False


def factory_of(name: str, *, what: str, names: str) -> tuple[str, list[str]]:
    """Return the module and the attributes that ``package.module:factory`` names.

    Raises:
        ValueError: If ``name`` has another form; the message lists ``names``.
    """
    module, _, path = name.partition(":")
    parts = path.split(".")
    if not all(part.isidentifier() for part in [*module.split("."), *parts]):
        raise ValueError(f"{what} must be {names}, got {name!r}")
    return module, parts
