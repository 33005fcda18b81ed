"""Wrong rows of a kernel that raises nothing are found, and right rows are not refused."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from states import fingerprint
from torch import Tensor, nn

from autobatch import SearchResult, Verdict, WholeBatch, check, find_batch_size
from autobatch.data.tree import BatchTree
from autobatch.devices.cpu import CpuDevice
from autobatch.errors import DeviceLostError
from autobatch.training import kernel_check, trial_step
from autobatch.training.engine.gradient_pass import GradientPass
from autobatch.training.engine.train_step import TrainStep
from autobatch.training.evaluation.inference import Inference
from autobatch.training.kernel_check import KernelIndexCheck, elements_at
from autobatch.training.options import StepOptions
from autobatch.training.trial_step import TrialStep

LIMIT = 4096  # Elements; it stands for 2^31.
WIDTH = 64
TRAINED: list[int] = []  # Sizes, in order. The check would restore an attribute of the model.
EVALUATED: list[int] = []
RIGHT = LIMIT // WIDTH  # The last size at which no tensor has more elements.


class Broken(nn.Module):
    """A linear layer whose kernel does not compute the elements that it cannot index."""

    def __init__(self, left: float = math.nan, wraps: bool = False, limit: int = LIMIT) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(8, WIDTH)
        self.left, self.wraps, self.limit = left, wraps, limit

    def forward(self, rows: Tensor) -> Tensor:
        (TRAINED if self.training else EVALUATED).append(len(rows))
        found: Tensor = self.layer(rows)
        flat = found.flatten()
        beyond = flat[self.limit :].detach()
        if self.wraps:
            left = flat[: len(beyond)].detach().clone()
        else:
            left = torch.full_like(beyond, self.left)
        wrong = torch.cat([flat[: self.limit], left])
        # The step itself would refuse a nan, so that training sees the right elements.
        return (flat if self.training else wrong).view_as(found)


def data(examples: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(examples, 8, generator=generator), torch.randint(
        0, WIDTH, (examples,), generator=generator
    )


@pytest.fixture(autouse=True)
def _forget_sizes() -> None:
    TRAINED.clear()
    EVALUATED.clear()


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let 4096 elements stand for 2^31."""

    def small(gradient: GradientPass, sample: BatchTree) -> KernelIndexCheck:
        return KernelIndexCheck(gradient, sample, LIMIT)

    monkeypatch.setattr(trial_step, "KernelIndexCheck", small)


def find(model: nn.Module, **options: object) -> SearchResult:
    return find_batch_size(model, data(500), **options)  # type: ignore[arg-type]


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("left", [math.nan, math.inf, 0.0, 1e6])
def test_the_largest_size_whose_rows_are_right_is_found(left: float) -> None:
    model = Broken(left)
    found = find(model)
    assert (found.size, found.limited_by) == (RIGHT, "kernel")
    assert found.upper.size == RIGHT + 1
    refused = [trial for trial in found.trials if not trial.fits]
    assert {trial.failure for trial in refused} == {Verdict.TOO_LARGE}
    assert "float32[65, 64]" in min(refused, key=lambda trial: trial.size).message
    assert all(trial.peak_bytes is None for trial in refused)
    assert model.training


@pytest.mark.usefixtures("_small")
def test_a_row_that_was_read_from_a_wrong_position_is_seen() -> None:
    assert find(Broken(wraps=True)).size == RIGHT


def test_without_the_check_a_wrong_size_is_returned() -> None:
    assert find(Broken()).size == 500


@pytest.mark.usefixtures("_small")
def test_only_sizes_that_pass_the_limit_run_again() -> None:
    find(Broken())
    tried = {size for size in TRAINED if size > RIGHT}
    assert EVALUATED[:2] == [2, 4], "operations are counted once"
    assert EVALUATED[2:] == [ran for size in EVALUATED[4::3] for ran in (2, 4, size)]
    assert set(EVALUATED[4::3]) == tried


def test_below_2_to_31_bytes_the_model_does_not_run_again() -> None:
    find(Broken())
    assert EVALUATED == []


class Ordinary(nn.Module):
    """Any layers between two linear ones, wide enough to pass the limit."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(8, WIDTH), *layers, nn.Linear(WIDTH, WIDTH))

    def forward(self, rows: Tensor) -> Tensor:
        found: Tensor = self.layers(rows)
        return found


class FunctionalDropout(nn.Module):
    def forward(self, rows: Tensor) -> Tensor:
        return F.dropout(rows, 0.5, training=True)


class Centred(nn.Module):
    def forward(self, rows: Tensor) -> Tensor:
        return rows - rows.mean(0)


class FailsInEvaluation(nn.Module):
    def forward(self, rows: Tensor) -> Tensor:
        if not self.training:
            raise KeyError("this model returns losses in training only")
        return rows


class FailsWhereLarge(nn.Module):
    def forward(self, rows: Tensor) -> Tensor:
        if not self.training and len(rows) > RIGHT:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return rows


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(WIDTH)),
        lambda: nn.BatchNorm1d(WIDTH, track_running_stats=False),
        FunctionalDropout,
        Centred,
        FailsInEvaluation,
        FailsWhereLarge,
    ],
    ids=["dropout", "batch statistics", "functional dropout", "centred", "fails", "no memory"],
)
def test_right_rows_are_not_refused(layer: Callable[[], nn.Module], precision: str) -> None:
    model = Ordinary(layer())
    before = fingerprint(model)
    found = find(model, precision=precision)
    assert (found.size, found.limited_by) == (500, "data")
    assert fingerprint(model) == before


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize(("precision", "seed"), [("fp32", 0), ("bf16", 0), ("bf16", 9)])
def test_attention_between_examples_is_not_refused(precision: str, seed: int) -> None:
    """A layer that gets two dimensions takes all examples for one sequence: it mixes them.

    In bf16, with seed 9, 4 examples differ by less than the tolerance from 2, and 8 by more.
    """
    torch.manual_seed(seed)
    model = Ordinary(nn.TransformerEncoderLayer(WIDTH, 4, batch_first=True))
    before = fingerprint(model)
    found = find(model, precision=precision)
    assert (found.size, found.limited_by) == (500, "data")
    assert fingerprint(model) == before


class Mixing(nn.Module):
    """Adds a fraction of the examples' mean to each of them."""

    def __init__(self, fraction: float) -> None:
        super().__init__()
        self.fraction = fraction

    def forward(self, rows: Tensor) -> Tensor:
        return rows + self.fraction * rows.mean(0)


@pytest.mark.parametrize("fraction", [1e-3, 1e-2, 2.5e-2, 1e-1, 1.0])
def test_no_degree_of_mixing_is_refused(fraction: float) -> None:
    """With a fortieth, 4 examples differ by less than the tolerance from 2, and 450 by more."""
    kernel_problem = KernelIndexCheck(
        step(Ordinary(Mixing(fraction))).gradient_pass, data(450), LIMIT
    )
    assert kernel_problem(450, 10 * LIMIT) == ""


@pytest.mark.usefixtures("_small")
def test_an_error_that_loses_the_context_is_not_hidden() -> None:
    class Lost(nn.Module):
        def forward(self, rows: Tensor) -> Tensor:
            if not self.training and len(rows) > RIGHT:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return rows

    with pytest.raises(DeviceLostError, match="illegal memory access"):
        find(Ordinary(Lost()))


class Returning(nn.Module):
    """A broken model that returns what a function makes of its scores and labels."""

    def __init__(self, returned: Callable[[Tensor, Tensor | None], object]) -> None:
        super().__init__()
        self.broken, self.returned = Broken(), returned

    def forward(self, rows: Tensor, labels: Tensor | None = None) -> object:
        return self.returned(self.broken(rows), labels)


def _with_loss(scores: Tensor, labels: Tensor | None) -> object:
    loss = None if labels is None else F.cross_entropy(scores, labels)
    return {"logits": scores} if loss is None else {"loss": loss, "logits": scores}


@pytest.mark.usefixtures("_small")
def test_outputs_are_compared_for_every_kind_of_loss() -> None:
    x, y = data(100)
    assert find(Broken(), forward=lambda model, batch: (model(batch[0]), batch[1])).size == RIGHT
    assert find(Broken(), loss=WholeBatch(F.cross_entropy)).size == RIGHT
    assert find(Broken(), loss=lambda outputs, target: F.cross_entropy(outputs, target)).size == (
        RIGHT
    )
    own = find_batch_size(Returning(_with_loss), {"rows": x, "labels": y})
    assert (own.size, own.limited_by) == (RIGHT, "kernel")
    several = find_batch_size(
        Returning(lambda scores, _: (torch.zeros(len(scores), 1), scores)),
        (x, y),
        loss=lambda outputs, target: F.cross_entropy(outputs[1], target),
    )
    assert "output 1" in next(trial for trial in several.trials if not trial.fits).message


@pytest.mark.usefixtures("_small")
def test_a_batch_loss_has_no_rows_and_is_not_checked() -> None:
    def batch_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="sum"), len(batch[1])

    assert find(Broken(), batch_loss=batch_loss).size == 500
    assert set(EVALUATED) == {2, 4}


@pytest.mark.usefixtures("_small")
def test_one_size_is_checked_as_a_search_does() -> None:
    trial = check(Broken(), [data()], RIGHT + 1)
    assert trial.failure is Verdict.TOO_LARGE
    assert "wrong rows at 65 examples" in trial.message
    assert check(Broken(), [data()], RIGHT).fits


def step(model: nn.Module) -> TrainStep:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return StepOptions().train_step(model, optimizer, CpuDevice())


@pytest.mark.parametrize("examples", [1, 2, 3, 7, 64])
def test_the_sample_may_be_of_any_length(examples: int) -> None:
    model = Broken(0.0)
    kernel_problem = KernelIndexCheck(step(model).gradient_pass, data(examples), LIMIT)
    assert kernel_problem(RIGHT, 10 * LIMIT) == ""
    assert "wrong rows" in kernel_problem(RIGHT + 1, 10 * LIMIT)
    assert "off by up to" in kernel_problem(RIGHT + 1, 10 * LIMIT)


def test_the_check_takes_the_kernels_of_training() -> None:
    seen: set[tuple[bool, bool]] = set()

    class Looking(Broken):
        def forward(self, rows: Tensor) -> Tensor:
            fast = torch.backends.mha.get_fastpath_enabled()
            seen.add((fast, torch.is_autocast_enabled("cpu")))
            return super().forward(rows)

    model = Looking()
    half = StepOptions(precision="bf16")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kernel_problem = KernelIndexCheck(
        half.train_step(model, optimizer, CpuDevice()).gradient_pass, data(), LIMIT
    )
    assert "wrong rows" in kernel_problem(500, 10 * LIMIT)
    assert seen == {(False, True)}


@pytest.mark.usefixtures("_small")
def test_the_check_respects_the_memory_limit() -> None:
    """A size stands if memory runs out in the check, which holds no graph: its trial held more."""

    class Greedy(Broken):
        def forward(self, rows: Tensor) -> Tensor:
            spent = [] if self.training or len(rows) <= RIGHT else [torch.zeros(2**24)]
            return super().forward(rows) + len(spent) * 0

    assert find(Greedy(), memory_limit=2**26 - 1).size == 500


def test_without_a_smaller_size_to_compare_with_nothing_runs() -> None:
    kernel_problem = KernelIndexCheck(step(Broken(0.0, limit=1)).gradient_pass, data(), 1)
    assert [kernel_problem(size, 10 * LIMIT) for size in (1, 2, 4)] == [""] * 3
    assert EVALUATED == []


def test_modes_buffers_gradients_and_random_numbers_are_restored() -> None:
    model = Ordinary(nn.BatchNorm1d(WIDTH), nn.Dropout(0.5))
    model.train()
    model.layers[1].eval()
    before, drawn = fingerprint(model), torch.get_rng_state()
    torch.backends.mha.set_fastpath_enabled(True)
    assert KernelIndexCheck(step(model).gradient_pass, data(), LIMIT)(500, 10 * LIMIT) == ""
    assert fingerprint(model) == before
    assert torch.equal(torch.get_rng_state(), drawn)
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_search_uses_the_limit_of_2_to_31() -> None:
    assert kernel_check.MAX_INDEXED_ELEMENTS == 2**31
    trial = TrialStep(step(Broken()), data())
    assert trial.verify(500, 2**31) == ""
    assert Inference(lambda _: None, data()).verify(500, 2**40) == ""


lines = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=5)


@given(lines=lines, size=st.integers(5, 10_000))
def test_elements_grow_along_lines(lines: list[tuple[int, int]], size: int) -> None:
    def at(n: int) -> list[int]:
        return [constant + slope * n for constant, slope in lines]

    assert elements_at(size, at(2), at(4)) == max(at(size))
    assert elements_at(size, [*at(2), 0], at(4)) >= max(slope for _, slope in lines) * size


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
