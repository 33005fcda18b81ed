"""Result files with invented figures, for tests of what reads them. None was ever measured."""

import json
from collections.abc import Mapping
from pathlib import Path

Fields = dict[str, object]

FACTS: Fields = {
    "quick": False,
    "imitated": None,
    "device": "Made Up 9000",
    "driver": "1.2.3",
    "torch": "2.13.0",
    "autobatch": "0.1.0",
    "commit": "abc1234",
    "python": "3.11",
    "threads": 2,
    "load": 0.5,
    "date": "2026-01-02T03:04:05+00:00",
    "seed": 0,
    "seconds": 1.5,
    "left_out": [],
}
GIB = 2**30


def samples(median: float) -> Fields:
    low, high = 0.9 * median, 1.1 * median
    return {"median": median, "minimum": low, "maximum": high, "samples": [low, median, high]}


def capacity(model: str = "resnet50", precision: str = "fp32", **changes: object) -> Fields:
    sizes = [1, 64, 90]
    return {
        "table": "capacity",
        "model": model,
        "mode": "train",
        "precision": precision,
        "optimizer": "AdamW",
        "example": "3 x 224 x 224",
        "parameters": 25_600_000,
        "limit_bytes": 10 * GIB,
        "tolerable": 90,
        "limited_by": "memory",
        "upper": {"size": 91, "bytes": 11 * GIB, "reason": "extrapolated"},
        "peak_allocated_bytes": 9 * GIB,
        "peak_reserved_bytes": 9 * GIB + 1,
        "share": 0.9,
        "trials": 3,
        "out_of_memory": 0,
        "search_seconds": samples(2.0),
        "memory": [{"size": n, "peak_bytes": n * GIB // 10, "passed": True} for n in sizes]
        + [{"size": 91, "peak_bytes": None, "passed": False}],
        "sizes": [
            {"size": n, "seconds": samples(1), "examples_per_second": samples(100 + n)}
            for n in sizes
        ],
        "fastest": 64,
        "desired": [
            {
                "desired": desired,
                "micro_batch": 64,
                "accumulation_steps": desired // 64,
                "examples_per_second": samples(163),
                "of_best": 0.995,
            }
            for desired in (256, 1024, 4096)
        ],
        "scan": {"largest": 90, "found_over_largest": 1.0},
        "predicted": {
            "tolerable_safe": 85,
            "tolerable_likely": 92,
            "peak_bytes_at_found": 9 * GIB,
        },
        "error": "",
        **changes,
    }


def failed(model: str, error: str) -> Fields:
    numbers = ("tolerable", "share", "scan", "predicted", "memory", "sizes", "desired", "upper")
    return capacity(model) | dict.fromkeys(numbers) | {"error": error}


SEARCH = "search: real models under a limit"
ENGINE = "engine: a window of micro-batches by everyone in turns"
GRADIENTS = "exactness: relative difference of the update from the undivided batch's"
FAILURES = "exactness: memory runs out in a training of 3 steps"


def searched(by: str, cost: float, *, runs: bool) -> Fields:
    row: Fields = {"table": SEARCH, "case": "net", "by": by, "found": 7, "runs": runs, "error": ""}
    return row | {"cost in seconds": samples(cost)}


def together(by: str, cost: float, largest: str) -> Fields:
    row: Fields = {
        "table": f"{SEARCH}, all of them together",
        "by": by,
        "found the largest": largest,
    }
    row |= {"do not run": 0, "trials": 3, "out_of_memory": 0, "unchanged": "1 of 1"}
    return row | {"median cost in seconds": cost}


def engine(by: str, microseconds: float) -> Fields:
    name = "on top of plain, us per micro-batch"
    row: Fields = {"table": ENGINE, "model": "net", "by": by, name: samples(microseconds)}
    return row | {"quartiles": {name: [0.95 * microseconds, 1.05 * microseconds]}}


PARTS: dict[str, list[Fields]] = {
    "capacity": [
        capacity(),
        capacity(precision="bf16", tolerable=170),
        failed("swin_t", "no kernel"),
    ],
    "search": [
        searched("autobatch", 2.0, runs=True),
        searched("toma", 1.0, runs=False),
        together("autobatch", 2.0, "1 of 1"),
        together("doubling", 7.5, "1 of 1"),
        together("toma", 1.0, "0 of 1"),
        {"table": "search: what is wanted", "wanted": "finds all", "verdict": "NOT held"},
    ],
    "engine": [engine("plain", 0.0), engine("autobatch", 24.5), engine("plain again", -0.5)],
    "exactness": [
        {"table": GRADIENTS, "by": "autobatch", "samples": 2e-16, "tokens": 3e-16},
        {"table": GRADIENTS, "by": "Lightning", "samples": 0.23, "tokens": 0.45},
        {"table": GRADIENTS, "by": "accelerate", "samples": "not installed"},
        {
            "table": FAILURES,
            "by": "autobatch",
            "memory runs out": "once",
            "outcome": "goes on",
            "steps": 3,
            "parameters off by": 1e-16,
        },
        {
            "table": FAILURES,
            "by": "accelerate",
            "memory runs out": "at any time",
            "outcome": "not installed",
            "steps": "-",
            "parameters off by": "-",
        },
    ],
    "prediction": [
        {
            "table": "prediction: the peak of 1 published run",
            "run": "net, Adam",
            "measured": 5000,
            "xMem": 4000,
            "error_%": 2.0,
        }
    ],
}


def write(folder: Path, parts: Mapping[str, list[Fields]] | None = None, **facts: object) -> Path:
    """Write a device's folder and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, cases in (PARTS if parts is None else parts).items():
        written = {"part": name, **FACTS, **facts, "cases": cases}
        (folder / f"{name}.json").write_text(json.dumps(written))
    return folder
