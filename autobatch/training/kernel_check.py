"""Find kernels that compute wrong rows without an error, where an operation passes 2^31 elements.

Kernels that index with 32 bits miss or overwrite the last rows of a larger tensor, and some of them
raise nothing (https://github.com/pytorch/pytorch/issues/190139). For this reason, a size whose
trial may have held such a tensor runs forward once more, in evaluation mode. Its last rows must be
equal to the rows that the same examples give in a small batch.
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
from autobatch.training.losses.tolerance import Tolerance
from autobatch.training.model_state.evaluation_mode import undisturbed

MAX_INDEXED_ELEMENTS: Final = 2**31  # Elements that 32 bits can index.

_FEW: Final = 2  # Rows that are compared; BatchNorm may refuse a single example.
# A share of the largest value: another size may take another kernel, TF32 among them. A wrong
# index makes rows wrong by their whole size.
ROW_TOLERANCE: Final = Tolerance(float64=1e-2, float32=1e-2, float16=1e-1, bfloat16=1e-1)
# Rows are wrong only if they change by more than this many times what two more examples change in
# them. A model that mixes examples a little passes the tolerance slowly, as a mean over more
# examples does: 1.6 times is the most in 300 attention layers.
_MIXING_FACTOR: Final = 5


class KernelIndexCheck:
    """Compare the last rows of a large batch with those of a small one.

    Args:
        gradient: Computes the gradient of a training step.
        sample: Real examples.
        max_elements: Elements up to which every operation is taken to be right.
    """

    def __init__(
        self,
        gradient: GradientPass,
        sample: BatchTree,
        max_elements: int = MAX_INDEXED_ELEMENTS,
    ) -> None:
        self._gradient = gradient
        self._sample = sample
        self._max_elements = max_elements
        # Elements of each operation, at 2 and at 4 examples.
        self._counts: tuple[list[int], list[int]] | None = None

    def __call__(self, size: int, peak_bytes: int) -> str:
        """Return what is wrong with ``size``, or ``""``.

        A trial whose peak is below 2^31 bytes held no such tensor, so that this check runs nothing.
        For any other trial, the check counts the elements of each operation at two small sizes,
        once, and runs ``size`` only if an operation passes the limit there.

        The check returns ``""`` where it cannot compare: the model cannot be evaluated, mixes
        examples, draws random numbers in evaluation mode, has no outputs with rows, or memory runs
        out. The trial itself ran.

        Args:
            size: Examples in a trial that ran.
            peak_bytes: The most that the trial allocated.

        Raises:
            Exception: If the device's context is lost.
        """
        if peak_bytes <= self._max_elements or size <= 2 * _FEW:
            return ""
        try:
            with undisturbed(self._gradient.model), _training_kernels():
                return self._compare(size) if self._passes_limit(size) else ""
        except Exception as error:
            if verdict_of(error) is Verdict.FATAL:
                raise
        return ""  # After the except clause the error no longer holds tensors.

    def _passes_limit(self, size: int) -> bool:
        """Whether an operation has too many elements at ``size``."""
        if self._counts is None:
            self._counts = self._count(_FEW), self._count(2 * _FEW)
        return elements_at(size, *self._counts) > self._max_elements

    def _count(self, size: int) -> list[int]:
        batch, counter = self._batch(size), _ElementCounter()
        with torch.enable_grad(), counter:  # Training takes the operations with gradients.
            self._outputs(batch)
        return counter.elements

    def _compare(self, size: int) -> str:
        few, twice = self._outputs(self._batch(_FEW)), self._outputs(self._batch(2 * _FEW))
        if not few or len(few) != len(twice):
            return ""
        usual = [_distance(two, one) for one, two in zip(few, twice, strict=True)]
        if any(
            distance > self._tolerance(expected)
            for distance, expected in zip(usual, few, strict=True)
        ):
            return ""  # The model mixes examples, or draws random numbers.
        many = self._outputs(self._batch(size))
        for position, (expected, found) in enumerate(zip(few, many, strict=True)):
            distance = _distance(found, expected)
            if distance > max(self._tolerance(expected), _MIXING_FACTOR * usual[position]):
                return (
                    f"a kernel computes wrong rows at {size} examples and raises nothing: the last "
                    f"rows of output {position}, {describe(found)}, are off by up to "
                    f"{distance:.3g}, while the same examples in a small batch have values of up "
                    f"to {_largest(expected):.3g}; an operation passes {self._max_elements} "
                    "elements here, which 32 bits cannot index"
                )
        return ""

    def _batch(self, size: int) -> BatchTree:
        """Return a batch of ``size`` whose last two examples are the last two of the sample.

        These two stand nowhere else in the batch: a row that a kernel reads from, or writes to, a
        wrong position must not be equal to the right one by chance.
        """
        piece = largest_piece(self._sample)
        length = size_of(piece)
        others = max(length - _FEW, 1)
        body = [row % others for row in range(size - _FEW)]
        return take(piece, [*body, max(length - _FEW, 0), length - 1])

    def _outputs(self, batch: BatchTree) -> list[Tensor]:
        """Return the model's outputs that have rows and are no integers."""
        gradient = self._gradient
        recorded: list[BatchTree] = []
        passes = _OnePass(MicroBatch(gradient.prefetcher.move(batch), batch), recorded)
        with gradient.precision.forward():
            gradient.objective.run(
                passes, gradient.model, lambda outputs, _: recorded.append(outputs)
            )
        found = [tensor.detach() for tensor in tensors(recorded) if tensor.ndim]
        return [tensor for tensor in found if tensor.is_floating_point() or tensor.is_complex()]

    def _tolerance(self, expected: Tensor) -> float:
        """Return how far the same rows may differ between two sizes."""
        dtypes = {p.dtype for p in self._gradient.model.parameters() if p.is_floating_point()}
        if self._gradient.precision.name != "fp32":
            dtypes.add(torch.bfloat16)
        return ROW_TOLERANCE.of(expected.dtype, *dtypes) * _largest(expected)


def elements_at(size: int, few: list[int], twice: list[int]) -> int:
    """Return the elements of the largest operation at ``size``.

    The elements of an operation grow linearly with the size. If the two lists have different
    lengths, the largest operation is taken to be proportional to the size, which may be too much.

    Args:
        size: In examples.
        few: Elements of each operation, in order, at 2 examples.
        twice: Elements of each operation, in order, at 4 examples.
    """
    if len(few) != len(twice):
        return math.ceil(max(twice) * size / (2 * _FEW))
    return max(
        one + (two - one) * (size - _FEW) // _FEW for one, two in zip(few, twice, strict=True)
    )


class _OnePass(Passes):
    """Run one micro-batch forward, and keep its outputs where no recorder receives them."""

    def __init__(self, micro_batch: MicroBatch, recorded: list[BatchTree]) -> None:
        self._micro_batch = micro_batch
        self._recorded = recorded

    def one_by_one(self, loss: MicroBatchLoss) -> None:
        loss(self._micro_batch)

    def outputs_first(self, encode: Encode, loss: FullBatchLoss) -> None:  # noqa: ARG002
        self._recorded.append(encode(self._micro_batch)[0])


class _ElementCounter(TorchDispatchMode):
    """Note the number of elements of the largest tensor of each operation."""

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
def _training_kernels() -> Iterator[None]:
    """Keep torch's transformer layers from the kernels that they take only without gradients."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _last_rows(found: Tensor, expected: Tensor) -> Tensor | None:
    """Return as many rows as are expected; None if rows are missing or have another shape."""
    if found.shape[1:] != expected.shape[1:] or len(found) < len(expected):
        return None
    return found[len(found) - len(expected) :]


def _distance(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference of the last rows; 0 where there are no such rows.

    Equal infinities do not differ, neither do two nan.
    """
    last = _last_rows(found, expected)
    if last is None or not expected.numel():
        return 0.0
    same = (last == expected) | (last.isnan() & expected.isnan())
    difference = torch.where(same, 0, (last - expected).abs())
    return float(difference.nan_to_num(nan=math.inf, posinf=math.inf).max())


def _largest(tensor: Tensor) -> float:
    """Return the largest finite absolute value."""
    if not tensor.numel():
        return 0.0
    return float(tensor.abs().nan_to_num(nan=0.0, posinf=0.0).max())
