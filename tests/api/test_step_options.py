"""The step's options: defined once, taken by every entry point in the same way."""

import inspect
import pickle
from collections.abc import Callable, Sequence
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any, get_type_hints

import pytest
import torch
from reference import assert_same_parameters, sgd, small_model
from states import fingerprint
from torch import Tensor, nn
from torch.amp import GradScaler

from autobatch import (
    Accumulator,
    BatchLoss,
    SearchOptions,
    StepOptions,
    WholeBatch,
    check,
    find_and_train,
    find_batch_size,
    predict,
)
from autobatch.training.step_arguments import StepArguments

ENTRIES: list[Callable[..., object]] = [
    find_and_train,
    find_batch_size,
    check,
    Accumulator,
    predict,
]
Pair = tuple[Tensor, Tensor]


def rows(examples: int = 32, dtype: torch.dtype = torch.float64) -> Pair:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(examples, 5, generator=generator, dtype=dtype)
    return x, torch.randint(0, 3, (examples,), generator=generator)


def test_the_keywords_are_the_fields_with_the_same_types_and_the_loss_is_an_argument() -> None:
    hints = get_type_hints(StepOptions)
    assert list(hints) == [field.name for field in fields(StepOptions)]
    loss = hints.pop("loss")
    assert get_type_hints(StepArguments) == hints
    assert list(StepArguments.__annotations__) == list(hints)
    assert not StepArguments.__required_keys__
    for entry in ENTRIES:
        assert inspect.signature(entry).parameters["loss"].annotation == loss


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_signature_shows_every_option_with_its_default(entry: Callable[..., object]) -> None:
    """IPython and Jupyter complete what ``inspect.signature`` shows."""
    shown = inspect.signature(entry).parameters
    for field in fields(StepOptions):
        assert shown[field.name].default == field.default
        assert shown[field.name].annotation == field.type
    assert shown["options"].default is None
    assert not any(p.kind is p.VAR_KEYWORD for p in shown.values())


@pytest.mark.parametrize("field", [field.name for field in fields(StepOptions)])
def test_every_option_is_described(field: str) -> None:
    assert f"\n    {field}: " in (inspect.getdoc(StepOptions) or "")


def test_options_are_frozen_and_checked_when_they_are_made() -> None:
    options = StepOptions(precision="bf16")
    with pytest.raises(FrozenInstanceError):
        options.precision = "fp32"  # type: ignore[misc]  # That is the test.
    assert replace(options, clip_grad_norm=2).precision == "bf16"
    for wrong in (
        {"loss": 5},
        {"forward": 5},
        {"batch_loss": 5},
        {"scaler": 5},
        {"clip_grad_norm": "a lot"},
        {"loss": BatchLoss(print), "forward": print},
        {"loss": BatchLoss(print), "batch_loss": print},
    ):
        with pytest.raises(TypeError):
            StepOptions(**wrong)


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_unknown_argument_is_refused_with_the_nearest_that_there_is(
    entry: Callable[..., object],
) -> None:
    model = small_model()
    second = sgd(model) if entry is Accumulator else rows()
    given: dict[str, Any] = {"gpu": "T4"} if entry is predict else {}
    more = (4,) if entry is check else ()
    for wrong, nearest in (("clip_norm", "clip_grad_norm"), ("optoins", "options")):
        expected = rf"{entry.__name__}\(\) takes no argument '{wrong}'; did you mean {nearest}\?"
        with pytest.raises(TypeError, match=expected):
            entry(model, second, *more, **given, **{wrong: 1.0})
    with pytest.raises(TypeError, match=r"takes no argument 'zzzz'$"):
        entry(model, second, *more, **given, zzzz=1.0)
    with pytest.raises(TypeError, match=r"precision and options= were both.*replace\(options, pre"):
        entry(model, second, *more, **given, precision="bf16", options=StepOptions())
    with pytest.raises(TypeError, match=r"loss and options= were both passed"):
        entry(model, second, *more, **given, loss=nn.CrossEntropyLoss(), options=StepOptions())
    with pytest.raises(TypeError, match=r"options must be a StepOptions or None, got \{\}"):
        entry(model, second, *more, **given, options={})


def test_a_misspelt_argument_of_the_function_itself_is_recognised() -> None:
    with pytest.raises(TypeError, match=r"did you mean memory_limit\?"):
        find_batch_size(small_model(), rows(), memory_limt=3)  # type: ignore[call-arg]  # The test.


def test_options_together_and_one_by_one_train_the_same_model() -> None:
    models = [small_model() for _ in range(3)]
    step: dict[str, Any] = {
        "clip_grad_norm": 0.01,
        "loss": nn.CrossEntropyLoss(label_smoothing=0.1),
    }
    for model, given in zip(models, (step, {"options": StepOptions(**step)}, {}), strict=True):
        find_and_train(
            model, [rows()], 16, optimizer=lambda p: torch.optim.SGD(p, lr=1.0), progress=False,
            **given,
        )  # fmt: skip
    assert fingerprint(models[0]) == fingerprint(models[1]) != fingerprint(models[2])


def trial(model: nn.Module, data: Pair, **step: Any) -> int:
    """The peak of one size, which both kinds of search agree on."""
    before = fingerprint(model)
    tried = check(model, data, 8, **step)
    found = find_batch_size(model, data, ceiling=8, **step)
    assert tried.fits
    assert found.size == 8
    assert fingerprint(model) == before
    assert found.peak_bytes == tried.peak_bytes
    return tried.peak_bytes or 0


def test_a_trial_clips_the_norm_as_training_does(monkeypatch: pytest.MonkeyPatch) -> None:
    bounds: list[float] = []
    clip = nn.utils.clip_grads_with_norm_

    def spy(parameters: Sequence[Tensor], max_norm: float, norm: Tensor) -> None:
        bounds.append(max_norm)
        clip(parameters, max_norm, norm)

    monkeypatch.setattr(nn.utils, "clip_grads_with_norm_", spy)
    trial(small_model(), rows())
    assert not bounds
    trial(small_model(), rows(), clip_grad_norm=0.5)
    assert len(bounds) >= 2
    assert set(bounds) == {0.5}


def test_a_trial_clips_values_as_training_does(monkeypatch: pytest.MonkeyPatch) -> None:
    bounds: list[float] = []
    monkeypatch.setattr(nn.utils, "clip_grad_value_", lambda _, bound: bounds.append(bound))
    trial(small_model(), rows(), clip_grad_value=0.25)
    assert set(bounds) == {0.25}


def test_a_trial_scales_and_unscales_with_the_scaler_of_training_and_restores_it() -> None:
    calls: list[str] = []

    class Noted(GradScaler):
        def scale(self, outputs: Any) -> Any:
            calls.append("scale")
            return super().scale(outputs)

        def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
            calls.append("unscale")
            super().unscale_(optimizer)

    scaler = Noted("cpu", init_scale=1024.0)
    before = scaler.state_dict()
    trial(small_model().float(), rows(dtype=torch.float32), precision="fp16", scaler=scaler)
    assert set(calls) == {"scale", "unscale"}
    assert scaler.state_dict() == before


def test_a_trial_sums_gradients_in_the_type_that_training_sums_them_in() -> None:
    model = nn.Sequential(nn.Linear(5, 500), nn.Linear(500, 3)).to(torch.bfloat16)
    data = rows(dtype=torch.bfloat16)
    narrow, wide = trial(model, data), trial(model, data, gradient_dtype=torch.float32)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert wide - narrow >= 4 * parameters // 2, "float32 sums lie beside 16-bit gradients"


def test_a_trial_computes_the_norm_that_skipping_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []
    measure = nn.utils.get_total_norm

    def spy(gradients: Sequence[Tensor]) -> Tensor:
        norm = measure(gradients)
        norms.append(norm.item())
        return norm

    monkeypatch.setattr(nn.utils, "get_total_norm", spy)
    trial(small_model(), rows())
    assert not norms
    trial(small_model(), rows(), nonfinite="skip")
    assert norms


def test_a_trial_freezes_batch_norm_as_training_does() -> None:
    seen: set[bool] = set()
    model = nn.Sequential(nn.BatchNorm1d(5).double(), small_model())
    model[0].register_forward_pre_hook(lambda layer, _: seen.add(layer.training))
    trial(model, rows(), batch_norm="frozen")
    assert seen == {False}


def test_an_isolated_trial_takes_the_same_options() -> None:
    model = nn.Linear(200, 200).to(torch.bfloat16)
    data = (torch.randn(8, 200).bfloat16(), torch.randn(8, 200).bfloat16())
    step: dict[str, Any] = {"precision": "fp16", "scaler": GradScaler("cpu"), "clip_grad_norm": 1.0}
    here = check(model, data, 4, **step)
    alone = SearchOptions(isolate=True)
    wide = check(model, data, 4, search=alone, gradient_dtype=torch.float32, **step)
    assert wide.fits, wide.message
    assert (wide.peak_bytes or 0) - (here.peak_bytes or 0) >= 4 * 200 * 200 // 2


def test_a_prediction_takes_the_same_options() -> None:
    model = nn.Linear(500, 500).to(torch.bfloat16)
    data = (torch.randn(8, 500).bfloat16(), torch.randn(8, 500).bfloat16())
    narrow = predict(model, data, gpu="T4").peak_bytes(8)
    wide = StepOptions(gradient_dtype=torch.float32, clip_grad_norm=1.0)
    assert predict(model, data, gpu="T4", options=wide).peak_bytes(8) > narrow


def test_options_survive_pickling() -> None:
    options = StepOptions(
        loss=WholeBatch(nn.CrossEntropyLoss()), precision="fp16", gradient_dtype=torch.float32
    )
    sent = pickle.loads(pickle.dumps(options))
    assert isinstance(sent.loss, WholeBatch)
    assert replace(sent, loss=None) == replace(options, loss=None)


def test_the_same_options_serve_an_accumulator() -> None:
    ours, other = small_model(), small_model()
    step: dict[str, Any] = {"loss": nn.CrossEntropyLoss(), "clip_grad_norm": 0.01}
    Accumulator(ours, sgd(ours), options=StepOptions(**step), micro_batch=4).step(rows())
    Accumulator(other, sgd(other), **step, micro_batch=4).step(rows())
    assert_same_parameters(ours, other)
