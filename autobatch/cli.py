"""The command line: arguments in, an exit code out.

What a command needs of torch is imported once its arguments are known to be good: that takes
seconds, and help or an error should not.
"""

import enum
import functools
import importlib.metadata
import json
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, TextIO

import typer

from autobatch.commands.arguments import (
    DATA_NAMES,
    IMAGES,
    MODEL_NAMES,
    ModeChoice,
    OptimizerName,
    PrecisionChoice,
    PreferChoice,
    check_names,
)
from autobatch.commands.reports import (
    Fields,
    Journal,
    Report,
    Watch,
    failure_fields,
    plan_fields,
)
from autobatch.display import Display, print_table
from autobatch.errors import ISOLATED, TRACED, DoesNotFitError
from autobatch.events import Event
from autobatch.plan import BatchPlan


class ExitCode(enum.IntEnum):
    """How a command ended."""

    DONE = 0
    FAILED = 1
    BAD_ARGUMENTS = 2
    DOES_NOT_FIT = 3
    INTERRUPTED = 130


Model = Annotated[str, typer.Argument(metavar="MODEL", help=f"{MODEL_NAMES}.", show_default=False)]
Data = Annotated[str, typer.Option(help=f"{DATA_NAMES}.")]
MemoryLimit = Annotated[
    str | None,
    typer.Option(help='For the whole process: "256MiB", "24GiB". Default: what the device has.'),
]
Headroom = Annotated[
    str | None,
    typer.Option(help='Keep so much free: "1GiB", or 0. Default: 2 %, at least 300 MiB.'),
]
Device = Annotated[
    str | None, typer.Option(help='"cpu", "cuda" or "cuda:1". Default: a GPU if there is one.')
]
Pixels = Annotated[int, typer.Option(min=1, help="Height and width of the images.")]
Optimizer = Annotated[OptimizerName, typer.Option(help="Its state takes memory as well.")]
LearningRate = Annotated[float, typer.Option(min=0, help="Learning rate.")]
Precision = Annotated[PrecisionChoice, typer.Option(help="What forward passes compute in.")]
Seed = Annotated[int | None, typer.Option(help="For weights and order. Default: a new one.")]
Json = Annotated[bool, typer.Option("--json", help="Write the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Write the result only.")]
Debug = Annotated[bool, typer.Option("--debug", help="Write the traceback of an error.")]

app = typer.Typer(
    name="autobatch",
    help="Find the largest batch a device tolerates, and train on the batch you want.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; None takes the process's own arguments."""
    try:
        # Calling ``app`` itself would replace ``sys.excepthook``, and leave it replaced.
        command = typer.main.get_command(app)
        command(args=None if arguments is None else list(arguments), prog_name="autobatch")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else ExitCode.DONE
    return ExitCode.DONE


@app.command()
def train(
    model: Model,
    data: Data = "digits",
    desired: Annotated[int, typer.Option(min=1, help="Examples per optimizer step.")] = 256,
    memory_limit: MemoryLimit = None,
    headroom: Headroom = None,
    epochs: Annotated[int, typer.Option(min=1, help="How often all data is seen.")] = 1,
    max_steps: Annotated[int | None, typer.Option(min=1, help="End after so many steps.")] = None,
    optimizer: Optimizer = OptimizerName.ADAMW,
    lr: LearningRate = 1e-3,
    pixels: Pixels = 64,
    seed: Seed = None,
    device: Device = None,
    precision: Precision = PrecisionChoice.FP32,
    prefer: Annotated[
        PreferChoice, typer.Option(help="The fewest micro-batches, or the most examples a second.")
    ] = PreferChoice.LARGEST,
    clip_grad_norm: Annotated[
        float | None, typer.Option(help="Largest norm of a step's gradient.")
    ] = None,
    checkpoint_dir: Annotated[
        Path | None,
        typer.Option(help="Save here after each epoch and at Ctrl-C, and go on from what is here."),
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Write the trained weights here.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train MODEL on the batch you want, in pieces that fit."""

    def work(watch: Watch) -> Report:
        check_names(model, data, memory_limit, headroom)
        from autobatch.commands.runs import TrainingRun

        return TrainingRun(
            model=model,
            data=data,
            pixels=pixels,
            optimizer=optimizer,
            lr=lr,
            memory_limit=memory_limit,
            headroom=headroom,
            device=device,
            seed=seed,
            desired=desired,
            epochs=epochs,
            max_steps=max_steps,
            precision=precision,
            prefer=prefer,
            clip_grad_norm=clip_grad_norm,
            checkpoint_dir=checkpoint_dir,
            save=save,
        ).run(watch)

    conclude(work, Output(as_json=as_json, quiet=quiet, debug=debug))


@app.command()
def find(
    model: Model,
    data: Data = "digits",
    ceiling: Annotated[
        int | None, typer.Option(min=1, help="Largest size of interest. Default: the data's.")
    ] = None,
    memory_limit: MemoryLimit = None,
    headroom: Headroom = None,
    mode: Annotated[
        ModeChoice, typer.Option(help="A training step, or a forward pass without gradients.")
    ] = ModeChoice.TRAIN,
    multiple_of: Annotated[int, typer.Option(min=1, help="Try only multiples of this.")] = 1,
    optimizer: Optimizer = OptimizerName.ADAMW,
    lr: LearningRate = 1e-3,
    pixels: Pixels = 64,
    seed: Seed = None,
    device: Device = None,
    precision: Precision = PrecisionChoice.FP32,
    plot: Annotated[
        Path | None, typer.Option(help="Draw memory over size into this file: memory.png.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Find the largest batch with which MODEL can train, or infer."""

    def work(watch: Watch) -> Report:
        check_names(model, data, memory_limit, headroom)
        from autobatch.commands.runs import SearchRun

        return SearchRun(
            model=model,
            data=data,
            pixels=pixels,
            optimizer=optimizer,
            lr=lr,
            memory_limit=memory_limit,
            headroom=headroom,
            device=device,
            seed=seed,
            ceiling=ceiling,
            mode=mode,
            multiple_of=multiple_of,
            precision=precision,
            plot=plot,
        ).run(watch)

    conclude(work, Output(as_json=as_json, quiet=quiet, debug=debug))


@app.command()
def predict(
    model: Model,
    gpu: Annotated[
        list[str] | None,
        typer.Option(help='"RTX 4090"; several times for several, "all" for the catalogue.'),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help='Of any other card: "24GiB", in the place of --gpu.')
    ] = None,
    data: Annotated[
        str, typer.Option(help=f"{IMAGES}: blank ones, of 1000 classes; {DATA_NAMES}.")
    ] = IMAGES,
    desired: Annotated[int | None, typer.Option(min=1, help="Examples per optimizer step.")] = None,
    ceiling: Annotated[
        int | None, typer.Option(min=1, help="Largest size of interest. Default: the data's.")
    ] = None,
    mode: Annotated[
        ModeChoice, typer.Option(help="A training step, or a forward pass without gradients.")
    ] = ModeChoice.TRAIN,
    optimizer: Optimizer = OptimizerName.ADAMW,
    pixels: Pixels = 224,
    precision: Precision = PrecisionChoice.FP32,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the peak over the batch into this file: peak.png.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Predict the largest batch with which MODEL can train, or infer, on a GPU not here."""

    def work(watch: Watch) -> Report:
        check_names(model, data)
        from autobatch.commands.runs import PredictionRun

        return PredictionRun(
            model=model,
            data=data,
            pixels=pixels,
            optimizer=optimizer,
            desired=desired,
            ceiling=ceiling,
            mode=mode,
            plot=plot,
            gpus=tuple(gpu or ()),
            memory=memory,
            precision=precision,
        ).run(watch)

    conclude(work, Output(as_json=as_json, quiet=quiet, debug=debug))


@app.command()
def plan(
    tolerable: Annotated[int, typer.Option(min=1, help="The most examples that fit at once.")],
    desired: Annotated[int, typer.Option(min=1, help="Examples per optimizer step.")] = 256,
    as_json: Json = False,
) -> None:
    """Show how a desired batch is cut."""
    cut = BatchPlan(desired=desired, tolerable=tolerable)
    _write(Report(text=str(cut), fields=plan_fields(cut)), as_json=as_json)


@app.command()
def devices(as_json: Json = False) -> None:
    """Show the GPUs as NVML and torch see them, side by side."""
    from autobatch.commands.inventory import HEADERS, take_inventory

    inventory = take_inventory()
    _write(Report(text="\n".join(inventory.lines), fields=inventory.fields), as_json=as_json)
    if inventory.rows and not as_json:
        typer.echo()
        print_table(HEADERS, inventory.rows)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"autobatch {_version()}, torch {importlib.metadata.version('torch')}")
        raise typer.Exit


def _version() -> str:
    try:
        return importlib.metadata.version("torch-autobatch")
    except importlib.metadata.PackageNotFoundError:  # A checkout that was not installed.
        return "(not installed)"


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the versions."),
    ] = False,
) -> None:
    """Find the largest batch a device tolerates, and train on the batch you want."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What a command writes.

    Attributes:
        as_json: The result as JSON, an error too; progress stays on the standard error.
        quiet: No progress.
        debug: The traceback of an error.
    """

    as_json: bool = False
    quiet: bool = False
    debug: bool = False


class _Watch:
    """Keeps a journal, and shows what goes on unless it is to be quiet."""

    def __init__(self, journal: Journal, display: Display | None) -> None:
        self._journal = journal
        self._display = display

    def __call__(self, event: Event) -> None:
        self._journal(event)
        if self._display is not None:
            self._display(event)

    def log(self, text: str) -> None:
        if self._display is not None:
            self._display.log(text)


def conclude(work: Callable[[Watch], Report], output: Output) -> None:
    """Write what ``work`` reports, or why it ended and what was done until then.

    Raises:
        typer.Exit: With the code of the failure, if there was one.
    """
    journal = Journal()
    display = None if output.quiet else Display()
    failure: BaseException | None = None
    try:
        with display or nullcontext():
            report = work(_Watch(journal, display))
    except (Exception, KeyboardInterrupt) as ended:  # noqa: BLE001  # Each has its exit code.
        failure = ended
    if failure is None:
        if display is not None and sys.stdout.isatty():
            typer.echo()
        _write(report, as_json=output.as_json)
        return
    if output.debug:
        typer.echo("".join(traceback.format_exception(failure)), err=True)
    code, message = exit_code(failure), _explained(failure, journal)
    told = message if code is ExitCode.INTERRUPTED else f"error: {message}"
    typer.echo(_wrapped(told, sys.stderr), err=True)
    if output.as_json:
        error = {"kind": type(failure).__name__, "message": message, "exit_code": int(code)}
        _write_json({"error": error | failure_fields(failure), "done": journal.fields})
    raise typer.Exit(code)


def exit_code(error: BaseException) -> ExitCode:
    """Return the code of a command that ``error`` ended."""
    if isinstance(error, KeyboardInterrupt):
        return ExitCode.INTERRUPTED
    torch = sys.modules.get("torch")  # Without it nothing of its own was raised.
    if isinstance(error, DoesNotFitError) or (torch and isinstance(error, torch.OutOfMemoryError)):
        return ExitCode.DOES_NOT_FIT
    if isinstance(error, ValueError | TypeError) and _is_ours(error):
        return ExitCode.BAD_ARGUMENTS
    return ExitCode.FAILED


def _explained(error: BaseException, journal: Journal) -> str:
    """Say what ended the command, and what was done until then."""
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted {journal}" + f"; {error}" * bool(str(error))
    notes = getattr(error, "__notes__", ())
    done = "".join(f"\n{note}" for note in notes if not note.startswith((TRACED, ISOLATED)))
    if journal.training is not None:
        done += f"\nit happened {journal}"
    if _is_ours(error):
        return f"{_with_options(str(error))}{done}"
    return f"{type(error).__name__}: {error}{_place(error)}{done}"


def _with_options(message: str) -> str:
    """Name the command line's options in the place of the library's arguments.

    A name of several words is one wherever it stands, any other where it begins a message or is
    followed by its value.
    """

    def option(found: re.Match[str]) -> str:
        return _options_by_name().get(found[0], found[0])

    names = r"^[a-z]+(?= (?:must|cannot) )|\b[a-z]+(?==)|\b[a-z]+(?:_[a-z]+)+\b"
    return re.sub(names, option, message)


@functools.cache
def _options_by_name() -> dict[str, str]:
    """Every command's: ``memory_limit`` to ``--memory-limit``."""
    commands = typer.main.get_group(app).commands.values()
    found = {p.name: p.opts[0] for command in commands for p in command.params if p.name}
    return {name: option for name, option in found.items() if option.startswith("--")}


def _place(error: BaseException) -> str:
    """Where the user's code was when ``error`` was raised, if it was there at all."""
    frames = traceback.walk_tb(error.__traceback__)
    theirs = [(frame.f_code.co_filename, line) for frame, line in frames if not _is_library(frame)]
    return f" ({theirs[-1][0]}:{theirs[-1][1]}; --debug shows more)" if theirs else ""


def _is_library(frame: FrameType) -> bool:
    package = _package(frame)
    return package in {"autobatch", "torch", "torchvision"} or package in sys.stdlib_module_names


def _package(frame: FrameType) -> str:
    """The outermost package of the code; its name is only ``__main__`` under ``python -m``."""
    names: dict[str, str | None] = frame.f_globals
    return (names.get("__package__") or names.get("__name__") or "").partition(".")[0]


def _is_ours(error: BaseException) -> bool:
    """Whether autobatch itself raised it: code of the user raises ``ValueError`` too."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and _package(frames[-1]) == "autobatch"


def _write(report: Report, *, as_json: bool) -> None:
    if as_json:
        _write_json(report.fields)
    else:
        typer.echo(_wrapped(report.text, sys.stdout))


def _wrapped(text: str, stream: TextIO) -> str:
    """Break long lines between words on a terminal; a file gets them whole."""
    if not stream.isatty():
        return text
    width = min(typer.get_terminal_size().columns, 100)
    return "\n".join(_filled(line, width) for line in text.splitlines())


def _filled(line: str, width: int) -> str:
    """What goes on below stands two columns further in than the line itself."""
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    return textwrap.fill(line, width, subsequent_indent=indent)


def _write_json(fields: Fields) -> None:
    typer.echo(json.dumps(fields, indent=2, allow_nan=False))
