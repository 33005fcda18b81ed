"""The commands of the command line: parse arguments, run a command, return an exit code.

Modules that import torch are imported when a command with valid arguments runs. Importing torch
takes seconds, and ``--help`` and invalid arguments are answered without it.
"""

import enum
import functools
import importlib.metadata
import inspect
import json
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import fields
from types import FrameType
from typing import Annotated, Any, Final, TextIO, TypeVar

import typer

from autobatch.cli.arguments import (
    FindArguments,
    ModelArguments,
    OutputArguments,
    PredictArguments,
    TrainArguments,
)
from autobatch.cli.reports import (
    Fields,
    Journal,
    ProgressLog,
    Report,
    failure_fields,
    plan_fields,
)
from autobatch.display import Display, print_table
from autobatch.errors import ISOLATED, TRACED, DoesNotFitError
from autobatch.events import Event
from autobatch.results.plan import BatchPlan


class ExitCode(enum.IntEnum):
    """The exit codes of the commands."""

    DONE = 0
    FAILED = 1
    BAD_ARGUMENTS = 2
    DOES_NOT_FIT = 3
    INTERRUPTED = 130


Arguments = TypeVar("Arguments", bound=ModelArguments)
Json = Annotated[bool, typer.Option("--json", help="Write the result as JSON.")]
_ABOUT: Final = (
    "Find the largest batch that fits into memory, and train on batches of any size by exact "
    "gradient accumulation."
)

app = typer.Typer(
    name="autobatch",
    help=_ABOUT,
    context_settings={"max_content_width": 100},
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; None reads the arguments of this process."""
    try:
        # Calling ``app`` would replace ``sys.excepthook`` for good.
        command = typer.main.get_command(app)
        command(args=None if arguments is None else list(arguments), prog_name="autobatch")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else ExitCode.DONE
    return ExitCode.DONE


def _command(
    kind: type[Arguments],
) -> Callable[[Callable[[Arguments, ProgressLog], Report]], None]:
    """Register a function as a command whose options are the fields of ``kind``."""

    def register(run: Callable[[Arguments, ProgressLog], Report]) -> None:
        def command(**given: Any) -> None:
            output = OutputArguments(**{f.name: given.pop(f.name) for f in fields(OutputArguments)})
            conclude(lambda progress: run(kind(**given), progress), output)

        command.__doc__ = run.__doc__
        command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # Typer reads it.
            [*_parameters(kind), *_parameters(OutputArguments)]
        )
        app.command(run.__name__)(command)

    return register


def _parameters(kind: type) -> list[inspect.Parameter]:
    return list(inspect.signature(kind).parameters.values())


@_command(TrainArguments)
def train(arguments: TrainArguments, progress: ProgressLog) -> Report:
    """Train MODEL on batches of any size.

    The command finds the largest batch that fits into memory, cuts each batch of --desired examples
    into micro-batches of at most that size, and accumulates their exact gradient.

    Example: autobatch train torchvision:resnet18 --desired 256 --memory-limit 1GiB
    """
    from autobatch.cli import commands

    return commands.train(arguments, progress)


@_command(FindArguments)
def find(arguments: FindArguments, progress: ProgressLog) -> Report:
    """Find the largest batch of MODEL that fits into memory.

    The command runs real training steps, or forward passes with --mode inference, at a few sizes.

    Example: autobatch find torchvision:resnet18 --memory-limit 1GiB
    """
    from autobatch.cli import commands

    return commands.find(arguments, progress)


@_command(PredictArguments)
def predict(arguments: PredictArguments, progress: ProgressLog) -> Report:
    """Predict the largest batch on other GPUs.

    No GPU is needed: the command simulates the memory of a training step of MODEL, or of a forward
    pass with --mode inference. Pass either --gpu or --memory.

    Example: autobatch predict torchvision:resnet18 --gpu "RTX 4090"
    """
    from autobatch.cli import commands

    return commands.predict(arguments, progress)


@app.command()
def plan(
    tolerable: Annotated[
        int, typer.Option(min=1, help="The most examples that fit into memory at once.")
    ],
    desired: Annotated[int, typer.Option(min=1, help="Examples per optimizer step.")] = 256,
    as_json: Json = False,
) -> None:
    """Show how a batch is cut into micro-batches.

    Example: autobatch plan --desired 256 --tolerable 100
    """
    cut = BatchPlan(desired=desired, tolerable=tolerable)
    _write(Report(text=str(cut), fields=plan_fields(cut)), as_json=as_json)


@app.command()
def devices(as_json: Json = False) -> None:
    """Show the GPUs of this machine and their memory.

    NVML, the library of the NVIDIA driver, and torch may number GPUs differently. The table shows
    both, with the memory that processes use.
    """
    from autobatch.cli.device_table import HEADERS, take_inventory

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
    """Define the options of ``autobatch`` itself."""


class _JournaledProgress:
    """Records every event in a journal, and displays it unless the command is quiet."""

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


def conclude(work: Callable[[ProgressLog], Report], output: OutputArguments) -> None:
    """Run ``work`` and write its report; after a failure, write the error and the progress so far.

    Raises:
        typer.Exit: With the exit code, if ``work`` failed.
    """
    journal = Journal()
    display = None if output.quiet else Display()
    failure: BaseException | None = None
    try:
        with display or nullcontext():
            report = work(_JournaledProgress(journal, display))
    except (Exception, KeyboardInterrupt) as ended:  # noqa: BLE001  # Each failure has an exit code.
        failure = ended
    if failure is None:
        if display is not None and sys.stdout.isatty():
            typer.echo()
        _write(report, as_json=output.as_json)
        return
    if output.debug:
        typer.echo("".join(traceback.format_exception(failure)), err=True)
    code, message = exit_code(failure), _explained(failure, journal)
    text = message if code is ExitCode.INTERRUPTED else f"error: {message}"
    typer.echo(_wrapped(text, sys.stderr), err=True)
    if output.as_json:
        error = {"kind": type(failure).__name__, "message": message, "exit_code": int(code)}
        _write_json({"error": error | failure_fields(failure), "done": journal.fields})
    raise typer.Exit(code)


def exit_code(error: BaseException) -> ExitCode:
    """Return the exit code of a command that ended with ``error``."""
    if isinstance(error, KeyboardInterrupt):
        return ExitCode.INTERRUPTED
    torch = sys.modules.get("torch")  # None if torch was not imported.
    if isinstance(error, DoesNotFitError) or (torch and isinstance(error, torch.OutOfMemoryError)):
        return ExitCode.DOES_NOT_FIT
    if isinstance(error, ValueError | TypeError) and _is_ours(error):
        return ExitCode.BAD_ARGUMENTS
    return ExitCode.FAILED


def _explained(error: BaseException, journal: Journal) -> str:
    """Return why the command ended, and its progress until then."""
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted {journal}" + f"; {error}" * bool(str(error))
    notes = getattr(error, "__notes__", ())
    done = "".join(f"\n{note}" for note in notes if not note.startswith((TRACED, ISOLATED)))
    if journal.training is not None:
        done += f"\nthe error occurred {journal}"
    if _is_ours(error):
        return f"{_with_options(str(error))}{done}"
    return f"{type(error).__name__}: {error}{_place(error)}{done}"


def _with_options(message: str) -> str:
    """Replace argument names of the library in ``message`` by options of the command line.

    A name with an underscore is replaced everywhere. A name without an underscore may be an
    ordinary word, so it is replaced only at the start of the message or before a value.
    """

    def option(found: re.Match[str]) -> str:
        return _options_by_name().get(found[0], found[0])

    names = r"^[a-z]+(?= (?:must|cannot) )|\b[a-z]+(?==)|\b[a-z]+(?:_[a-z]+)+\b"
    return re.sub(names, option, message)


@functools.cache
def _options_by_name() -> dict[str, str]:
    """Return the options of all commands by argument name, such as ``memory_limit``."""
    commands = typer.main.get_group(app).commands.values()
    found = {p.name: p.opts[0] for command in commands for p in command.params if p.name}
    return {name: option for name, option in found.items() if option.startswith("--")}


def _place(error: BaseException) -> str:
    """Return the last line of the user's code in the traceback, or ``""``."""
    frames = traceback.walk_tb(error.__traceback__)
    theirs = [(frame.f_code.co_filename, line) for frame, line in frames if not _is_library(frame)]
    return f" ({theirs[-1][0]}:{theirs[-1][1]}; --debug shows more)" if theirs else ""


def _is_library(frame: FrameType) -> bool:
    package = _package(frame)
    return package in {"autobatch", "torch", "torchvision"} or package in sys.stdlib_module_names


def _package(frame: FrameType) -> str:
    """Return the top-level package of the code; under ``python -m`` a module is ``__main__``."""
    names: dict[str, str | None] = frame.f_globals
    return (names.get("__package__") or names.get("__name__") or "").partition(".")[0]


def _is_ours(error: BaseException) -> bool:
    """Return whether autobatch raised ``error``, and not the user's code."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and _package(frames[-1]) == "autobatch"


def _write(report: Report, *, as_json: bool) -> None:
    if as_json:
        _write_json(report.fields)
    else:
        typer.echo(_wrapped(report.text, sys.stdout))


def _wrapped(text: str, stream: TextIO) -> str:
    """Break long lines between words, if the stream is a terminal."""
    if not stream.isatty():
        return text
    width = min(typer.get_terminal_size().columns, 100)
    return "\n".join(_filled(line, width) for line in text.splitlines())


def _filled(line: str, width: int) -> str:
    """Break one line; the following lines are indented by two more columns."""
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    return textwrap.fill(line, width, subsequent_indent=indent)


def _write_json(fields: Fields) -> None:
    typer.echo(json.dumps(fields, indent=2, allow_nan=False))
