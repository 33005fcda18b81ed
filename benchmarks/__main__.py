"""The benchmarks' command line: parts in, tables and files out."""

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import torch

from autobatch import DeviceUnavailableError
from autobatch.devices.choose import choose_device
from benchmarks import engine, exactness, prediction, search
from benchmarks.findings import Findings
from benchmarks.machine import environment, keep_freed_memory, slug, write_atomically
from benchmarks.reporting import command as reading

PARTS: Final[dict[str, Callable[[Findings], None]]] = {
    "exactness": exactness.run,
    "search": search.run,
    "engine": engine.run,
    "prediction": prediction.run,
}
# Named by the first word; each is handed the words behind it and returns an exit code.
COMMANDS: Final[dict[str, Callable[[Sequence[str]], int]]] = reading.COMMANDS
RESULTS: Final = Path(__file__).parent / "results"


def parser() -> argparse.ArgumentParser:
    """Return what reads the command line."""
    reader = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    reader.add_argument(
        "parts", nargs="*", type=_part, metavar="PART", help=f"{', '.join(PARTS)}; default: all"
    )
    reader.add_argument("--minutes", type=float, default=8.0, help="no case begins later")
    reader.add_argument("--device", type=_device, help="cpu, cuda; default: a GPU if there is one")
    reader.add_argument("--out", type=Path, help="default: benchmarks/results; with --quick, none")
    reader.add_argument("--quick", action="store_true", help="only see that it works")
    return reader


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the parts that are named and write what each found; return 1 if one failed."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words and words[0] in COMMANDS:
        return COMMANDS[words[0]](words[1:])
    options = parser().parse_args(words)
    device = options.device or _device(None)
    deadline = time.monotonic() + 60 * options.minutes
    out = options.out or (None if options.quick else RESULTS)
    failed, kept = False, keep_freed_memory()
    for name in dict.fromkeys(options.parts or PARTS):
        facts = {"part": name, "quick": options.quick, **environment(device)}
        facts["freed_memory_kept"] = kept
        print(", ".join(f"{key} {value}" for key, value in facts.items()), end="\n\n", flush=True)
        findings = Findings(device=device, deadline=deadline, quick=options.quick)
        started = time.monotonic()
        try:
            PARTS[name](findings)
        except Exception as error:  # noqa: BLE001  # The other parts are measured all the same.
            traceback.print_exc()
            facts["failed"], failed = repr(error), True
        facts["seconds"] = round(time.monotonic() - started, 1)
        print(findings, f"{name} took {facts['seconds']} s", sep="\n", end="\n\n", flush=True)
        if out is not None and findings.cases:
            path = out / slug(str(facts["device"])) / f"{name}.json"
            measured = {"left_out": findings.left_out, "cases": findings.cases}
            write_atomically(path, facts | measured)
            print(f"written to {path}", end="\n\n", flush=True)
    return int(failed)


def _part(name: str) -> str:
    if name not in PARTS:
        raise argparse.ArgumentTypeError(f"there is no {name!r}; choose from {', '.join(PARTS)}")
    return name


def _device(name: str | None) -> torch.device:
    try:
        return choose_device(name, torch.device("cpu"))
    except (ValueError, DeviceUnavailableError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None


if __name__ == "__main__":
    sys.exit(main())
