from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autobatch import DoesNotFitError
from autobatch.results import remedies
from autobatch.results.memory import Breakdown
from autobatch.results.remedies import needed_bytes, what_would_help

MIB = 2**20
PARTS = st.integers(0, 2**40)


def test_each_way_out_says_by_how_much_and_the_most_comes_first() -> None:
    adam = Breakdown(
        parameter_bytes=100 * MIB,
        gradient_bytes=96 * MIB,
        optimizer_state_bytes=192 * MIB,
        activation_bytes=50 * MIB,
        other_process_bytes=40 * MIB,
        headroom_bytes=20 * MIB,
        missing_bytes=30 * MIB,
    )
    assert [str(remedy) for remedy in what_would_help(adam)] == [
        "freezing parameters before the optimizer is made: frees gradients and "
        "optimizer state, which take at least 288.0 MiB",
        "SGD without momentum as the optimizer: frees at least 192.0 MiB of optimizer state",
        "SGD with momentum as the optimizer: frees at least 96.0 MiB of optimizer state",
        'smaller inputs, checkpointed activations or precision="bf16": lowers activations and '
        "temporaries, which take at least 50.0 MiB",
        "ending other processes: frees up to 40.0 MiB",
        "headroom=0: frees 20.0 MiB",
        "a larger memory_limit or device: at least 498.0 MiB in all",
    ]


def test_only_what_helps_is_named() -> None:
    momentum = Breakdown(gradient_bytes=MIB, optimizer_state_bytes=MIB, free_bytes=MIB)
    assert [str(remedy) for remedy in what_would_help(momentum)] == [
        "freezing parameters before the optimizer is made: frees gradients and "
        "optimizer state, which take at least 2.0 MiB",
        "SGD without momentum as the optimizer: frees at least 1.0 MiB of optimizer state",
        "a larger memory_limit or device: 3.0 MiB are not enough",
    ]
    assert len(what_would_help(Breakdown(parameter_bytes=MIB))) == 1


def test_what_would_not_make_up_for_it_all_together_is_no_advice() -> None:
    """The parameters alone are too large: no optimizer helps."""
    short = Breakdown(
        parameter_bytes=100, gradient_bytes=10, optimizer_state_bytes=20, missing_bytes=30
    )
    assert len(what_would_help(short)) > 1
    [only] = what_would_help(replace(short, missing_bytes=31))
    assert only.action == "a larger memory_limit or device"


def test_a_gpu_that_is_not_here_has_no_limit_to_raise() -> None:
    breakdown = Breakdown(activation_bytes=3 * MIB, missing_bytes=MIB)
    assert (
        str(what_would_help(breakdown)[-1])
        == "a larger memory_limit or device: at least 3.0 MiB in all"
    )
    predicted = what_would_help(breakdown, predicted=True)
    assert str(predicted[-1]) == "a GPU with more memory: at least 3.0 MiB in all"


@given(parts=st.lists(PARTS, min_size=12, max_size=12))
def test_nothing_frees_more_than_there_is_and_more_memory_is_always_a_way(parts: list[int]) -> None:
    breakdown = Breakdown(**dict(zip(Breakdown.__dataclass_fields__, parts, strict=True)))
    *freeing, more = what_would_help(breakdown)
    assert all(0 < remedy.bytes <= sum(breakdown.parts.values()) for remedy in freeing)
    assert [remedy.bytes for remedy in freeing] == sorted((r.bytes for r in freeing), reverse=True)
    assert more.bytes == breakdown.needed_bytes


CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.25 GiB of "
    "which 1.02 GiB is free. Process 4242 has 78.10 GiB memory in use. Of the allocated memory "
    "70.50 GiB is allocated by PyTorch, and 6.90 GiB is reserved by PyTorch but unallocated."
)


TORN = CUDA.replace("2.00 GiB.", "6.80 GiB.")


def test_memory_in_pieces_that_would_have_been_enough_is_a_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """USERS 4.5 and 4.6: suggested where it helps, under the name that torch knows, never set."""
    some = Breakdown(parameter_bytes=MIB, missing_bytes=MIB)
    error = DoesNotFitError(1, 70 * 2**30, some, TORN)
    remedy = (
        "PYTORCH_ALLOC_CONF=expandable_segments:True, set before Python starts: may make 6.9 GiB "
        "usable that are reserved but fragmented"
    )
    assert str(error.remedies[0]) == remedy
    assert remedy in str(error)
    enough = TORN.replace("6.80 GiB.", "6.91 GiB.")
    for text in (enough, "", "6.90 GiB is reserved by PyTorch but unallocated"):
        assert not any("ALLOC_CONF" in str(r) for r in what_would_help(some, text)), text
    monkeypatch.setattr(remedies, "spilling_platform", lambda: "WSL")
    assert not any("ALLOC_CONF" in str(remedy) for remedy in error.remedies)


def test_a_failure_on_a_gpu_says_what_was_needed() -> None:
    needed = needed_bytes(CUDA)
    assert 72.48 * 2**30 < needed <= 72.5 * 2**30 - 0.01 * 2**30, "rounded down, twice"
    assert needed_bytes(CUDA.replace("2.00 GiB.", "20.00 MiB.")) < 70.52 * 2**30


@pytest.mark.parametrize(
    "text",
    [
        "",
        "metered device out of memory: 6.2 MiB of live tensors after aten.mm, limit 6.0 MiB",
        "Tried to allocate 2.00 GiB (GPU 0)",
        "70.50 GiB is allocated by PyTorch",
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1000000000000 bytes.",
    ],
)
def test_a_text_that_does_not_say_both_says_nothing(text: str) -> None:
    assert needed_bytes(text) == 0
