"""The benchmarks' command line: parts in, tables, files and a report out."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import torch

from autobatch import DeviceUnavailableError
from autobatch.devices.choose import choose_device
from autobatch.devices.host import host_memory
from autobatch.prediction.gpu_catalogue import Gpu, find_gpu
from autobatch.units import format_bytes
from benchmarks import engine, exactness, gpu, holdings, prediction, runner, search, zoo
from benchmarks.holdings_case import allowed_bytes
from benchmarks.reporting import command as reading
from benchmarks.runner import Options, Part

# In this order: what was cheap leaves its time to those behind it.
PARTS: Final[dict[str, Part]] = {
    "exactness": Part(run=exactness.run, weight=1),
    "holdings": Part(run=holdings.run, weight=6),
    "search": Part(run=search.run, weight=4),
    "engine": Part(run=engine.run, weight=2),
    "prediction": Part(run=prediction.run, weight=2),
}
# Named by the first word; each is handed the words behind it and returns an exit code.
COMMANDS: Final[dict[str, Callable[[Sequence[str]], int]]] = {
    **reading.COMMANDS,
    "gpu": gpu.main,
}
RESULTS: Final = Path(__file__).parent / "results"
_ALL: Final = "all"
_MOST_MINUTES: Final = 24 * 60


def parser() -> argparse.ArgumentParser:
    """Return what reads the command line."""
    others = "also: python -m benchmarks report, compare, readme, gpu, each with its own --help"
    reader = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, epilog=others
    )
    reader.add_argument(
        "parts",
        nargs="*",
        type=_part,
        metavar="PART",
        help=f"{', '.join([*PARTS, _ALL])}; default: all",
    )
    reader.add_argument("--minutes", type=_minutes, default=8.0, help="no case begins later")
    reader.add_argument("--device", type=_device, help="cpu, cuda; default: a GPU if there is one")
    reader.add_argument(
        "--models", nargs="+", type=_model, default=(), help=f"of holdings: {', '.join(zoo.NAMES)}"
    )
    reader.add_argument(
        "--imitate", type=_card, metavar="CARD", help="the CPU's meter with that card's memory"
    )
    reader.add_argument("--out", type=Path, help="default: benchmarks/results; with --quick, none")
    reader.add_argument("--quick", action="store_true", help="only see that it works")
    reader.add_argument("--fresh", action="store_true", help="measure anew what was measured")
    return reader


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the parts that are named and write what each found; return 1 if one failed."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words and words[0] in COMMANDS:
        return COMMANDS[words[0]](words[1:])
    reader = parser()
    asked = reader.parse_args(words)
    if asked.imitate is not None and asked.device not in (None, torch.device("cpu")):
        reader.error(f"--imitate runs on the CPU, got --device {asked.device}: leave one out")
    parts = PARTS if _ALL in asked.parts or not asked.parts else asked.parts
    options = Options(
        device=torch.device("cpu") if asked.imitate else asked.device or _device(None),
        minutes=asked.minutes,
        out=asked.out or (None if asked.quick else RESULTS),
        quick=asked.quick,
        models=tuple(asked.models),
        imitated=asked.imitate,
        fresh=asked.fresh,
    )
    return runner.run({name: PARTS[name] for name in dict.fromkeys(parts)}, options)


def _part(name: str) -> str:
    if name not in (*PARTS, _ALL):
        known = ", ".join([*PARTS, _ALL])
        raise argparse.ArgumentTypeError(f"there is no {name!r}; choose from {known}")
    return name


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = -1.0
    if not 0 <= minutes <= _MOST_MINUTES:
        raise argparse.ArgumentTypeError(
            f"minutes are a number from 0 to {_MOST_MINUTES}, got {text!r}"
        )
    return minutes


def _model(name: str) -> str:
    if name not in zoo.NAMES:
        raise argparse.ArgumentTypeError(
            f"there is no model {name!r}; choose from {', '.join(zoo.NAMES)}"
        )
    return name


def _card(name: str) -> Gpu:
    try:
        card = find_gpu(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    wanted, (_, available) = allowed_bytes(card), host_memory()
    if wanted > available:
        raise argparse.ArgumentTypeError(
            f"{card.name} lets an allocator hold {format_bytes(wanted)}, and this machine has "
            f"{format_bytes(available)} free: imitate a smaller card, or a memory such as 4GiB"
        )
    return card


def _device(name: str | None) -> torch.device:
    try:
        return choose_device(name, torch.device("cpu"))
    except (ValueError, DeviceUnavailableError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None


if __name__ == "__main__":
    sys.exit(main())
