"""Predictions beside what others measured: peaks of training runs, and largest batches."""

import contextlib
import functools
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autobatch.commands.vision import import_torchvision
from autobatch.prediction.allocator import replay
from autobatch.prediction.gpus import Gpu, find_gpu
from autobatch.prediction.orders import Order, packed, traced
from autobatch.prediction.predict import predict
from autobatch.prediction.trace import Recorder, Trace, fitted
from benchmarks.findings import Findings
from benchmarks.subjects import Subject, real_models

_DATA: Final = Path(__file__).parent / "data"
_MIB: Final = 2**20
_RUNS: Final = "prediction: the peak of 13 published runs, as NVML saw it (MiB)"
_RUNS_ALL: Final = "prediction: all published runs together, absolute errors in percent"
_RUNGS: Final = "prediction: the largest batch of timm's published ladder, RTX 3090, fp16"
_RUNGS_ALL: Final = "prediction: the published rung, with one context for all models"
_SECONDS: Final = "prediction: seconds for one GPU, with what-ifs, in a process that has imported"
# MiB beside the allocator. nvidia-smi of an RTX 3090 with CUDA 11.0 and 11.1, before kernels were
# loaded only when used, less the segment of the one tensor that was there: 1644 - 158
# (github.com/pytorch/pytorch/issues/49877) and 1687 - 2 (issues/55277). The table by model has
# their middle, rounded; the others show how much hangs on it.
_CONTEXTS: Final = (400, 800, 1200, 1486, 1586, 1685, 2000)
_CONTEXT: Final = 1586
_SIZES: Final = (6, 9)


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedLoop:
    """The loop of the published runs: ``conv_train_loop`` of exp/trainer/train_loop.py there.

    Names are bound to the next batch of the host before it is copied, so the old one is gone; what
    else an iteration makes is held to the next. ``ModelTrainer`` has ``zero_grad_mode=1``, which
    lets go of gradients between forward and backward pass. Four iterations are run.

    Attributes:
        model: A classifier.
        optimizer: Its name.
        pixels: Height and width of the images.
    """

    model: nn.Module
    optimizer: str
    pixels: int

    def __call__(self, batch: int, recorder: Recorder) -> None:
        self.model.train()
        make = getattr(torch.optim, self.optimizer)
        optimizer = make(self.model.parameters(), lr=1e-3)
        held: dict[str, Tensor] = {}
        for _ in range(4):
            for name in ("images", "labels"):
                held.pop(name, None)
            held["images"], held["labels"] = _batch(batch, self.pixels, recorder)
            held["outputs"] = self.model(held["images"])
            held["loss"] = F.cross_entropy(held["outputs"], held["labels"])
            optimizer.zero_grad()
            held["loss"].backward()
            optimizer.step()
            held["best"], held["classes"] = torch.max(held["outputs"], 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class LadderStep:
    """The step of timm's benchmark with torch 1.12: gradients are zeroed in place.

    Attributes:
        model: A classifier.
        pixels: Height and width of the images.
    """

    model: nn.Module
    pixels: int

    def __call__(self, batch: int, recorder: Recorder) -> None:
        self.model.train()
        parameters = self.model.parameters()
        optimizer = torch.optim.SGD(parameters, lr=1e-4, momentum=0.9, nesterov=True, foreach=False)
        images, labels = _batch(batch, self.pixels, recorder)
        for _ in range(2):
            optimizer.zero_grad(set_to_none=False)
            with torch.autocast("cuda", torch.float16):
                outputs = self.model(images)
            F.cross_entropy(_first(outputs), labels).backward()
            del outputs
            optimizer.step()


def run(findings: Findings) -> None:
    """Compare peaks with the published ones, then rungs of the ladder where timm is installed."""
    if importlib.util.find_spec("cloudpickle") is None:
        findings.left_out.append("predictions: cloudpickle is not installed")
        return
    _in_seconds(findings)
    published = json.loads((_DATA / "measured_peaks.json").read_text())
    runs = {_run_name(run): run for run in published["runs"]}
    ladder = json.loads((_DATA / "largest_batches.json").read_text())
    models = {model["model"]: model for model in ladder["models"]}
    if findings.quick:
        runs, models = dict(list(runs.items())[3:4]), {}
    totals = published["gpu_total_bytes"]
    for name, run in findings.in_time(runs):
        _on_a_run(name, run, totals[run["gpu"]], findings)
    errors: Any = [row["absolute_errors"] for row in findings.rows(_RUNS)]
    for column, values in (
        ("xMem", [error[0] for error in errors]),
        ("autobatch, allocator only", [error[1] for error in errors]),
        ("autobatch, with context", [error[2] for error in errors]),
    ):
        if values:
            row = {"by": column, "median": statistics.median(values), "worst": max(values)}
            findings.add(_RUNS_ALL, row | {"runs": len(values)})
    _on_the_ladder(models, ladder["ladder"], findings)


def _in_seconds(findings: Findings) -> None:
    """Time predictions: of the search benchmark's models, and of a ResNet-101."""
    subjects, missing = real_models(torch.device("cpu"))
    findings.left_out += [
        f"seconds of {name}: {lacks} is missing" for name, lacks in missing.items()
    ]
    cases = {name.rpartition(":")[0]: subject for name, subject in subjects.items()}
    vision = import_torchvision().models
    images, labels = torch.zeros(16, 3, 224, 224), torch.zeros(16, dtype=torch.long)
    cases["resnet101, 224 pixels, AdamW"] = Subject(
        make=vision.resnet101,
        optimizer=torch.optim.AdamW,
        data=(images, labels),
        device=torch.device("cpu"),
    )
    if findings.quick:
        cases = dict(list(cases.items())[:1])
    for name, subject in findings.in_time(cases):
        model = subject.make()
        row: dict[str, object] = {"model": name}
        for gpu in ("T4", "RTX 4090"):  # The second holds larger batches.
            started, before = time.perf_counter(), _processor_seconds()
            found = predict(model, subject.data, gpu=gpu, optimizer=subject.optimizer)
            row |= {
                f"{gpu}_batch": found.tolerable,
                f"{gpu}_s": round(time.perf_counter() - started, 1),
                f"{gpu}_processor_s": round(_processor_seconds() - before, 1),
            }
        findings.add(_SECONDS, row, load=os.getloadavg()[0])


def _processor_seconds() -> float:
    """Seconds of processors that this process and those that it has waited for have taken."""
    taken = os.times()
    return taken.user + taken.system + taken.children_user + taken.children_system


def _run_name(run: dict[str, Any]) -> str:
    return f"{run['torchvision']}, {run['optimizer']}, {run['batch']}, {run['gpu']}"


def _on_a_run(name: str, run: dict[str, Any], total_bytes: int, findings: Findings) -> None:
    gpu = find_gpu(run["gpu"])
    with _no_values():
        net = import_torchvision().models.get_model(
            run["torchvision"], weights=None, num_classes=run["num_classes"]
        )
    program = PublishedLoop(model=net, optimizer=run["optimizer"], pixels=run["image_size"])
    (trace,) = _traces(program, (run["batch"],))
    context = sum(gpu.context_bytes) // 2
    events = trace.events(run["batch"], workspace_bytes=gpu.workspace_bytes)
    ran = replay(events, limit_bytes=total_bytes - context)
    measured = run["measured_peak_bytes"]
    predicted = {
        "xMem": run["xmem_bytes"],
        "allocator": ran.peak_reserved,
        "context": ran.peak_reserved + context,
    }
    errors = {by: 100 * (size / measured - 1) for by, size in predicted.items()}
    row = {
        "run": name,
        "measured": measured // _MIB,
        "xMem": run["xmem_bytes"] // _MIB,
        "reserved": ran.peak_reserved // _MIB,
        "allocated": ran.peak_allocated // _MIB,
        "xMem_%": round(errors["xMem"], 1),
        "error_%": round(errors["allocator"], 1),
        "with_context_%": round(errors["context"], 1),
        "fits": ran.fits,
    }
    findings.add(_RUNS, row, absolute_errors=[abs(error) for error in errors.values()])


def _on_the_ladder(
    models: dict[str, dict[str, Any]], ladder: list[int], findings: Findings
) -> None:
    os.environ["TIMM_FUSED_ATTN"] = "0"  # Attention was not fused when they were measured.
    import_torchvision()
    try:
        timm = importlib.import_module("timm")
    except ModuleNotFoundError:
        findings.left_out.append("largest batches: timm is not installed")
        return
    gpu = find_gpu("RTX 3090")
    for name, published in findings.in_time(models):
        try:
            with _no_values():
                net = timm.create_model(name, pretrained=False)
            program = LadderStep(model=net, pixels=published["image_size"])
            trace = fitted(*_traces(program, _SIZES))
            if trace is None:
                raise ValueError("two batches take different ways")
        except Exception as error:  # noqa: BLE001  # The other models are tried all the same.
            findings.left_out.append(f"{name}: {type(error).__name__}: {error}"[:200])
            continue
        rungs = {context: _rung(trace, ladder, gpu, context * _MIB) for context in _CONTEXTS}
        row = {"model": name, "published": published["largest_batch"]}
        row |= {"predicted": rungs[_CONTEXT], "right": rungs[_CONTEXT] == row["published"]}
        findings.add(_RUNGS, row, by_context_mib={str(c): rung for c, rung in rungs.items()})
    rows: Any = findings.rows(_RUNGS)
    for context in _CONTEXTS if rows else ():
        answers = [row["by_context_mib"][str(context)] == row["published"] for row in rows]
        row = {"context_MiB": context, "right": sum(answers), "models": len(answers)}
        findings.add(_RUNGS_ALL, row | {"share": sum(answers) / len(answers)})


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


def _traces(program: PublishedLoop | LadderStep, batches: tuple[int, ...]) -> list[Trace]:
    tensors = [*program.model.parameters(), *program.model.buffers()]
    order = Order(program=packed(program, tensors), batches=batches)
    answer = traced([order])
    if not answer.on_cuda:
        raise RuntimeError("this build of torch refuses tensors of a GPU that is not here")
    return answer.traces[0]


def _batch(batch: int, pixels: int, recorder: Recorder) -> tuple[Tensor, Tensor]:
    images = torch.empty(batch, 3, pixels, pixels, device=recorder.device)
    return images, torch.empty(batch, dtype=torch.long, device=recorder.device)


def _first(outputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The classifier's own scores: a few models return those of a teacher's token too."""
    return outputs if isinstance(outputs, Tensor) else outputs[0]


@contextlib.contextmanager
def _no_values() -> Iterator[None]:
    """Leave weights as they come: drawing them takes longer than a trace."""
    own = {name: f for name, f in vars(nn.init).items() if name.endswith("_") and callable(f)}
    try:
        for name in own:
            setattr(nn.init, name, functools.partial(_as_it_is))
        yield
    finally:
        for name, function in own.items():
            setattr(nn.init, name, function)


def _as_it_is(tensor: Tensor, *_: object, **__: object) -> Tensor:
    return tensor
