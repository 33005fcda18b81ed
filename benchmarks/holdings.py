"""What a device holds: for each model the tolerable batch, its speed, and accumulation."""

import functools
import gc
import time
from collections.abc import Mapping, Sequence
from typing import Final

import torch

from autobatch import SearchOptions, SearchResult, SearchTimeoutError, check, find_batch_size
from autobatch.devices.choose import open_device
from autobatch.prediction.gpu_catalogue import Gpu, custom_gpu, find_gpu
from benchmarks import holdings_speed as speed
from benchmarks.findings import Findings, as_json
from benchmarks.holdings_beside import predicted, scan
from benchmarks.holdings_case import ON_A_GPU, ON_THE_CPU, ROOM_BYTES, Case, Config
from benchmarks.samples import Samples
from benchmarks.zoo import subjects

TABLE: Final = "holdings"
_REPEATS: Final = 3  # Of a search whose seconds are few.
_CHEAP: Final = 8  # A size whose trial tells what others cost.
_TRIALS: Final = 1.7  # At what it finds: a search takes from one to two and a half of them.
_QUICK_ROOM_BYTES: Final = 32 * 2**20
_EXTRA_SECONDS: Final = 5.0  # For timing, where a search takes all the time that there is.
_SHOWN: Final = ("model", "mode", "precision", "optimizer", "example", "tolerable", "share")
_MEASURED: Final = (
    *("parameters", "limit_bytes", "tolerable", "limited_by", "upper", "peak_allocated_bytes"),
    *("peak_reserved_bytes", "share", "trials", "out_of_memory", "search_seconds", "memory"),
    *("sizes", "fastest", "desired", "scan", "predicted"),
)


def run(findings: Findings) -> None:
    """Measure every model in one configuration, then in the next."""
    on_a_gpu = findings.device.type != "cpu"
    card = _card(findings.device) if on_a_gpu else findings.imitated
    made, missing = subjects(on_a_gpu=on_a_gpu)
    findings.left_out += [f"{name}: {what} not installed" for name, what in missing.items()]
    wanted = findings.models or tuple(made)
    configs: Sequence[Config] = ON_A_GPU if on_a_gpu else ON_THE_CPU
    room_bytes = ROOM_BYTES
    if findings.quick:
        configs, wanted, room_bytes = configs[:2], wanted[:1], _QUICK_ROOM_BYTES
    for place, config in enumerate(configs):
        cases = {
            f"{name}, {config}": Case(
                name=name,
                subject=made[name],
                config=config,
                device=findings.device,
                card=card,
                room_bytes=room_bytes,
            )
            for name in wanted
            if name in made
        }
        if findings.left_seconds <= 0 and not findings.done.keys() & cases.keys():
            names = ", ".join(case.name for case in cases.values())
            findings.give_up(f"{config}: no time for {names}")
            continue
        measure_all(cases, findings, later=len(configs) - place - 1)


def measure_all(cases: Mapping[str, Case], findings: Findings, *, later: int) -> None:
    """Measure one configuration's cases.

    Args:
        cases: By name.
        findings: Where rows go.
        later: So many configurations are to follow.
    """
    waiting = {name: case for name, case in cases.items() if name not in findings.done}
    costs = functools.cache(lambda name: search_seconds(waiting[name]))
    on_a_gpu = findings.device.type != "cpu"
    names = list(waiting)
    for name, case in findings.in_time(waiting, None if on_a_gpu else lambda name, _: costs(name)):
        left = len(names) - names.index(name)
        share = findings.left_seconds / left / (2 if later else 1)
        seconds = max(share, 0.0 if on_a_gpu else 1.2 * costs(name) + _EXTRA_SECONDS)
        until = min(time.monotonic() + seconds, findings.deadline)
        _add(name, case, until, findings)


def search_seconds(case: Case) -> float:
    """Return about how long a search takes on the CPU, from a cheap trial.

    A step's seconds and bytes grow with its examples, and a search goes on until the limit.
    """
    try:
        model = case.model()
        asked = case.asked(model)
        trial = check(model, case.subject.data(_CHEAP), _CHEAP, **asked)
    except Exception:  # noqa: BLE001  # The search will meet it too, and its row says so.
        return 0.0
    if not trial.fits:
        return 0.0
    forward = trial.phases[0]
    bytes_each = max(forward.peak_bytes - forward.floor_bytes, 1) / _CHEAP
    size: float = min((asked["memory_limit"] - forward.floor_bytes) / bytes_each, case.ceiling)
    return _TRIALS * trial.seconds / _CHEAP * size


def _add(name: str, case: Case, until: float, findings: Findings) -> None:
    """Add the case's row; one that fails says why."""
    row = case.facts | dict.fromkeys(_MEASURED) | {"error": ""}
    try:
        row |= measure(case, until, budget_seconds=max(findings.left_seconds, 1.0))
    except SearchTimeoutError:
        findings.give_up(f"{name}: no time, the search did not end")
    except Exception as error:  # noqa: BLE001  # The others are measured all the same.
        row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    # Only here has the error let go of what it held.
    gc.collect()
    open_device(case.device).release_cached()
    if row["tolerable"] or row["error"]:
        told = {key: row[key] for key in (*_SHOWN, "fastest", "error")}
        findings.add(TABLE, told, **{key: row[key] for key in row if key not in told})


def measure(case: Case, until: float, budget_seconds: float | None = None) -> dict[str, object]:
    """Search, then time sizes and logical batches, then look beside: as far as time allows.

    Args:
        case: What to run.
        until: By ``time.monotonic``; only the search does not heed it.
        budget_seconds: In which the search must end.

    Raises:
        SearchTimeoutError: If it does not.
    """
    model = case.model()
    parameters = sum(weight.numel() for weight in model.parameters())
    asked = case.asked(model)
    data = case.subject.data(case.ceiling)
    find = functools.partial(find_batch_size, model, data, ceiling=case.ceiling, **asked)
    began = time.perf_counter()
    found = find(search=SearchOptions(budget_seconds=budget_seconds))
    if found.limited_by == "time":
        raise SearchTimeoutError(found.size, budget_seconds or 0.0)
    seconds = Samples([time.perf_counter() - began])
    row = {"parameters": parameters, **_found(found)}
    row |= speed.measure(case, model, found, speed.by(until, 0.8))
    row["predicted"] = predicted(case, model, found, until)
    row["scan"] = scan(case, functools.partial(check, model, data, **asked), found, until)
    while len(seconds) < _REPEATS and time.monotonic() + seconds[-1] < until:
        began = time.perf_counter()
        find()
        seconds.append(time.perf_counter() - began)
    return row | {"search_seconds": as_json(seconds)}


def _found(found: SearchResult) -> dict[str, object]:
    trials = found.trials
    last = next(trial for trial in reversed(trials) if trial.fits and trial.size == found.size)
    upper = found.upper
    held = last.peak_bytes if last.reserved_bytes is None else last.reserved_bytes
    return {
        "limit_bytes": found.limit_bytes,
        "tolerable": found.size,
        "limited_by": found.limited_by,
        "upper": {"size": upper.size, "bytes": upper.bytes, "reason": upper.reason},
        "peak_allocated_bytes": last.peak_bytes,
        "peak_reserved_bytes": last.reserved_bytes,
        "share": (held or 0) / found.limit_bytes,
        "trials": len(trials),
        "out_of_memory": sum(not trial.fits for trial in trials),
        "memory": [
            {"size": trial.size, "peak_bytes": trial.peak_bytes, "passed": trial.fits}
            for trial in trials
        ],
    }


def _card(device: torch.device) -> Gpu:
    """The GPU that is here; one that the catalogue does not know by its memory."""
    try:
        return find_gpu(torch.cuda.get_device_name(device))
    except ValueError:
        return custom_gpu(open_device(device).read().total_bytes)
