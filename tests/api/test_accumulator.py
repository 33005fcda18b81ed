"""The object for one's own loop: BatchNorm's modes, its state, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import assert_exact, assert_same_parameters, sgd, small_model, twin
from states import fingerprint
from torch import Tensor, nn

from autobatch import Accumulator, InexactStepError, find_and_train, find_batch_size
from autobatch.training.engine.micro_batch_size import PATIENCE

LOSS = nn.CrossEntropyLoss()


def rows(examples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (examples,), generator=generator)


def normalised(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


@settings(deadline=None, max_examples=20)
@given(examples=st.integers(2, 17), micro_batch=st.integers(1, 17))
def test_frozen_batch_norm_takes_the_undivided_step_for_any_split(
    examples: int, micro_batch: int
) -> None:
    ours = normalised()
    ours(rows(30, seed=5)[0])  # Its statistics are somewhere.
    whole = twin(ours)
    before = twin(ours)
    step = Accumulator(ours, sgd(ours), LOSS, micro_batch=micro_batch, batch_norm="frozen").step(
        rows(examples)
    )
    assert ours[0].training
    whole[0].eval()  # type: ignore[index]
    x, y = rows(examples)
    loss = LOSS(whole(x), y)
    loss.backward()
    sgd(whole).step()
    assert_exact(step.loss, loss.item())
    assert_same_parameters(ours, whole)
    assert_exact(ours[0].running_mean, before[0].running_mean)  # type: ignore[index]


def test_normalised_by_the_micro_batch_it_is_another_step() -> None:
    ours = normalised()
    whole = twin(ours)
    Accumulator(ours, sgd(ours), LOSS, micro_batch=3).step(rows(8))
    LOSS(whole(rows(8)[0]), rows(8)[1]).backward()
    sgd(whole).step()
    with pytest.raises(AssertionError, match="not close"):
        assert_same_parameters(ours, whole)


@pytest.mark.parametrize("loss", [LOSS, None], ids=["given", "inferred"])
@pytest.mark.parametrize(("examples", "sizes"), [(5, (2, 2, 1)), (3, (2, 1)), (9, (2,) * 4 + (1,))])
def test_a_last_example_borrows_from_its_neighbour(
    examples: int, sizes: tuple[int, ...], loss: nn.Module | None
) -> None:
    ours = normalised()
    whole = twin(ours)
    x, y = rows(examples)
    step = Accumulator(ours, sgd(ours), loss, micro_batch=2).step((x, y))
    assert step.micro_batch_sizes == sizes
    assert step.replays == 0
    # By hand: the last example is normalised together with the one before it.
    parts = [(a, b, 0) for a, b in zip(x.split(list(sizes)), y.split(list(sizes)), strict=True)]
    parts[-1] = (x[-2:], y[-1:], 1)
    total = sum(F.cross_entropy(whole(a)[skip:], b, reduction="sum") for a, b, skip in parts)
    (total / examples).backward()  # type: ignore[union-attr]
    sgd(whole).step()
    for name, parameter in whole.named_parameters():
        assert_exact(ours.get_parameter(name), parameter)
    undivided = normalised()
    undivided(x)
    assert_exact(ours[0].running_mean, undivided[0].running_mean)
    assert_exact(ours[0].running_var, undivided[0].running_var)
    assert int(ours[0].num_batches_tracked) == 1  # type: ignore[arg-type]


def test_refuse_cuts_nothing_and_changes_nothing() -> None:
    model = normalised()
    accumulator = Accumulator(model, sgd(model), LOSS, micro_batch=4, batch_norm="refuse")
    before = fingerprint(model)
    with pytest.raises(InexactStepError, match="the model has BatchNorm"):
        accumulator.step(rows(8))
    assert fingerprint(model) == before
    assert accumulator.step(rows(4)).micro_batch_sizes == (4,)
    plain = small_model()
    Accumulator(plain, sgd(plain), LOSS, micro_batch=4, batch_norm="refuse").step(rows(8))


def test_refuse_is_said_before_anything_is_trained() -> None:
    model = normalised()
    before = fingerprint(model)
    with pytest.raises(InexactStepError, match="the model has BatchNorm"):
        find_and_train(
            model, [rows(64)], 64, batch_norm="refuse", memory_limit="12KiB", progress=False
        )
    assert fingerprint(model) == before


@pytest.mark.parametrize("mode", ["frozen", "micro"])
def test_the_notes_say_what_batch_norm_did(mode: str) -> None:
    result = find_and_train(
        normalised(),
        [rows(64)],
        64,
        batch_norm=mode,  # type: ignore[arg-type]
        memory_limit="14KiB",
        progress=False,
    )
    assert result.plan.accumulation_steps > 1
    said = {"frozen": "BatchNorm was frozen", "micro": "BatchNorm normalizes each micro-batch"}
    assert any(said[mode] in note for note in result.notes)


def trained(accumulator: Accumulator, windows: range) -> list[tuple[float, tuple[int, ...]]]:
    steps = []
    for seed in windows:
        step = accumulator.step(rows(12, seed))
        steps.append((step.loss, step.micro_batch_sizes))
    return steps


class Limited(nn.Module):
    """Holds so many examples, while memory is short."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small_model()
        self.holds = 12

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.holds:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self.inner(x)  # type: ignore[no-any-return]


def made(**options: object) -> tuple[Limited, Accumulator]:
    model = Limited()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, Accumulator(
        model,
        optimizer,
        LOSS,
        scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 3, 0.5),
        **options,  # type: ignore[arg-type]
    )


def test_its_state_goes_on_where_it_was_in_size_scale_and_rate() -> None:
    model, accumulator = made(scaler=torch.amp.GradScaler("cpu", growth_interval=2))
    trained(accumulator, range(2))
    model.holds = 5
    trained(accumulator, range(2, 4))
    model.holds = 12
    assert accumulator.micro_batch == 3
    state, weights = accumulator.state_dict(), twin(model).state_dict()
    expected = trained(accumulator, range(4, 10 + PATIENCE))

    again, other = made(scaler=torch.amp.GradScaler("cpu", growth_interval=2))
    again.load_state_dict(weights)
    other.load_state_dict(state)
    assert other.steps == 4
    optimizer = other._runner.optimizer_step.optimizer
    optimizer.param_groups[0]["lr"] = 0.1 * 0.5  # The optimizer's own state is its own.
    assert trained(other, range(4, 10 + PATIENCE)) == expected
    assert other.micro_batch == accumulator.micro_batch > 3, "it has grown back"


def test_a_state_of_other_parts_is_refused_and_nothing_has_changed() -> None:
    _, accumulator = made()
    plain = small_model()
    other = Accumulator(plain, sgd(plain), LOSS, micro_batch=3)
    with pytest.raises(ValueError, match="the state has a scheduler, and this Accumulator has non"):
        other.load_state_dict(accumulator.state_dict())
    assert other.micro_batch == 3
    with pytest.raises(ValueError, match="this is no state of an Accumulator"):
        other.load_state_dict({"steps": 3})
    with pytest.raises(ValueError, match="the state has no scheduler, and this Accumulator has on"):
        accumulator.load_state_dict(other.state_dict())
    assert accumulator.steps == 0


def test_a_size_that_is_found_again_is_taken_over_between_steps() -> None:
    """USERS 1.8.7: layers that are unfrozen take gradients and optimizer state."""
    torch.manual_seed(0)
    layers = [nn.Linear(256, 256), nn.Linear(256, 256), nn.Linear(256, 256), nn.Linear(256, 3)]
    model = nn.Sequential(*layers)
    for layer in layers[:3]:
        layer.requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters())
    data = torch.randn(512, 256), torch.randint(0, 3, (512,))

    def found() -> int:
        return find_batch_size(
            model, data, loss=LOSS, optimizer=optimizer, memory_limit="4.5MiB", device="cpu"
        ).size

    accumulator = Accumulator(model, optimizer, LOSS, micro_batch=found())
    frozen = accumulator.step(data)
    for layer in layers:
        layer.requires_grad_(True)
    accumulator.micro_batch = smaller = found()
    thawed = accumulator.step(data)
    assert max(thawed.micro_batch_sizes) <= smaller < max(frozen.micro_batch_sizes)
    assert accumulator.micro_batch == smaller
    with pytest.raises(ValueError, match="micro_batch must be at least 1, got 0"):
        accumulator.micro_batch = 0


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"precision": "fp64"}, 'precision must be "fp32", "bf16" or "fp16", got \'fp64\''),
        ({"nonfinite": "drop"}, "nonfinite must be one of"),
        ({"batch_norm": "sync"}, "batch_norm must be one of"),
        ({"gradient_dtype": torch.int8}, "gradient_dtype must be torch.float32 or None"),
        ({"clip_grad_norm": 0}, "clip_grad_norm must be above 0, got 0"),
        ({"clip_grad_norm": 1.0, "clip_grad_value": 1.0}, "pass one of the two"),
        ({"micro_batch": 0}, "micro_batch must be at least 1, got 0"),
    ],
)
def test_a_bad_option_is_refused_with_what_came(options: dict[str, object], match: str) -> None:
    model = small_model()
    before = fingerprint(model)
    with pytest.raises(ValueError, match=match):
        Accumulator(model, sgd(model), LOSS, **options)  # type: ignore[arg-type]
    assert fingerprint(model) == before
