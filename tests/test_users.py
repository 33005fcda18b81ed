"""What users of other finders report (USERS, the lines named below) that no one module answers."""

import ast
import gc
import re
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from black_box import RAN, BlackBox
from states import fingerprint
from torch import Tensor, nn

from autobatch import (
    DoesNotFitError,
    SearchOptions,
    SearchResult,
    SearchTimeoutError,
    Verdict,
    check,
    find_and_train,
    find_batch_size,
    find_largest,
)
from autobatch.search.trial import TrialRunner
from autobatch.training.options import StepOptions
from autobatch.training.trial_step import TrialStep
from autobatch.training.workload import Workload

PACKAGE = Path(__file__).parent.parent / "autobatch"
CLEANING = {"collect", "empty_cache", "release_cached"}
OOM = torch.OutOfMemoryError
TEXT = "CUDA out of memory. Tried to allocate 20.00 MiB."


def cleaning_while_handling(source: str) -> list[int]:
    """The lines inside ``except`` blocks that give memory back."""
    handlers = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ExceptHandler)]
    return [
        call.lineno
        for handler in handlers
        for call in ast.walk(handler)
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr in CLEANING
    ]


def test_nothing_is_given_back_while_the_error_is_alive() -> None:
    """USERS 1.1.1, 1.1.5, 1.1.6 and 4.1: its traceback still holds the tensors."""
    for file in sorted(PACKAGE.rglob("*.py")):
        assert cleaning_while_handling(file.read_text()) == [], file


def test_the_rule_sees_the_usual_way() -> None:
    usual = (
        "try:\n    step()\nexcept RuntimeError:\n    torch.cuda.empty_cache()\n    gc.collect()\n"
    )
    assert cleaning_while_handling(usual) == [4, 5]


# How memory runs out in a user's own code.


def plainly() -> None:
    raise OOM(TEXT)


def while_handling_another() -> None:
    try:
        raise KeyError("no such layer")
    except KeyError:
        raise OOM(TEXT)  # noqa: B904 - without a cause is the case


def twice() -> None:
    try:
        raise OOM(TEXT)
    except OOM:
        raise OOM(TEXT)  # noqa: B904 - without a cause is the case


def as_the_cause_of_another() -> None:
    try:
        raise OOM(TEXT)
    except OOM as error:
        raise ValueError("block 3 failed") from error


def at_last() -> None:
    try:
        raise RuntimeError("CUDA error: out of memory")
    finally:
        gc.isenabled()


WAYS = [plainly, while_handling_another, twice, as_the_cause_of_another, at_last]


class Failing(nn.Module):
    """Notes what it holds when it fails, which it does above 8 examples."""

    def __init__(self, fail: Callable[[], None] = plainly, largest: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(16, 16)
        self.fail = fail
        self.largest = largest

    def forward(self, rows: Tensor) -> Tensor:
        hidden: Tensor = self.layer(rows).relu()
        if len(rows) > self.largest:
            HELD.append(weakref.ref(hidden))
            self.fail()
        scores: Tensor = self.layer(hidden)
        return scores


HELD: list[weakref.ref[Tensor]] = []  # A global: no search puts it back.


@pytest.fixture(autouse=True)
def _forget() -> None:
    HELD.clear()
    RAN.clear()


@contextmanager
def without_collection() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def rows(examples: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(examples, 16, generator=generator)
    return x, torch.randint(0, 16, (examples,), generator=generator)


@pytest.mark.parametrize("fail", WAYS)
def test_ten_failures_in_a_row_leave_not_a_byte(fail: Callable[[], None]) -> None:
    """USERS 1.1.2, 1.1.3 and 7.1: chained errors hold no more than plain ones."""
    job = Workload.resolve(
        Failing(fail),
        rows(),
        batch_size=64,
        options=StepOptions(),
        optimizer=None,
        device="cpu",
        memory_limit="1GiB",
        headroom=None,
    )
    with job.undisturbed():
        stage = TrialRunner(
            program=TrialStep(job.step, rows()),
            device=job.device,
            limit_bytes=job.limit_bytes(),
        )
        assert stage.try_sizes((4, 4), smaller_fits=False).fits  # Optimizer state.
        before = job.device.read().allocated_bytes
        with without_collection():
            for _ in range(10):
                trial = stage.try_sizes((32, 32), smaller_fits=True)
                assert trial.failure is Verdict.OUT_OF_MEMORY
                assert job.device.read().allocated_bytes == before
    assert len(HELD) == 10
    assert not any(held() is not None for held in HELD)


def searched(model: nn.Module) -> SearchResult:
    return find_batch_size(model, rows(), device="cpu")


def searched_while_handling(model: nn.Module) -> SearchResult:
    try:
        raise OOM("the user's own attempt")
    except OOM:
        return searched(model)


def test_a_search_saves_nothing_to_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """USERS 1.4.6: a killed search would leave it behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "save", None)  # Not to be asked.
    assert searched(Failing()).size == 8
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("search", [searched, searched_while_handling])
@pytest.mark.parametrize("fail", WAYS)
def test_a_search_leaves_no_error_to_a_notebook(
    fail: Callable[[], None],
    search: Callable[[nn.Module], SearchResult],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """USERS 1.1.3 and 1.1.8: nothing reaches ``sys.last_*``, and no failed tensor is reachable."""
    names = ("last_exc", "last_type", "last_value", "last_traceback")
    for name in names:
        monkeypatch.setattr(sys, name, name, raising=False)
    found = search(Failing(fail))
    assert found.size == 8
    assert [getattr(sys, name) for name in names] == list(names)
    assert HELD
    assert not any(held() is not None for held in HELD)


def test_an_error_that_a_notebook_keeps_holds_no_tensor_of_a_failed_trial() -> None:
    """USERS 1.1.8: where nothing fits an error goes up, with its frames."""
    with pytest.raises(DoesNotFitError) as caught, without_collection():
        find_batch_size(Failing(as_the_cause_of_another, largest=0), rows(), device="cpu")
    assert caught.value.__traceback__ is not None
    assert len(HELD) >= 2
    assert not any(held() is not None for held in HELD)
    assert "CUDA out of memory" not in str(caught.value.__cause__)
    assert "block 3 failed" in caught.value.message


def test_a_search_changes_no_setting_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """USERS 1.4.3 and 1.7.6: no setting of the search leaks into training."""
    for name in ("benchmark", "deterministic"):
        monkeypatch.setattr(torch.backends.cudnn, name, True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)

    def settings() -> list[object]:
        cudnn = torch.backends.cudnn
        return [
            *(cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, cudnn.enabled),
            torch.get_default_dtype(),
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.is_autocast_cache_enabled(),
            torch.backends.mha.get_fastpath_enabled(),
            torch.get_num_threads(),
            len(nn.modules.module._global_forward_hooks),
        ]

    before = settings()
    model = Failing()
    for precision in ("fp32", "bf16"):
        find_batch_size(model, rows(), device="cpu", precision=precision)
        assert settings() == before
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_nothing_above_what_is_desired_is_tried() -> None:
    """USERS 1.3.6 and 7.3: most failures of other finders are of sizes that nobody wants."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 1, 5, 5, generator=generator)
    y = torch.randint(0, 3, (300,), generator=generator)
    result = find_and_train(
        BlackBox(1000), (x, y), desired=64, max_steps=1, device="cpu", progress=False
    )
    assert (result.search.size, result.search.limited_by) == (64, "ceiling")
    assert all(trial.fits for trial in result.search.trials)
    assert max(RAN) == 64


class Clock(nn.Module):
    """A model that takes a second for each example, and runs out of memory above 20."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(16, 16)

    def forward(self, rows: Tensor) -> Tensor:
        NOW[0] += len(rows)
        if len(rows) > 20:
            raise OOM(TEXT)
        scores: Tensor = self.layer(rows)
        return scores


NOW = [0.0]  # What the clock shows. A global: no search puts it back.


def by_find_batch_size(search: SearchOptions) -> SearchResult:
    return find_batch_size(Clock(), rows(), device="cpu", search=search)


def by_inference(search: SearchOptions) -> SearchResult:
    return find_batch_size(Clock(), rows(), device="cpu", mode="inference", search=search)


def by_find_largest(search: SearchOptions) -> SearchResult:
    model = Clock()
    return find_largest(
        lambda size: model(torch.ones(size, 16)), ceiling=64, state=model, search=search
    )


def by_find_and_train(search: SearchOptions) -> SearchResult:
    return find_and_train(
        Clock(),
        rows(),
        desired=64,
        max_steps=1,
        device="cpu",
        search=search,
        progress=False,
    ).search


FINDERS = [by_find_batch_size, by_inference, by_find_largest, by_find_and_train]


@pytest.fixture
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials read the clock that the model moves."""
    NOW[0] = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: NOW[0])
    monkeypatch.setattr(time, "monotonic", lambda: NOW[0])


@pytest.mark.usefixtures("_clock")
@pytest.mark.parametrize("find", FINDERS)
class TestEveryWayToSearch:
    """USERS 1.3.4: accelerate drops an option where its finder is used as a decorator."""

    def test_knows_the_timeout(self, find: Callable[[SearchOptions], SearchResult]) -> None:
        """USERS 1.3.11 and 7.13."""
        found = find(SearchOptions(timeout_seconds=16.5))
        assert found.size <= 16
        assert found.limited_by == "time"
        assert Verdict.TOO_SLOW in {trial.failure for trial in found.trials}

    def test_knows_the_budget(self, find: Callable[[SearchOptions], SearchResult]) -> None:
        """USERS 1.3.11."""
        with pytest.raises(SearchTimeoutError, match="budget_seconds=3"):
            find(SearchOptions(budget_seconds=3))

    def test_knows_what_proof_is_wanted(
        self, find: Callable[[SearchOptions], SearchResult]
    ) -> None:
        found = find(SearchOptions(confirm="failed"))
        assert found.upper.reason == "ran out"
        assert found.upper.size is not None
        assert found.size < found.upper.size


@pytest.mark.parametrize("find", [by_find_batch_size, by_inference, by_find_largest])
def test_every_finder_knows_what_sizes_are_multiples_of(
    find: Callable[[SearchOptions], SearchResult],
) -> None:
    """USERS 1.3.1 and 1.3.4."""
    found = find(SearchOptions(multiple_of=8))
    assert found.size == 16
    assert all(trial.size % 8 == 0 for trial in found.trials)


@pytest.mark.parametrize("find", [by_find_batch_size, by_inference, by_find_and_train])
def test_every_finder_with_data_knows_its_worst_case(
    find: Callable[[SearchOptions], SearchResult],
) -> None:
    """USERS 1.3.4 and 1.8.2."""
    assert find(SearchOptions(worst_case="first")).worst_case == "the first batch"
    given = find(SearchOptions(worst_case=rows(3)))
    assert given.worst_case == "the batch given as worst_case"


@pytest.mark.usefixtures("_clock")
def test_a_check_knows_the_timeout_and_the_worst_case() -> None:
    """USERS 1.3.4, 1.3.10 and 1.8.2."""
    how: dict[str, Any] = {"device": "cpu"}
    slow = check(Clock(), rows(), 8, search=SearchOptions(timeout_seconds=10), **how)
    assert slow.failure is Verdict.TOO_SLOW
    assert check(Clock(), rows(), 8, search=SearchOptions(timeout_seconds=20), **how).fits

    class Long(nn.Linear):
        def forward(self, rows: Tensor) -> Tensor:
            if rows.abs().max() > 100:
                raise OOM(TEXT)
            return super().forward(rows)

    longest = (torch.full((1, 16), 1000.0), torch.zeros(1, dtype=torch.long))
    assert check(Long(16, 16), rows(), 8, **how).fits
    worst = check(Long(16, 16), rows(), 8, search=SearchOptions(worst_case=longest), **how)
    assert worst.failure is Verdict.OUT_OF_MEMORY


@pytest.mark.usefixtures("_clock")
@pytest.mark.parametrize(
    "search", [SearchOptions(budget_seconds=3), SearchOptions(timeout_seconds=0.5)]
)
def test_a_search_that_is_cut_short_leaves_everything_as_it_was(search: SearchOptions) -> None:
    """USERS 1.3.11, 1.4.1 and 7.4."""
    model = Clock()
    optimizer = torch.optim.Adam(model.parameters())
    before = fingerprint(model, optimizer)
    with pytest.raises((SearchTimeoutError, DoesNotFitError)):
        find_batch_size(model, rows(), optimizer=optimizer, device="cpu", search=search)
    assert fingerprint(model, optimizer) == before


# The page that answers every line.

PAGE = (PACKAGE.parent / "docs" / "users.md").read_text()
ROW = re.compile(r"^\| ([\d.]+) \| [^|]+ \| [^|]+ \| ([^|]+) \|$", re.MULTILINE)
SECTIONS = {"1.1": 13, "1.2": 13, "1.3": 14, "1.4": 8, "1.5": 6, "1.6": 7, "1.7": 6, "1.8": 7}
SECTIONS |= {"1.9": 3, "3": 9, "4": 7}


def named_tests(cell: str) -> list[tuple[str, str]]:
    return re.findall(r"`([\w/]+): (\w+)`", cell)


def functions_of(file: str) -> set[str]:
    (path,) = Path(__file__).parent.rglob(f"test_{file}.py")
    nodes = ast.parse(path.read_text()).body
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


def test_every_line_has_its_answer_and_the_page_no_other() -> None:
    lines = [f"{section}.{n + 1}" for section, many in SECTIONS.items() for n in range(many)]
    assert [line for line, _ in ROW.findall(PAGE)] == sorted(
        ["1.2", *lines], key=lambda line: [int(part) for part in line.split(".")]
    )


@pytest.mark.parametrize(("line", "cell"), ROW.findall(PAGE), ids=lambda value: value[:6])
def test_the_tests_that_a_line_names_are_there(line: str, cell: str) -> None:
    named = named_tests(cell)
    assert named, f"{line} is shown by nothing"
    assert cell == ", ".join(f"`{file}: {name}`" for file, name in named)
    missing = [(file, name) for file, name in named if f"test_{name}" not in functions_of(file)]
    assert missing == []
