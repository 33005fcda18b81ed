import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from states import fingerprint
from torch import nn
from torch.optim import LBFGS, SGD, Adam

from autobatch.validation import check_model, check_one_process, check_optimizer


def as_wrapped_by(name: str) -> type[nn.Module]:
    """A class of that name, as torch's wrappers are told by."""
    return type(name, (nn.Sequential,), {})


def lazy(kind: Callable[[], nn.Module]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Lazy modules say that they are new.
        return kind()


def on_two_devices() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))


def with_a_buffer_elsewhere() -> nn.Module:
    model = nn.Linear(2, 2)
    model.register_buffer("table", torch.ones(2, device="meta"))
    return model


def frozen() -> nn.Module:
    return nn.Linear(2, 2).requires_grad_(requires_grad=False)


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    list(model.parameters())[2].register_post_accumulate_grad_hook(lambda _: None)
    return model


SPLITS = "DataParallel is not supported yet: it splits batches by itself; pass the module inside it"
RANKS = (
    "DistributedDataParallel is not supported yet: its ranks would have to agree on every size; "
    "pass the module inside it"
)
SHARDS = (
    "{} is not supported yet: an out-of-memory error leaves its parameters unsharded; pass the "
    "module inside it"
)
LAZY = "the model has lazy parameters without shapes; run one forward first"

BAD_MODELS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "a function": (lambda: len, TypeError, "got builtin_function_or_method"),
    "a class": (lambda: nn.Linear, TypeError, "model must be a torch.nn.Module, got type"),
    "none": (lambda: None, TypeError, "model must be a torch.nn.Module, got NoneType"),
    "data parallel": (lambda: nn.DataParallel(nn.Linear(2, 2)), TypeError, SPLITS),
    "distributed": (lambda: as_wrapped_by("DistributedDataParallel")(), TypeError, RANKS),
    "sharded": (
        lambda: as_wrapped_by("FullyShardedDataParallel")(),
        TypeError,
        SHARDS.format("FullyShardedDataParallel"),
    ),
    "fully sharded": (
        lambda: as_wrapped_by("FSDPModule")(),
        TypeError,
        SHARDS.format("FSDPModule"),
    ),
    "distributed inside": (
        lambda: nn.Sequential(as_wrapped_by("DistributedDataParallel")()),
        TypeError,
        RANKS,
    ),
    "a subclass of it": (
        lambda: type("Own", (as_wrapped_by("DistributedDataParallel"),), {})(),
        TypeError,
        RANKS,
    ),
    "lazy": (lambda: lazy(lambda: nn.LazyLinear(2)), ValueError, LAZY),
    "lazy inside": (
        lambda: nn.Sequential(nn.Linear(2, 2), lazy(lambda: nn.LazyConv2d(2, 1))),
        ValueError,
        LAZY,
    ),
    "lazy buffers": (
        lambda: nn.Sequential(nn.Linear(2, 2), lazy(lambda: nn.LazyBatchNorm1d(affine=False))),
        ValueError,
        LAZY,
    ),
    "no parameters": (nn.ReLU, ValueError, "ReLU has no parameters: there is nothing to train"),
    "frozen": (
        frozen,
        ValueError,
        "all 2 parameters of Linear are frozen (requires_grad=False): there is nothing to train",
    ),
    "two devices": (
        on_two_devices,
        ValueError,
        "the model must be on one device, got cpu, meta",
    ),
    "a buffer elsewhere": (
        with_a_buffer_elsewhere,
        ValueError,
        "the model must be on one device, got cpu, meta",
    ),
    "meta": (
        lambda: nn.Linear(2, 2, device="meta"),
        ValueError,
        "the model is on the meta device and has no values; initialise it first",
    ),
    "post-accumulate hooks": (
        hooked,
        ValueError,
        "the model has post-accumulate-gradient hooks, which would run once per micro-batch "
        "instead of once per step; remove them",
    ),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_what_cannot_be_trained_exactly_is_refused_with_the_reason(name: str) -> None:
    make, kind, text = BAD_MODELS[name]
    with pytest.raises(kind) as caught:
        check_model(make())
    assert type(caught.value) is kind
    assert str(caught.value).endswith(text)


def thawed_in_part() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(requires_grad=False)
    return model


def with_hooks_that_do_no_harm() -> nn.Module:
    model = nn.Linear(2, 2)
    model.register_forward_hook(lambda *_: None)
    model.register_full_backward_hook(lambda *_: None)
    model.weight.register_hook(lambda gradient: gradient)
    model.weight.register_post_accumulate_grad_hook(lambda _: None).remove()
    return model


def run_once() -> nn.Module:
    model = lazy(lambda: nn.LazyLinear(2))
    model(torch.ones(1, 3))
    return model


GOOD_MODELS: list[Callable[[], nn.Module]] = [
    lambda: nn.Linear(2, 2),
    thawed_in_part,
    with_hooks_that_do_no_harm,
    run_once,
    lambda: as_wrapped_by("Wrapper")(nn.Linear(2, 2)),
    lambda: nn.Linear(2, 2).half(),
]


@pytest.mark.parametrize("make", GOOD_MODELS)
def test_any_other_model_is_returned_untouched(make: Callable[[], nn.Module]) -> None:
    model = make()
    before = fingerprint(model)
    assert check_model(model) is model
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    ("optimizer", "kind"),
    [
        (None, "NoneType"),
        ("adam", "str"),
        (Adam, "type"),
        (nn.Linear(2, 2), "Linear"),
        (0.1, "float"),
    ],
)
def test_what_is_no_optimizer_is_a_bad_type(optimizer: Any, kind: str) -> None:
    with pytest.raises(TypeError) as caught:
        check_optimizer(optimizer, nn.Linear(2, 2))
    assert str(caught.value) == (
        "optimizer must be a torch.optim.Optimizer (find_and_train and find_batch_size take a "
        f"factory (params) -> Optimizer as well), got {kind}"
    )


def test_an_optimizer_that_evaluates_the_loss_by_itself_is_refused() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(TypeError) as caught:
        check_optimizer(LBFGS(model.parameters()), model)
    assert str(caught.value) == (
        "LBFGS is not supported: it evaluates the loss several times a step"
    )


def test_an_optimizer_of_another_model_is_refused_by_name() -> None:
    """Equal parameters are not enough: they must be the same."""
    model = nn.Linear(2, 2)
    optimizer = Adam([parameter.detach().clone() for parameter in model.parameters()])
    with pytest.raises(ValueError, match=r"^Adam holds none of the model's parameters; it"):
        check_optimizer(optimizer, model)


@pytest.mark.parametrize("parameters", [slice(0, 1), slice(None)])
def test_an_optimizer_of_some_or_all_parameters_is_returned(parameters: slice) -> None:
    model = nn.Linear(2, 2)
    optimizer = SGD(list(model.parameters())[parameters], 0.1)
    assert check_optimizer(optimizer, model) is optimizer
    joint = SGD([{"params": [nn.Parameter(torch.ones(1))]}, {"params": [model.bias]}], 0.1)
    assert check_optimizer(joint, model) is joint


@pytest.mark.parametrize("world", [2, 8])
def test_more_than_one_rank_is_refused(monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: world)
    with pytest.raises(ValueError, match=f"^a world of {world} ranks is not supported yet, only"):
        check_one_process()


def test_one_rank_passes_whether_or_not_it_was_initialised(monkeypatch: pytest.MonkeyPatch) -> None:
    check_one_process()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    check_one_process()
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    monkeypatch.delattr(torch.distributed, "is_initialized")  # Where torch was built without it.
    check_one_process()
