"""Rows that a kernel gets wrong without a word, once an operation passes 2^31 elements.

Kernels that index with 32 bits write beyond, or never reach, the last rows of a tensor that has
more elements, and some raise nothing (USERS 1.2.8). So a size whose trial may have held such a
tensor runs forward once more, in evaluation mode, and its last rows must be those that a few
examples give by themselves.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from autobatch.data.micro_batches import largest_piece
from autobatch.data.tree import BatchTree, describe, size_of, take, tensors
from autobatch.devices.oom import verdict_of
from autobatch.results.verdict import Verdict
from autobatch.training.engine.gradient_pass import GradientPass
from autobatch.training.losses.objective import (
    Encode,
    FullBatchLoss,
    MicroBatch,
    MicroBatchLoss,
    Passes,
)
from autobatch.training.model_state.evaluation_mode import undisturbed

INDEXED: Final = 2**31  # Elements that 32 bits can tell apart.

_FEW: Final = 2  # Rows that are compared; BatchNorm may refuse a single example.
_FINE: Final = 1e-2  # Of the largest value: another size may take another kernel, TF32 among them.
_COARSE: Final = 1e-1  # In 16 bits. What a wrong index leaves is off by all of it.
_SIXTEEN: Final = (torch.float16, torch.bfloat16)


class KernelIndexCheck:
    """Compares the last rows of a large size with those of a few examples.

    Args:
        gradient: Computes the gradient of a training step.
        sample: Real examples.
        indexed: How many elements an operation may have and be believed.
    """

    def __init__(self, gradient: GradientPass, sample: BatchTree, indexed: int = INDEXED) -> None:
        self._gradient = gradient
        self._sample = sample
        self._indexed = indexed
        self._few: tuple[list[int], list[int]] | None = None  # Elements by operation, at two sizes.

    def __call__(self, size: int, peak_bytes: int) -> str:
        """Return what is wrong with ``size``, or ``""``.

        A trial whose peak is below 2^31 bytes held no such tensor, and costs nothing here. For any
        other, operations are counted at two small sizes, once, and only a size that passes runs.
        Where that cannot be told (the model cannot be evaluated, mixes examples, draws random
        numbers even then, gives no outputs by rows, or memory runs out) nothing is said: the trial
        itself ran.

        Args:
            size: Examples, in a trial that ran.
            peak_bytes: What it allocated at most.

        Raises:
            Exception: If the device's context is lost.
        """
        if peak_bytes <= self._indexed or size <= 2 * _FEW:
            return ""
        try:
            with undisturbed(self._gradient.model), _plain_kernels():
                return self._compare(size) if self._passes(size) else ""
        except Exception as error:
            if verdict_of(error) is Verdict.FATAL:
                raise
        return ""  # Here the error has let go of what it held.

    def _passes(self, size: int) -> bool:
        """Whether an operation has too many elements at ``size``."""
        if self._few is None:
            self._few = self._count(_FEW), self._count(2 * _FEW)
        return elements_at(size, *self._few) > self._indexed

    def _count(self, size: int) -> list[int]:
        batch, counter = self._batch(size), _Counter()
        with torch.enable_grad(), counter:  # By the way that training takes.
            self._outputs(batch)
        return counter.elements

    def _compare(self, size: int) -> str:
        few, twice = self._outputs(self._batch(_FEW)), self._outputs(self._batch(2 * _FEW))
        if not few or any(self._differ(two, one) for one, two in zip(few, twice, strict=True)):
            return ""  # Nothing to compare, or examples are mixed, or random.
        many = self._outputs(self._batch(size))
        for place, (expected, found) in enumerate(zip(few, many, strict=True)):
            if self._differ(found, expected):
                return (
                    f"a kernel gives wrong rows at {size} examples and raises nothing: the last of "
                    f"output {place}, {describe(found)}, are off by up to "
                    f"{_distance(_last_rows(found, expected), expected):.3g}, beside values of up "
                    f"to {_largest(expected):.3g} for the same examples alone; an operation passes "
                    f"{self._indexed} elements here, which 32 bits cannot index"
                )
        return ""

    def _batch(self, size: int) -> BatchTree:
        """So many examples, the last two of the sample at the end and nowhere else.

        A row that was taken from, or written to, a wrong place must not happen to be the same.
        """
        piece = largest_piece(self._sample)
        length = size_of(piece)
        others = max(length - _FEW, 1)
        body = [row % others for row in range(size - _FEW)]
        return take(piece, [*body, max(length - _FEW, 0), length - 1])

    def _outputs(self, batch: BatchTree) -> list[Tensor]:
        """What the model returns for a batch: all that has rows of numbers that are not whole."""
        gradient = self._gradient
        shown: list[BatchTree] = []
        passes = _OnePass(MicroBatch(gradient.prefetcher.move(batch), batch), shown)
        with gradient.precision.forward():
            gradient.objective.run(passes, gradient.model, lambda outputs, _: shown.append(outputs))
        found = [tensor.detach() for tensor in tensors(shown) if tensor.ndim]
        return [tensor for tensor in found if tensor.is_floating_point() or tensor.is_complex()]

    def _differ(self, found: Tensor, expected: Tensor) -> bool:
        """Whether the last rows are others; a tensor without such rows is not compared."""
        last = _last_rows(found, expected)
        if last is None:
            return False
        coarse = self._gradient.precision.name != "fp32" or any(
            tensor.dtype in _SIXTEEN for tensor in (expected, *self._gradient.model.parameters())
        )
        tolerance = _COARSE if coarse else _FINE
        return not _distance(last, expected) <= tolerance * _largest(expected)


def elements_at(size: int, few: list[int], twice: list[int]) -> int:
    """Return the elements of the largest operation at ``size``.

    Args:
        size: In examples.
        few: Elements of each operation, in order, at 2 examples.
        twice: The same at 4. Each grows along a line; if they are not the same operations, the
            largest is taken to grow from nothing, which may be too much.
    """
    if len(few) != len(twice):
        return math.ceil(max(twice) * size / (2 * _FEW))
    return max(
        one + (two - one) * (size - _FEW) // _FEW for one, two in zip(few, twice, strict=True)
    )


class _OnePass(Passes):
    """Runs one micro-batch forward, and keeps its outputs where nothing else records them."""

    def __init__(self, micro_batch: MicroBatch, shown: list[BatchTree]) -> None:
        self._micro_batch = micro_batch
        self._shown = shown

    def one_by_one(self, loss: MicroBatchLoss) -> None:
        loss(self._micro_batch)

    def outputs_first(self, encode: Encode, loss: FullBatchLoss) -> None:  # noqa: ARG002
        self._shown.append(encode(self._micro_batch)[0])


class _Counter(TorchDispatchMode):
    """Notes how many elements the largest tensor of each operation has."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped.
        self.elements: list[int] = []

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        counts = (tensor.numel() for tensor in tensors([args, kwargs, result]))
        self.elements.append(max(counts, default=0))
        return result


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Keep the transformer layers of torch from kernels that they take without gradients only."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _last_rows(found: Tensor, expected: Tensor) -> Tensor | None:
    """As many as are expected; None where there are no rows, or others."""
    if found.shape[1:] != expected.shape[1:] or len(found) < len(expected):
        return None
    return found[len(found) - len(expected) :]


def _distance(found: Tensor | None, expected: Tensor) -> float:
    """The largest difference; equal infinities, and nan beside nan, do not differ."""
    if found is None or not expected.numel():
        return 0.0
    same = (found == expected) | (found.isnan() & expected.isnan())
    apart = torch.where(same, 0, (found - expected).abs())
    return float(apart.nan_to_num(nan=math.inf, posinf=math.inf).max())


def _largest(tensor: Tensor) -> float:
    """The largest finite value, without its sign."""
    if not tensor.numel():
        return 0.0
    return float(tensor.abs().nan_to_num(nan=0.0, posinf=0.0).max())
