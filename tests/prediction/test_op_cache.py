"""What was returned once is made again as it was."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_trace import NETS, PRECISIONS, order
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from autobatch.prediction import tracing_worker
from autobatch.prediction.op_cache import OperationCache
from autobatch.training.engine.precision import PrecisionName

aten: Any = torch.ops.aten


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", NETS)
def test_a_trace_is_the_same_where_nothing_is_remembered(
    name: str, precision: PrecisionName, monkeypatch: pytest.MonkeyPatch
) -> None:
    ordered = order(*NETS[name](), precision=precision)
    (remembered,) = tracing_worker.trace_requests([ordered]).traces
    calls = 0

    def forget(_: OperationCache, func: Any, args: Any, kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return func(*args, **kwargs)

    monkeypatch.setattr(OperationCache, "__call__", forget)
    (forgotten,) = tracing_worker.trace_requests([ordered]).traces
    assert calls > 10
    assert [t.changes for t in remembered] == [t.changes for t in forgotten]
    assert [t.kinds for t in remembered] == [t.kinds for t in forgotten]


@contextlib.contextmanager
def counted() -> Iterator[tuple[Callable[..., Any], list[Any]]]:
    """A new one, and the operations that came to torch."""
    remembered = OperationCache()
    ran: list[Any] = []
    kept: dict[Any, Any] = {}

    def run(func: Any, *args: Any, **kwargs: Any) -> Any:
        def noted(*given: Any, **more: Any) -> Any:
            ran.append(func)
            return func(*given, **more)

        for name in ("_schema", "namespace", "tags"):
            setattr(noted, name, getattr(func, name))
        return remembered(kept.setdefault(func, noted), args, kwargs)

    with FakeTensorMode():
        yield run, ran


def like(one: Tensor, other: Tensor) -> bool:
    same = (one.shape, one.stride(), one.dtype, one.device) == (
        *(other.shape, other.stride(), other.dtype, other.device),
    )
    storage = one.untyped_storage(), other.untyped_storage()
    return same and storage[0].nbytes() == storage[1].nbytes() and storage[0] is not storage[1]


def test_the_second_time_torch_is_not_asked() -> None:
    with counted() as (run, ran):
        left, right = torch.empty(3, 4), torch.empty(4, 5).t().contiguous().t()
        first, second = (run(aten.mm.default, left, right) for _ in range(2))
        assert isinstance(second, FakeTensor)
        assert like(first, second)
        assert len(ran) == 1
        run(aten.mm.default, left, torch.empty(4, 5))  # Other strides.
        assert len(ran) == 2
        several = [run(aten.native_dropout.default, left, 0.5, True) for _ in range(2)]
        assert all(like(a, b) for a, b in zip(*several, strict=True))
        assert len(ran) == 3


def test_equal_numbers_of_different_types_are_not_the_same() -> None:
    with counted() as (run, _):
        whole = torch.empty(3, dtype=torch.int64)
        dtypes = [run(aten.add.Tensor, whole, number).dtype for number in (1, 1.0, True, 1)]
    assert dtypes == [torch.int64, torch.float32, torch.int64, torch.int64]


def test_views_and_parts_of_others_are_torchs_own() -> None:
    with counted() as (run, ran):
        tensor = torch.empty(4, 6)
        views = [run(aten.view.default, tensor, [24]) for _ in range(2)]
        views += [run(aten._unsafe_view.default, tensor, [24]) for _ in range(2)]
        assert len(ran) == 4
        base = tensor.untyped_storage()._cdata
        assert [view.untyped_storage()._cdata == base for view in views] == [True] * 4


def test_in_place_operations_return_what_they_were_given() -> None:
    with counted() as (run, ran):
        tensor = torch.empty(3)
        assert run(aten.add_.Tensor, tensor, 1) is tensor
        assert not ran
        run(aten.t_.default, torch.empty(3, 4))  # It changes the shape.
        assert len(ran) == 1


def test_values_that_are_known_stay_known() -> None:
    with FakeTensorMode() as mode:
        three = torch.tensor(3.0)
    assert isinstance(three, FakeTensor)
    assert three.constant is not None
    remembered = OperationCache()
    with mode:
        assert remembered(aten.add.Tensor, (three, 1.0), {}).constant is not None
        assert remembered(aten.add.Tensor, (three, 1.0), {}).constant is not None
