import math
import pickle
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autobatch.results.plan import BatchPlan, useful_sizes
from autobatch.validation import check_size

drawn = settings(deadline=None, derandomize=True)
sizes = st.integers(1, 3_000)
small_sizes = st.integers(1, 60)
NOT_INTEGERS = [2.5, 256.0, "256", True, False, None, [256], torch.tensor(2.5)]


def fewest_parts(desired: int, tolerable: int) -> int:
    """Take away as much as is tolerable until nothing is left."""
    parts = 0
    while desired > 0:
        desired -= tolerable
        parts += 1
    return parts


@drawn
@given(desired=sizes, tolerable=sizes)
def test_the_sizes_add_up_to_desired_and_none_is_above_tolerable(
    desired: int, tolerable: int
) -> None:
    plan = BatchPlan(desired=desired, tolerable=tolerable)
    assert sum(plan.micro_batch_sizes) == desired
    assert 1 <= min(plan.micro_batch_sizes) <= max(plan.micro_batch_sizes) <= tolerable
    assert plan.micro_batch == max(plan.micro_batch_sizes)


@drawn
@given(desired=small_sizes, tolerable=small_sizes)
def test_there_are_as_few_micro_batches_as_can_be(desired: int, tolerable: int) -> None:
    plan = BatchPlan(desired=desired, tolerable=tolerable)
    assert plan.accumulation_steps == fewest_parts(desired, tolerable)
    assert len(plan.micro_batch_sizes) == plan.accumulation_steps


@drawn
@given(desired=sizes, tolerable=sizes)
def test_sizes_differ_by_one_at_most_and_the_larger_come_first(
    desired: int, tolerable: int
) -> None:
    found = BatchPlan(desired=desired, tolerable=tolerable).micro_batch_sizes
    assert found[0] - found[-1] <= 1
    assert list(found) == sorted(found, reverse=True)


@drawn
@given(desired=st.integers(1, 500))
def test_the_useful_sizes_are_the_desired_batch_over_each_number_of_parts(desired: int) -> None:
    by_brute_force = {math.ceil(desired / parts) for parts in range(1, desired + 1)}
    assert useful_sizes(desired) == tuple(sorted(by_brute_force))


@drawn
@given(desired=st.integers(1, 10**6))
def test_there_are_few_useful_sizes(desired: int) -> None:
    found = useful_sizes(desired)
    assert len(found) <= 2 * math.sqrt(desired)
    assert found[0] == 1
    assert found[-1] == desired


@drawn
@given(desired=sizes, tolerable=sizes)
def test_a_tolerable_batch_between_two_useful_sizes_gives_the_plan_of_the_lower_one(
    desired: int, tolerable: int
) -> None:
    lower = max(size for size in useful_sizes(desired) if size <= tolerable)
    plan = BatchPlan(desired=desired, tolerable=tolerable)
    assert plan.micro_batch_sizes == BatchPlan(desired=desired, tolerable=lower).micro_batch_sizes


@drawn
@given(desired=st.integers(2, 500))
def test_each_useful_size_changes_the_number_of_parts(desired: int) -> None:
    found = useful_sizes(desired)
    parts = [BatchPlan(desired=desired, tolerable=size).accumulation_steps for size in found]
    assert parts == sorted(set(parts), reverse=True)


@pytest.mark.parametrize(
    ("desired", "tolerable", "found"),
    [
        (256, 100, (86, 85, 85)),
        (100, 50, (50, 50)),
        (100, 100, (100,)),
        (100, 101, (100,)),
        (100, 10**9, (100,)),
        (10, 4, (4, 3, 3)),
        (3, 1, (1, 1, 1)),
        (1, 1, (1,)),
    ],
)
def test_known_plans(desired: int, tolerable: int, found: tuple[int, ...]) -> None:
    plan = BatchPlan(desired=desired, tolerable=tolerable)
    assert plan.micro_batch_sizes == found
    assert plan.micro_batch == found[0]
    assert plan.accumulation_steps == len(found)


@pytest.mark.parametrize(
    ("desired", "tolerable", "text"),
    [
        (256, 100, "256 = 86 + 85 + 85: 3 accumulation steps, tolerable batch 100"),
        (256, 300, "256 = 256: 1 accumulation step, tolerable batch 300"),
        (256, 64, "256 = 64 + 64 + 64 + 64: 4 accumulation steps, tolerable batch 64"),
        (256, 60, "256 = 1 x 52 + 4 x 51: 5 accumulation steps, tolerable batch 60"),
        (256, 32, "256 = 8 x 32: 8 accumulation steps, tolerable batch 32"),
        (1, 1, "1 = 1: 1 accumulation step, tolerable batch 1"),
    ],
)
def test_a_plan_reads_as_a_sum(desired: int, tolerable: int, text: str) -> None:
    assert str(BatchPlan(desired=desired, tolerable=tolerable)) == text


@drawn
@given(desired=small_sizes, tolerable=small_sizes)
def test_the_sum_in_the_text_is_true(desired: int, tolerable: int) -> None:
    text = str(BatchPlan(desired=desired, tolerable=tolerable))
    whole, parts = text.split(":")[0].split(" = ")
    terms = [part.split(" x ") for part in parts.split(" + ")]
    assert sum(math.prod(map(int, term)) for term in terms) == int(whole) == desired


@pytest.mark.parametrize("name", ["desired", "tolerable"])
@pytest.mark.parametrize("size", [0, -1, np.int64(0)])
def test_a_size_below_one_is_a_bad_value_and_is_shown(name: str, size: int) -> None:
    arguments = {"desired": 8, "tolerable": 4, name: size}
    with pytest.raises(ValueError, match=rf"^{name} must be at least 1, got {int(size)}$"):
        BatchPlan(**arguments)


@pytest.mark.parametrize("name", ["desired", "tolerable"])
@pytest.mark.parametrize("size", NOT_INTEGERS, ids=repr)
def test_what_is_no_integer_is_a_bad_type_and_is_shown(name: str, size: int) -> None:
    arguments = {"desired": 8, "tolerable": 4, name: size}
    with pytest.raises(TypeError) as caught:
        BatchPlan(**arguments)
    assert str(caught.value) == f"{name} must be an integer of at least 1, got {size!r}"


@pytest.mark.parametrize(("size", "error"), [(0, ValueError), (-3, ValueError), (2.5, TypeError)])
def test_useful_sizes_refuses_what_a_plan_refuses(size: int, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"^desired must be .* got {size}$"):
        useful_sizes(size)


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8, torch.tensor])
def test_other_integers_become_python_integers(kind: type) -> None:
    plan = BatchPlan(desired=kind(8), tolerable=kind(3))
    assert plan == BatchPlan(desired=8, tolerable=3)
    assert [type(plan.desired), type(plan.tolerable)] == [int, int]
    assert type(check_size("size", kind(8))) is int
    found = useful_sizes(kind(8))
    assert found == (1, 2, 3, 4, 8)
    assert {type(size) for size in found} == {int}


def test_a_plan_is_a_value() -> None:
    plan = BatchPlan(desired=256, tolerable=100)
    assert plan == BatchPlan(desired=256, tolerable=100) != BatchPlan(desired=256, tolerable=99)
    assert len({plan, BatchPlan(desired=256, tolerable=100)}) == 1
    assert pickle.loads(pickle.dumps(plan)) == plan
    with pytest.raises(FrozenInstanceError):
        plan.desired = 1  # type: ignore[misc]  # Refusing it is the test.


@given(desired=small_sizes, tolerable=small_sizes, multiple_of=st.integers(1, 64))
def test_all_but_the_last_are_multiples(desired: int, tolerable: int, multiple_of: int) -> None:
    plan = BatchPlan(desired=desired, tolerable=tolerable, multiple_of=multiple_of)
    cut = plan.micro_batch_sizes
    assert sum(cut) == desired
    assert min(cut) >= 1
    assert max(cut) == plan.micro_batch <= tolerable
    if multiple_of <= min(tolerable, desired):
        assert all(size % multiple_of == 0 for size in cut[:-1])
        assert len(set(cut[:-1])) <= 2
        in_whole_units = tolerable // multiple_of * multiple_of
        assert len(cut) == -(-desired // in_whole_units), "as few as can be"
    else:
        assert cut == BatchPlan(desired=desired, tolerable=tolerable).micro_batch_sizes


@given(desired=st.integers(1, 10**5), multiple_of=st.integers(1, 300))
def test_useful_multiples_are_multiples_up_to_desired(desired: int, multiple_of: int) -> None:
    found = useful_sizes(desired, multiple_of)
    assert found == tuple(sorted(set(found)))
    assert found[-1] == desired
    assert all(size % multiple_of == 0 for size in found[:-1])


def test_a_known_plan_in_eights() -> None:
    plan = BatchPlan(desired=256, tolerable=100, multiple_of=8)
    assert plan.micro_batch_sizes == (88, 88, 80)
    assert useful_sizes(256, 8) == (8, 16, 24, 32, 40, 48, 56, 64, 88, 128, 256)
    assert BatchPlan(desired=250, tolerable=100, multiple_of=8).micro_batch_sizes == (88, 88, 74)
