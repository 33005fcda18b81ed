"""Compare predictions with what others measured, and time them."""

import importlib.util
import json
import os
import time
from typing import Any, Final

import torch

from autobatch.compat.torchvision import import_torchvision
from autobatch.prediction.caching_allocator import replay
from autobatch.prediction.gpu_catalogue import Gpu, find_gpu
from autobatch.prediction.predict import predict
from autobatch.prediction.trace import Trace, fit_traces
from benchmarks.harness.records import Records
from benchmarks.prediction.programs import LadderStep, traces, without_values
from benchmarks.prediction.published_runs import DATA, compare
from benchmarks.search.workloads import SearchWorkload, real_models

_MIB: Final = 2**20
_RUNGS: Final = "prediction: the largest batch of timm's published ladder, RTX 3090, fp16"
_RUNGS_ALL: Final = "prediction: the published rung, with one context for all models"
_SECONDS: Final = "prediction: seconds for one GPU, with what-ifs, in a process that has imported"
# The context in MiB: nvidia-smi of an RTX 3090 with CUDA 11.0 and 11.1, which loaded all kernels
# at once, less the segment of the only tensor: 1644 - 158
# (github.com/pytorch/pytorch/issues/49877) and 1687 - 2 (issues/55277). The table by model uses
# their mean; the other values show its influence.
_CONTEXTS: Final = (400, 800, 1200, 1486, 1586, 1685, 2000)
_CONTEXT: Final = 1586
_SIZES: Final = (6, 9)


def run(records: Records) -> None:
    """Compare peaks with the published ones, then the ladder's sizes where timm is installed."""
    if importlib.util.find_spec("cloudpickle") is None:
        records.left_out.append("predictions: cloudpickle is not installed")
        return
    _in_seconds(records)
    compare(records)
    ladder = json.loads((DATA / "largest_batches.json").read_text())
    models = {} if records.quick else {model["model"]: model for model in ladder["models"]}
    _on_the_ladder(models, ladder["ladder"], records)


def _in_seconds(records: Records) -> None:
    """Time predictions of the search benchmark's models and of a ResNet-101."""
    workloads, missing = real_models(torch.device("cpu"))
    records.left_out += [
        f"seconds of {name}: {lacks} is missing" for name, lacks in missing.items()
    ]
    cases = {name.rpartition(":")[0]: workload for name, workload in workloads.items()}
    vision = import_torchvision().models
    images, labels = torch.zeros(16, 3, 224, 224), torch.zeros(16, dtype=torch.long)
    cases["resnet101, 224 pixels, AdamW"] = SearchWorkload(
        make=vision.resnet101,
        optimizer=torch.optim.AdamW,
        data=(images, labels),
        device=torch.device("cpu"),
    )
    if records.quick:
        cases = dict(list(cases.items())[:1])
    for name, workload in records.in_time(cases):
        model = workload.make()
        row: dict[str, object] = {"model": name}
        for gpu in ("T4", "RTX 4090"):  # The second holds larger batches.
            started, before = time.perf_counter(), _processor_seconds()
            found = predict(model, workload.data, gpu=gpu, optimizer=workload.optimizer)
            row |= {
                f"{gpu}_batch": found.tolerable,
                f"{gpu}_s": round(time.perf_counter() - started, 1),
                f"{gpu}_processor_s": round(_processor_seconds() - before, 1),
            }
        records.add(_SECONDS, row, load=os.getloadavg()[0])


def _processor_seconds() -> float:
    """Return the processor seconds of this process and of its finished children."""
    taken = os.times()
    return taken.user + taken.system + taken.children_user + taken.children_system


def _on_the_ladder(models: dict[str, dict[str, Any]], ladder: list[int], records: Records) -> None:
    os.environ["TIMM_FUSED_ATTN"] = "0"  # Attention was not fused when they were measured.
    import_torchvision()
    try:
        timm = importlib.import_module("timm")
    except ModuleNotFoundError:
        records.left_out.append("largest batches: timm is not installed")
        return
    gpu = find_gpu("RTX 3090")
    for name, published in records.in_time(models):
        try:
            with without_values():
                net = timm.create_model(name, pretrained=False)
            program = LadderStep(model=net, pixels=published["image_size"])
            trace = fit_traces(*traces(program, _SIZES))
            if trace is None:
                raise ValueError("two batches take different ways")
        except Exception as error:  # noqa: BLE001  # The other models are tried anyway.
            records.left_out.append(f"{name}: {type(error).__name__}: {error}"[:200])
            continue
        rungs = {context: _rung(trace, ladder, gpu, context * _MIB) for context in _CONTEXTS}
        row = {"model": name, "published": published["largest_batch"]}
        row |= {"predicted": rungs[_CONTEXT], "right": rungs[_CONTEXT] == row["published"]}
        records.add(_RUNGS, row, by_context_mib={str(c): rung for c, rung in rungs.items()})
    rows: Any = records.rows(_RUNGS)
    for context in _CONTEXTS if rows else ():
        answers = [row["by_context_mib"][str(context)] == row["published"] for row in rows]
        row = {"context_MiB": context, "right": sum(answers), "models": len(answers)}
        records.add(_RUNGS_ALL, row | {"share": sum(answers) / len(answers)})


def _rung(trace: Trace, ladder: list[int], gpu: Gpu, context_bytes: int) -> int:
    """Return the largest batch of the ladder that fits, or 0."""
    limit = gpu.capacity_bytes - context_bytes
    for batch in ladder:
        if trace.allocated_bytes(batch) > limit:
            continue
        events = trace.events(batch, workspace_bytes=gpu.workspace_bytes)
        if replay(events, limit_bytes=limit).fits:
            return batch
    return 0
