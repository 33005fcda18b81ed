"""Measure for each model the tolerable batch, its speed, and accumulation to larger batches."""

import functools
import gc
import time
from collections.abc import Mapping, Sequence
from typing import Final

import torch

from autobatch import SearchOptions, SearchResult, SearchTimeoutError, check, find_batch_size
from autobatch.devices.factory import open_device
from autobatch.prediction.gpu_catalogue import Gpu, custom_gpu, find_gpu
from benchmarks.capacity import throughput
from benchmarks.capacity.case import ON_A_GPU, ON_THE_CPU, ROOM_BYTES, Case, Config
from benchmarks.capacity.reference import predicted, scan
from benchmarks.harness.models import model_specs
from benchmarks.harness.records import Records, as_json
from benchmarks.harness.timing import Samples

TABLE: Final = "capacity"
_REPEATS: Final = 3  # Searches are repeated while there is time.
_CHEAP: Final = 8  # The size of a trial that estimates what larger sizes cost.
_TRIALS: Final = 1.7  # A search takes 1 to 2.5 trials' time at the size that it finds.
_QUICK_ROOM_BYTES: Final = 32 * 2**20
_EXTRA_SECONDS: Final = 5.0  # For timing, after a search that takes all of its share.
_SHOWN: Final = ("model", "mode", "precision", "optimizer", "example", "tolerable", "share")
_MEASURED: Final = (
    *("parameters", "limit_bytes", "tolerable", "limited_by", "upper", "peak_allocated_bytes"),
    *("peak_reserved_bytes", "share", "trials", "out_of_memory", "search_seconds", "memory"),
    *("sizes", "fastest", "desired", "scan", "predicted"),
)


def run(records: Records) -> None:
    """Measure every model in one configuration, then every model in the next."""
    on_a_gpu = records.device.type != "cpu"
    card = _card(records.device) if on_a_gpu else records.imitated
    made, missing = model_specs(on_a_gpu=on_a_gpu)
    records.left_out += [f"{name}: {what} not installed" for name, what in missing.items()]
    wanted = records.models or tuple(made)
    configs: Sequence[Config] = ON_A_GPU if on_a_gpu else ON_THE_CPU
    room_bytes = ROOM_BYTES
    if records.quick:
        configs, wanted, room_bytes = configs[:2], wanted[:1], _QUICK_ROOM_BYTES
    for place, config in enumerate(configs):
        cases = {
            f"{name}, {config}": Case(
                name=name,
                spec=made[name],
                config=config,
                device=records.device,
                card=card,
                room_bytes=room_bytes,
            )
            for name in wanted
            if name in made
        }
        if records.left_seconds <= 0 and not records.done.keys() & cases.keys():
            names = ", ".join(case.name for case in cases.values())
            records.give_up(f"{config}: no time for {names}")
            continue
        measure_all(cases, records, later=len(configs) - place - 1)


def measure_all(cases: Mapping[str, Case], records: Records, *, later: int) -> None:
    """Measure one configuration's cases.

    Args:
        cases: The cases by name.
        records: Gets a row for each case.
        later: How many configurations follow.
    """
    waiting = {name: case for name, case in cases.items() if name not in records.done}
    costs = functools.cache(lambda name: search_seconds(waiting[name]))
    on_a_gpu = records.device.type != "cpu"
    names = list(waiting)
    for name, case in records.in_time(waiting, None if on_a_gpu else lambda name, _: costs(name)):
        left = len(names) - names.index(name)
        share = records.left_seconds / left / (2 if later else 1)
        seconds = max(share, 0.0 if on_a_gpu else 1.2 * costs(name) + _EXTRA_SECONDS)
        until = min(time.monotonic() + seconds, records.deadline)
        _add(name, case, until, records)


def search_seconds(case: Case) -> float:
    """Estimate how many seconds a search takes on the CPU, from a cheap trial.

    A step's seconds and bytes grow with its examples, and a search continues up to the limit.
    """
    try:
        model = case.model()
        arguments = case.arguments(model)
        trial = check(model, case.spec.data(_CHEAP), _CHEAP, **arguments)
    except Exception:  # noqa: BLE001  # The search fails in the same way, and its row says so.
        return 0.0
    if not trial.fits:
        return 0.0
    forward = trial.phases[0]
    bytes_each = max(forward.peak_bytes - forward.floor_bytes, 1) / _CHEAP
    size: float = min((arguments["memory_limit"] - forward.floor_bytes) / bytes_each, case.ceiling)
    return _TRIALS * trial.seconds / _CHEAP * size


def _add(name: str, case: Case, until: float, records: Records) -> None:
    """Add the case's row; if the case fails, the row holds the reason."""
    row = case.columns | dict.fromkeys(_MEASURED) | {"error": ""}
    try:
        row |= measure(case, until, budget_seconds=max(records.left_seconds, 1.0))
    except SearchTimeoutError:
        records.give_up(f"{name}: no time, the search did not end")
    except Exception as error:  # noqa: BLE001  # The other cases are measured anyway.
        row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    # The error's traceback held tensors until here.
    gc.collect()
    open_device(case.device).release_cached()
    if row["tolerable"] or row["error"]:
        shown = {key: row[key] for key in (*_SHOWN, "fastest", "error")}
        records.add(TABLE, shown, **{key: row[key] for key in row if key not in shown})


def measure(case: Case, until: float, budget_seconds: float | None = None) -> dict[str, object]:
    """Search, then time sizes and logical batches, then scan and predict, as far as time allows.

    Args:
        case: The model and its configuration.
        until: When to stop, by ``time.monotonic``; the search alone may end later.
        budget_seconds: The seconds within which the search must end.

    Raises:
        SearchTimeoutError: If the search does not end in time.
    """
    model = case.model()
    parameters = sum(weight.numel() for weight in model.parameters())
    arguments = case.arguments(model)
    data = case.spec.data(case.ceiling)
    find = functools.partial(find_batch_size, model, data, ceiling=case.ceiling, **arguments)
    began = time.perf_counter()
    found = find(search=SearchOptions(budget_seconds=budget_seconds))
    if found.limited_by == "time":
        raise SearchTimeoutError(found.size, budget_seconds or 0.0)
    seconds = Samples([time.perf_counter() - began])
    row = {"parameters": parameters, **_found(found)}
    row |= throughput.measure(case, model, found, throughput.by(until, 0.8))
    row["predicted"] = predicted(case, model, found, until)
    row["scan"] = scan(case, functools.partial(check, model, data, **arguments), found, until)
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
    """Return this machine's GPU; by its memory, where the catalogue does not know the GPU."""
    try:
        return find_gpu(torch.cuda.get_device_name(device))
    except ValueError:
        return custom_gpu(open_device(device).read().total_bytes)
