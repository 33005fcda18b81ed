"""Training programs of others, written again so that they can be traced without a GPU."""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autobatch.prediction.trace import Recorder, Trace
from autobatch.prediction.tracing_process import pack_program, trace_in_process
from autobatch.prediction.tracing_worker import TracingRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedLoop:
    """The loop of xMem's published runs: its ``conv_train_loop`` in exp/trainer/train_loop.py.

    The loop frees a batch before it copies the next one; the other tensors of an iteration live
    until the next iteration. Four iterations are run.

    Attributes:
        model: A classifier.
        optimizer: The optimizer's name in ``torch.optim``.
        pixels: Height and width of the images.
        zero_grad: When an iteration frees gradients: 0 before the forward pass, 1 between
            forward and backward pass, 2 after the step.
    """

    model: nn.Module
    optimizer: str
    pixels: int
    zero_grad: int

    def __call__(self, batch: int, recorder: Recorder) -> None:
        self.model.train()
        make = getattr(torch.optim, self.optimizer)
        optimizer = make(self.model.parameters(), lr=1e-3)
        held: dict[str, Tensor] = {}
        for _ in range(4):
            if self.zero_grad == 0:
                optimizer.zero_grad()
            for name in ("images", "labels"):
                held.pop(name, None)
            held["images"], held["labels"] = _batch(batch, self.pixels, recorder)
            held["outputs"] = self.model(held["images"])
            held["loss"] = F.cross_entropy(held["outputs"], held["labels"])
            if self.zero_grad == 1:
                optimizer.zero_grad()
            held["loss"].backward()
            optimizer.step()
            held["best"], held["classes"] = torch.max(held["outputs"], 1)
            if self.zero_grad == 2:
                optimizer.zero_grad()


@dataclass(frozen=True, slots=True, kw_only=True)
class LadderStep:
    """The step of timm's benchmark with torch 1.12, which zeroes gradients in place.

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


def traces(program: PublishedLoop | LadderStep, batches: Sequence[int]) -> list[Trace]:
    """Trace a program at each of these batch sizes.

    Raises:
        RuntimeError: If this build of torch refuses tensors of a GPU that does not exist.
    """
    tensors = [*program.model.parameters(), *program.model.buffers()]
    request = TracingRequest(program=pack_program(program, tensors), batches=tuple(batches))
    answer = trace_in_process([request])
    if not answer.on_cuda:
        raise RuntimeError("this build of torch refuses tensors of a GPU that does not exist")
    return answer.traces[0]


def _batch(batch: int, pixels: int, recorder: Recorder) -> tuple[Tensor, Tensor]:
    images = torch.empty(batch, 3, pixels, pixels, device=recorder.device)
    return images, torch.empty(batch, dtype=torch.long, device=recorder.device)


def _first(outputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Return the classifier's logits; a few models also return those of a distillation token."""
    return outputs if isinstance(outputs, Tensor) else outputs[0]


@contextlib.contextmanager
def without_values() -> Iterator[None]:
    """Leave weights uninitialized: drawing their values takes longer than a trace."""
    own = {name: f for name, f in vars(nn.init).items() if name.endswith("_") and callable(f)}
    try:
        for name in own:
            setattr(nn.init, name, functools.partial(_unchanged))
        yield
    finally:
        for name, function in own.items():
            setattr(nn.init, name, function)


def _unchanged(tensor: Tensor, *_: object, **__: object) -> Tensor:
    return tensor
