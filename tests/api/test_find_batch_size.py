"""Every size it returns really ran, and nothing of the user's is changed."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from black_box import RAN, BlackBox, Where
from hypothesis import given, settings
from hypothesis import strategies as st
from states import fingerprint, identities
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from autobatch import (
    DeviceLostError,
    DoesNotFitError,
    SearchOptions,
    SearchResult,
    Verdict,
    check,
    find_and_train,
    find_batch_size,
)
from autobatch.compat.torchvision import import_torchvision
from autobatch.devices.cpu import CpuDevice
from autobatch.state import snapshot as state
from autobatch.training.engine.lr_schedule import Schedule
from autobatch.training.options import StepOptions
from autobatch.training.workload import Workload


def images(examples: int, pixels: int = 5, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(examples, 1, pixels, pixels, generator=generator)
    return x, torch.randint(0, classes, (examples,), generator=generator)


@pytest.fixture(autouse=True)
def _forget_what_ran() -> None:
    RAN.clear()


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("ceiling", [256, 4096])
@pytest.mark.parametrize("limit", [1, 3, 7, 37, 100, 129, 1000])
def test_a_black_box_gives_the_exact_answer_and_stays_as_it_was(
    limit: int, ceiling: int, where: Where
) -> None:
    model = BlackBox(limit, where)
    optimizer = torch.optim.Adam(model.parameters())
    model(images(1)[0]).sum().backward()  # A gradient that is to be found again.
    data = images(ceiling)
    before, objects = fingerprint(model, optimizer), identities(model, optimizer)
    RAN.clear()

    found = find_batch_size(model, data, ceiling=ceiling, optimizer=optimizer)

    assert found.size == min(limit, ceiling)
    assert RAN.count(found.size) >= 2, "the size that was returned ran two micro-batches"
    assert found.upper.size == (limit + 1 if limit < ceiling else None)
    assert found.limited_by == ("memory" if limit < ceiling else "ceiling")
    assert fingerprint(model, optimizer) == before
    assert identities(model, optimizer) == objects


def test_the_fingerprint_sees_a_search_that_restores_nothing() -> None:
    model = BlackBox(10)
    before = fingerprint(model)
    model(images(4)[0])
    assert fingerprint(model) != before


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_not_even_one_example_is_an_error_that_says_so(where: Where) -> None:
    model = BlackBox(0, where)
    before = fingerprint(model)
    with pytest.raises(DoesNotFitError, match="a batch of 1 does not fit") as caught:
        find_batch_size(model, images(64))
    assert caught.value.breakdown_bytes["parameters"] > 0
    assert fingerprint(model) == before


def test_77_rows_are_a_ceiling_of_77() -> None:
    found = find_batch_size(BlackBox(1000), images(77))
    assert (found.size, found.ceiling, found.limited_by) == (77, 77, "data")
    assert RAN.count(77) == 2
    assert find_batch_size(BlackBox(1000), images(77), ceiling=500).size == 77
    found = find_batch_size(BlackBox(1000), images(77), ceiling=50)
    assert (found.size, found.limited_by) == (50, "ceiling")


def test_below_the_floor_nothing_is_tried_and_it_is_the_smallest_that_must_fit() -> None:
    """USERS 1.3.5: a batch of 1 may run and still be worth nothing."""
    found = find_batch_size(BlackBox(40), images(77), search=SearchOptions(floor=32))
    assert found.size == 40
    assert min(trial.size for trial in found.trials) >= 32
    with pytest.raises(DoesNotFitError, match="a batch of 48 does not fit") as caught:
        find_batch_size(BlackBox(40), images(77), search=SearchOptions(floor=45, multiple_of=8))
    assert caught.value.size == 48


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"floor": 0}, "floor must be at least 1, got 0"),
        ({"floor": 78}, "no multiple of 1 lies between 78 and 77: lower floor"),
        ({"floor": 73, "multiple_of": 8}, "no multiple of 8 lies between 73 and 77: lower floor"),
    ],
)
def test_a_floor_that_leaves_nothing_is_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        find_batch_size(BlackBox(40), images(77), search=SearchOptions(**options))
    with pytest.raises(TypeError, match="forget_errors must be True or False, got 1"):
        SearchOptions(forget_errors=1)  # type: ignore[arg-type]


def test_training_does_not_search_below_the_floor_but_takes_a_short_batch_whole() -> None:
    """USERS 1.3.5."""
    model = BlackBox(40)
    floor = SearchOptions(floor=32)
    result = find_and_train(model, images(128), 128, search=floor, device="cpu", progress=False)
    assert result.plan.micro_batch_sizes == (32,) * 4
    assert min(trial.size for trial in result.search.trials) >= 32
    with pytest.raises(DoesNotFitError, match="a batch of 64 does not fit"):
        find_and_train(
            model, images(128), 128, search=SearchOptions(floor=60), device="cpu", progress=False
        )
    whole = find_and_train(model, images(20), 128, search=floor, device="cpu", progress=False)
    assert whole.plan.micro_batch_sizes == (20,)


class Mlp(nn.Module):
    """Activations that outweigh the optimizer's step, so that every example counts."""

    def __init__(self, width: int = 64, fails: Callable[[int], object] = lambda _: None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(
            nn.Flatten(),
            nn.Linear(25, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(width, 3),
        )
        self.fails = fails

    def forward(self, images: Tensor) -> Tensor:
        self.fails(len(images))
        scores: Tensor = self.inner(images)
        return scores


def fails_above(limit: int, error: BaseException) -> Callable[[int], None]:
    """Raise ``error`` for every larger size."""

    def fail(size: int) -> None:
        if size > limit:
            raise error

    return fail


@settings(deadline=None, max_examples=10)
@given(limit_kib=st.integers(60, 400), adam=st.booleans())
def test_under_any_limit_the_next_larger_size_does_not_fit(limit_kib: int, adam: bool) -> None:
    model, data = Mlp(), images(300)
    optimizer = torch.optim.Adam if adam else functools.partial(torch.optim.SGD, lr=0.1)
    limit = limit_kib * 1024
    found = find_batch_size(model, data, optimizer=optimizer, memory_limit=limit)
    assert found.peak_bytes is not None
    assert found.peak_bytes <= limit
    here = check(model, data, found.size, optimizer=optimizer, memory_limit=limit)
    assert here.fits
    if found.size < found.ceiling:
        above = check(model, data, found.size + 1, optimizer=optimizer, memory_limit=limit)
        assert above.failure is Verdict.OUT_OF_MEMORY
        assert above.peak_bytes is None


@pytest.mark.parametrize("error", [0.0, 0.01, 0.1, 0.5, 0.9, 1.0, 1.1, 2.0, 10.0, 1000.0])
def test_a_first_guess_changes_no_answer_and_costs_at_most_a_trial(error: float) -> None:
    def find(prior: int | None) -> SearchResult:
        return find_batch_size(
            Mlp(), images(300), memory_limit="200KiB", search=SearchOptions(prior=prior)
        )

    plain = find(None)
    guided = find(int(error * plain.size))
    assert (guided.size, guided.ceiling) == (plain.size, 300)
    assert 4 < guided.size < 300
    assert len(guided.trials) <= len(plain.trials) + 1
    if error == 1:
        assert [trial.size for trial in guided.trials] == [4, plain.size]


def test_a_reported_peak_is_the_largest_of_the_first_five_training_steps() -> None:
    models = import_torchvision().models
    vit = models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=5, dropout=0.1)
    size = 6
    x, y = torch.randn(2 * size, 3, 32, 32), torch.randint(0, 5, (2 * size,))
    for model in (models.shufflenet_v2_x0_5(num_classes=5), vit):
        optimizer = torch.optim.Adam(model.parameters())
        trial = check(model, (x, y), size, optimizer=optimizer, memory_limit="2GiB")
        assert not optimizer.state, "the search's state is gone, so training begins anew"
        assert max(training_peaks(model, optimizer, (x, y), size)) == trial.peak_bytes


def test_a_peak_without_optimizer_state_would_be_too_low() -> None:
    model = Mlp(width=512)
    sgd = check(model, images(8), 8, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    adam = check(model, images(8), 8, optimizer=torch.optim.Adam)
    assert sgd.peak_bytes is not None
    assert adam.peak_bytes is not None
    state_bytes = 2 * sum(parameter.nbytes for parameter in model.parameters())
    assert adam.peak_bytes >= sgd.peak_bytes + state_bytes


def training_peaks(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor], size: int
) -> list[int]:
    """Five real windows on the metered device."""
    workload = Workload.resolve(
        model,
        batch,
        batch_size=size,
        options=StepOptions(),
        optimizer=optimizer,
        device="cpu",
        memory_limit="2GiB",
        headroom=None,
    )
    device = workload.device
    assert isinstance(device, CpuDevice)
    runner = workload.options.step_runner(
        workload.step,
        size,
        Schedule(),
        limited=functools.partial(device.limited_to, workload.limit_bytes()),
    )
    peaks = []
    for _ in range(5):
        device.reset_peak()
        runner.step(batch)
        peaks.append(device.read().peak_bytes)
    return peaks


def test_a_loader_with_its_own_generator_and_workers_goes_on_as_without_the_search() -> None:
    model = Mlp()
    epochs = []
    for searched in (False, True):
        generator = torch.Generator().manual_seed(3)
        loader = DataLoader(
            TensorDataset(*images(40)),
            batch_size=8,
            shuffle=True,
            generator=generator,
            num_workers=1,
            persistent_workers=True,
        )
        first = [x for x, _ in loader]
        before = fingerprint(generator)
        if searched:
            assert find_batch_size(model, loader, ceiling=16).size == 16
        assert fingerprint(generator) == before
        epochs.append((first, [x for x, _ in loader]))
    torch.testing.assert_close(epochs[0], epochs[1], rtol=0, atol=0)


def test_a_one_pass_iterable_is_refused_before_anything_is_read() -> None:
    batches = iter([images(4)])
    with pytest.raises(TypeError, match="one-pass"):
        find_batch_size(Mlp(), batches)
    assert next(batches)[0].shape[0] == 4


def test_a_model_in_evaluation_mode_is_rehearsed_in_training_mode() -> None:
    model = Mlp().eval()
    model.inner[4].train()
    modes: list[bool] = []
    model.inner[2].register_forward_pre_hook(lambda module, _: modes.append(module.training))
    find_batch_size(model, images(8))
    assert all(modes)
    assert modes
    assert [child.training for child in model.inner] == [False] * 4 + [True, False]


@pytest.mark.parametrize("error", [KeyError("no such size"), KeyboardInterrupt()])
def test_any_other_error_passes_through_and_everything_is_put_back(error: BaseException) -> None:
    model = Mlp(fails=fails_above(16, error))
    optimizer = torch.optim.Adam(model.parameters())
    before = fingerprint(model, optimizer)
    with pytest.raises(type(error)):
        find_batch_size(model, images(64), optimizer=optimizer)
    assert fingerprint(model, optimizer) == before


def test_an_error_that_may_be_memory_counts_only_after_a_smaller_size() -> None:
    error = RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate`")
    assert find_batch_size(Mlp(fails=fails_above(20, error)), images(64)).size == 20
    with pytest.raises(RuntimeError, match="NOT_INITIALIZED"):
        find_batch_size(Mlp(fails=fails_above(0, error)), images(64))


def test_an_error_that_may_be_memory_counts_only_if_it_is_repeated() -> None:
    once = iter([RuntimeError("CUDA driver error: device not ready")])

    def fail(size: int) -> None:
        if size > 20:
            for error in once:
                raise error

    assert find_batch_size(Mlp(fails=fail), images(64)).size == 64


def test_an_index_limit_is_distinguished_from_memory() -> None:
    error = RuntimeError("Expected canUse32BitIndexMath(input) to be true")
    found = find_batch_size(Mlp(fails=fails_above(30, error)), images(64))
    assert (found.size, found.limited_by) == (30, "kernel")


def test_a_lost_device_is_said_though_nothing_on_it_can_be_put_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """USERS 1.2.9: the last good size and a clear text, not the error of the restoring."""
    text = "CUDA error: an illegal memory access was encountered"
    model = Mlp()

    def refuse(*_: object) -> None:
        raise RuntimeError(text)

    def dies(size: int) -> None:
        if size > 20:
            monkeypatch.setattr(state, "_fill", refuse)
            raise RuntimeError(text)

    model.fails = dies
    with pytest.raises(DeviceLostError, match="Before, the largest size that ran is 4") as caught:
        find_batch_size(model, images(64))
    assert (caught.value.size, caught.value.tried) == (4, 64)
    assert caught.value.__notes__ == [f"not everything could be put back: {text}"]


def constant(outputs: Tensor, targets: Tensor) -> Tensor:  # noqa: ARG001  # That is its fault.
    return torch.ones((), requires_grad=True)


def test_a_loss_that_does_not_depend_on_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match="no parameter received a gradient"):
        find_batch_size(Mlp(), images(8), loss=constant)


def scores_only(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return model(batch[0]), batch[1]


def sum_and_terms(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="sum"), len(batch[1])


@pytest.mark.parametrize(
    ("data", "how"),
    [
        (images(300), {}),
        (TensorDataset(images(300)[0]), {}),
        ([images(300)[0]], {}),
        ({"images": images(300)[0]}, {}),
        ({"images": images(300)[0], "labels": images(300)[1]}, {}),
        (images(300), {"forward": scores_only}),
        (images(300), {"batch_loss": sum_and_terms}),
    ],
    ids=["pairs", "no targets", "bare tensor", "mapping", "labels", "forward", "batch_loss"],
)
def test_inference_holds_more_and_needs_no_targets(data: Any, how: dict[str, Any]) -> None:
    model = Mlp()
    before = fingerprint(model)
    limit = 120 * 1024
    found = find_batch_size(model, data, mode="inference", memory_limit=limit, ceiling=300, **how)
    assert fingerprint(model) == before
    assert model.training
    trained = find_batch_size(model, images(300), memory_limit=limit)
    assert trained.size < found.size < 300
    assert check(model, data, found.size, mode="inference", memory_limit=limit, **how).fits
    above = check(model, data, found.size + 1, mode="inference", memory_limit=limit, **how)
    assert above.failure is Verdict.OUT_OF_MEMORY


def test_inference_runs_forward_in_evaluation_mode_without_a_graph() -> None:
    seen: set[tuple[bool, bool]] = set()
    model = Mlp(fails=lambda _: seen.add((model.inner[2].training, torch.is_grad_enabled())))
    found = find_batch_size(model, images(9), mode="inference")
    assert seen == {(False, False)}
    assert found.size == 9
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mode must be one of \('train', 'inference'\), got 'x'"):
        find_batch_size(Mlp(), images(9), mode="x")  # type: ignore[arg-type]  # That is the test.
