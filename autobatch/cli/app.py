"""The commands of the command line: arguments in, an exit code out.

The modules that import torch are imported when a command runs with good arguments: that import
takes seconds, and help or a wrong argument should be answered at once.
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
from typing import Annotated, Any, TextIO, TypeVar

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
    ForwardTracker,
    Journal,
    Report,
    failure_fields,
    plan_fields,
)
from autobatch.display import Display, print_table
from autobatch.errors import ISOLATED, TRACED, DoesNotFitError
from autobatch.events import Event
from autobatch.results.plan import BatchPlan


class ExitCode(enum.IntEnum):
    """How a command ended."""

    DONE = 0
    FAILED = 1
    BAD_ARGUMENTS = 2
    DOES_NOT_FIT = 3
    INTERRUPTED = 130


Arguments = TypeVar("Arguments", bound=ModelArguments)
Json = Annotated[bool, typer.Option("--json", help="Write the result as JSON.")]

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


def _command(
    kind: type[Arguments],
) -> Callable[[Callable[[Arguments, ForwardTracker], Report]], None]:
    """Register a function of ``kind`` as a command whose options are the fields of ``kind``."""

    def register(run: Callable[[Arguments, ForwardTracker], Report]) -> None:
        def command(**given: Any) -> None:
            output = OutputArguments(**{f.name: given.pop(f.name) for f in fields(OutputArguments)})
            conclude(lambda watch: run(kind(**given), watch), output)

        command.__doc__ = run.__doc__
        command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # Typer reads it.
            [*_parameters(kind), *_parameters(OutputArguments)]
        )
        app.command(run.__name__)(command)

    return register


def _parameters(kind: type) -> list[inspect.Parameter]:
    return list(inspect.signature(kind).parameters.values())


@_command(TrainArguments)
def train(arguments: TrainArguments, watch: ForwardTracker) -> Report:
    """Train MODEL on the batch you want, in pieces that fit."""
    from autobatch.cli import commands

    return commands.train(arguments, watch)


@_command(FindArguments)
def find(arguments: FindArguments, watch: ForwardTracker) -> Report:
    """Find the largest batch with which MODEL can train, or infer."""
    from autobatch.cli import commands

    return commands.find(arguments, watch)


@_command(PredictArguments)
def predict(arguments: PredictArguments, watch: ForwardTracker) -> Report:
    """Predict the largest batch with which MODEL can train, or infer, on a GPU not here."""
    from autobatch.cli import commands

    return commands.predict(arguments, watch)


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
    """Find the largest batch a device tolerates, and train on the batch you want."""


class _Watch:
    """Writes every event into a journal, and shows it unless the command is quiet."""

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


def conclude(work: Callable[[ForwardTracker], Report], output: OutputArguments) -> None:
    """Run ``work`` and write its report, or write why it failed and what was done until then.

    Raises:
        typer.Exit: With the code of the failure, if there was one.
    """
    journal = Journal()
    display = None if output.quiet else Display()
    failure: BaseException | None = None
    try:
        with display or nullcontext():
            report = work(_Watch(journal, display))
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
    """Return the code of a command that ``error`` ended."""
    if isinstance(error, KeyboardInterrupt):
        return ExitCode.INTERRUPTED
    torch = sys.modules.get("torch")  # Without torch no error of torch was raised.
    if isinstance(error, DoesNotFitError) or (torch and isinstance(error, torch.OutOfMemoryError)):
        return ExitCode.DOES_NOT_FIT
    if isinstance(error, ValueError | TypeError) and _is_ours(error):
        return ExitCode.BAD_ARGUMENTS
    return ExitCode.FAILED


def _explained(error: BaseException, journal: Journal) -> str:
    """Return why the command ended, and what was done until then."""
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
    """Replace names of the library's arguments in ``message`` by the command line's options.

    A name with an underscore is replaced everywhere; a name without one only at the beginning of
    the message or before a value.
    """

    def option(found: re.Match[str]) -> str:
        return _options_by_name().get(found[0], found[0])

    names = r"^[a-z]+(?= (?:must|cannot) )|\b[a-z]+(?==)|\b[a-z]+(?:_[a-z]+)+\b"
    return re.sub(names, option, message)


@functools.cache
def _options_by_name() -> dict[str, str]:
    """Return the options of all commands by argument: ``memory_limit`` to ``--memory-limit``."""
    commands = typer.main.get_group(app).commands.values()
    found = {p.name: p.opts[0] for command in commands for p in command.params if p.name}
    return {name: option for name, option in found.items() if option.startswith("--")}


def _place(error: BaseException) -> str:
    """Return the line of the user's code that led to ``error``, or ``""``."""
    frames = traceback.walk_tb(error.__traceback__)
    theirs = [(frame.f_code.co_filename, line) for frame, line in frames if not _is_library(frame)]
    return f" ({theirs[-1][0]}:{theirs[-1][1]}; --debug shows more)" if theirs else ""


def _is_library(frame: FrameType) -> bool:
    package = _package(frame)
    return package in {"autobatch", "torch", "torchvision"} or package in sys.stdlib_module_names


def _package(frame: FrameType) -> str:
    """Return the outermost package of the code; under ``python -m`` its name is ``__main__``."""
    names: dict[str, str | None] = frame.f_globals
    return (names.get("__package__") or names.get("__name__") or "").partition(".")[0]


def _is_ours(error: BaseException) -> bool:
    """Whether autobatch itself raised ``error``: the user's code raises ValueError too."""
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
    """Break one line; what follows is indented by two columns more than the line."""
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    return textwrap.fill(line, width, subsequent_indent=indent)


def _write_json(fields: Fields) -> None:
    typer.echo(json.dumps(fields, indent=2, allow_nan=False))
