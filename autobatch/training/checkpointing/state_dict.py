"""The state of a training as values that a file can hold."""

import copy
import itertools
import random
import warnings
from collections.abc import Mapping, Sequence
from typing import Final, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from autobatch.devices.factory import BACKENDS
from autobatch.errors import CheckpointError
from autobatch.state.rng import generators_in

_SHOWN: Final = 5  # How many differences an error lists.

StateDict = dict[str, object]


class Stateful(Protocol):
    """A learning rate scheduler or a gradient scaler."""

    def state_dict(self) -> StateDict:
        """Return its state."""

    def load_state_dict(self, state_dict: StateDict, /) -> object:
        """Restore a state."""


def packed(
    model: nn.Module, optimizer: Optimizer, scheduler: Stateful | None, scaler: Stateful | None
) -> StateDict:
    """Return the state that a step depends on, in the objects' own memory: save it at once."""
    return {
        "model": model.state_dict(),
        "buffers": _other_buffers(model),
        "optimizer": optimizer.state_dict(),
        "scheduler": None if scheduler is None else scheduler.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
        "description": _description(model, optimizer, scheduler, scaler),
    }


def unpack(
    fields: Mapping[str, object],
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: Stateful | None,
    scaler: Stateful | None,
) -> None:
    """Restore what ``packed`` returned, bit for bit, into the same parameter and buffer objects.

    A buffer outside of the ``state_dict`` keeps its values if its shape has changed, with a
    warning.

    Args:
        fields: The loaded state. Do not use it again: the optimizer may keep its tensors.
        model: Built as the model that was saved.
        optimizer: Over the same parameters in the same order.
        scheduler: Of the same class as the one that was saved, or None.
        scaler: Of the same class as the one that was saved, or None.

    Raises:
        CheckpointError: An object differs from the one that was saved. Nothing was changed.
    """
    was = cast("dict[str, str]", _part(fields, "description"))
    _check_same(was, _description(model, optimizer, scheduler, scaler))
    buffers = _fillable(cast("dict[str, Tensor]", _part(fields, "buffers")), model)
    model.load_state_dict(_part(fields, "model"))
    with torch.no_grad():
        for buffer, values in buffers:
            buffer.copy_(values)
        _load_optimizer(optimizer, _part(fields, "optimizer"))
    for name, part in (("scheduler", scheduler), ("scaler", scaler)):
        if part is not None:  # A copy: some schedulers of torch remove what they read.
            part.load_state_dict(copy.deepcopy(_part(fields, name)))


def packed_random_state(sources: Sequence[object]) -> StateDict:
    """Return the state of all global generators, and of the sources' own generators in order."""
    own = [found for source in sources for found in generators_in(source)]
    return {
        "torch": torch.get_rng_state(),
        **{kind: backend.rng_states() for kind, backend in BACKENDS.items()},
        "numpy": _without_arrays(np.random.get_state(legacy=False)),
        "python": random.getstate(),
        "kinds": [_kind_of(generator) for generator in own],
        "states": [_state_of(generator) for generator in own],
    }


def restore_random_state(fields: Mapping[str, object], sources: Sequence[object]) -> None:
    """Restore what ``packed_random_state`` returned; a GPU that is not present is skipped.

    Raises:
        CheckpointError: The sources hold other generators now. Nothing was changed.
    """
    own = [found for source in sources for found in generators_in(source)]
    was, now = cast("list[str]", fields["kinds"]), [_kind_of(generator) for generator in own]
    if was != now:
        raise CheckpointError(
            "the random generators of the data and the model were "
            f"{', '.join(was) or 'none'} in the checkpoint, and are {', '.join(now) or 'none'} "
            "here; build data and model as they were, or choose another directory"
        )
    torch.set_rng_state(cast("Tensor", fields["torch"]))
    for kind, backend in BACKENDS.items():  # Older checkpoints hold only CUDA's.
        backend.set_rng_states(cast("list[Tensor]", fields.get(kind, [])))
    np.random.set_state(cast("dict[str, object]", fields["numpy"]))
    random.setstate(cast("tuple[object, ...]", fields["python"]))
    for generator, state in zip(own, cast("list[object]", fields["states"]), strict=True):
        _set_state(generator, state)


def _part(fields: Mapping[str, object], name: str) -> StateDict:
    part = fields.get(name)
    if not isinstance(part, dict):
        raise CheckpointError(
            f"the checkpoint holds no {name}, so it is no checkpoint of a training"
        )
    return part


def _description(
    model: nn.Module, optimizer: Optimizer, scheduler: Stateful | None, scaler: Stateful | None
) -> dict[str, str]:
    """Return the properties that must be equal before a state is restored, by name."""
    lines = {f"model: {name}": _look_of(name, value) for name, value in model.state_dict().items()}
    lines["optimizer"] = type(optimizer).__name__
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for index, group in enumerate(optimizer.param_groups):
        for number, parameter in enumerate(group["params"]):
            name = names.get(id(parameter), "not of the model")
            lines[f"optimizer: group {index}, {number}"] = f"{name} {_look_of(name, parameter)}"
    lines["scheduler"] = _kinds(scheduler)
    lines["scaler"] = _kinds(scaler)
    if scaler is not None and not scaler.state_dict():
        lines["scaler"] += ", disabled"
    return lines


def _look_of(name: str, value: object) -> str:
    if name.endswith("_extra_state"):  # The return value of get_extra_state, which may grow.
        return "extra state"
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"


def _kinds(part: object) -> str:
    """Return the class and the classes inside it, as in ``SequentialLR(LinearLR, StepLR)``."""
    if part is None:
        return "none"
    inside = ", ".join(map(_kinds, getattr(part, "_schedulers", ())))
    return f"{type(part).__name__}({inside})" if inside else type(part).__name__


def _check_same(was: dict[str, str], now: dict[str, str]) -> None:
    pairs = {name: (was.get(name, "missing"), now.get(name, "missing")) for name in was | now}
    differences = [
        f"{name} is {then} in the checkpoint and {here} here"
        for name, (then, here) in pairs.items()
        if then != here
    ]
    if not differences:
        return
    more = len(differences) - _SHOWN
    raise CheckpointError(
        "the checkpoint belongs to another training: "
        + "; ".join(differences[:_SHOWN])
        + (f"; and {more} more" if more > 0 else "")
        + "; build everything as it was, or choose another directory"
    )


def _other_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that are not in the ``state_dict``."""
    inside = model.state_dict().keys()
    buffers = model.named_buffers(remove_duplicate=False)
    return {name: buffer for name, buffer in buffers if name not in inside}


def _fillable(saved: dict[str, Tensor], model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Return each buffer that differs, with its saved values; an equal one may be expanded."""
    present = _other_buffers(model)
    both = [name for name in saved if name in present]
    same = [name for name in both if _look_of(name, saved[name]) == _look_of(name, present[name])]
    if odd := sorted((saved.keys() | present.keys()) - set(same)):
        warnings.warn(
            f"the buffers {', '.join(odd)} are not in the model's state_dict, and had another "
            "shape or were missing when the checkpoint was saved; they keep their present values",
            stacklevel=3,
        )
    pairs = [(present[name], saved[name]) for name in same]
    return [pair for pair in pairs if not torch.equal(pair[0].cpu(), pair[1].cpu())]


def _load_optimizer(optimizer: Optimizer, saved: StateDict) -> None:
    tensor_settings = [
        {name: value for name, value in group.items() if isinstance(value, Tensor)}
        for group in optimizer.param_groups
    ]
    optimizer.load_state_dict(saved)
    for group, tensors in zip(optimizer.param_groups, tensor_settings, strict=True):
        for name, tensor in tensors.items():  # A learning rate in a tensor stays the same tensor.
            if isinstance(group.get(name), Tensor):
                group[name] = tensor.copy_(group[name])
    groups = cast("list[dict[str, list[int]]]", saved["param_groups"])
    states = cast("dict[int, object]", saved["state"])
    numbers = itertools.chain.from_iterable(group["params"] for group in groups)
    parameters = itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups)
    for number, parameter in zip(numbers, parameters, strict=True):
        if number in states:
            optimizer.state[parameter] = _exact(optimizer.state[parameter], states[number])


def _exact(loaded: object, saved: object) -> object:
    """Return the state that ``Optimizer.load_state_dict`` made, with the dtypes that were saved.

    That method casts floating tensors to the parameter's dtype, and turns text into letters.
    """
    if isinstance(saved, str | bytes):
        return saved
    if isinstance(loaded, Tensor) and isinstance(saved, Tensor) and loaded.dtype != saved.dtype:
        return saved.to(loaded.device)
    if isinstance(loaded, dict) and isinstance(saved, dict):
        return {key: _exact(item, saved.get(key)) for key, item in loaded.items()}
    if type(loaded) in (list, tuple) and type(saved) is type(loaded):
        items = zip(cast("list[object]", loaded), cast("list[object]", saved), strict=True)
        exact = [_exact(*pair) for pair in items]
        return exact if isinstance(loaded, list) else tuple(exact)
    return loaded


def _kind_of(generator: object) -> str:
    if isinstance(generator, torch.Generator):
        return f"torch.Generator on {generator.device.type}"
    if isinstance(generator, np.random.Generator):
        return f"numpy Generator of {generator.bit_generator.state['bit_generator']}"
    if isinstance(generator, np.random.RandomState):
        return f"numpy RandomState of {generator.get_state(legacy=False)['bit_generator']}"
    return type(generator).__name__


def _state_of(generator: object) -> object:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return _without_arrays(generator.bit_generator.state)
    if isinstance(generator, np.random.RandomState):
        return _without_arrays(generator.get_state(legacy=False))
    assert isinstance(generator, random.Random)
    return generator.getstate()


def _set_state(generator: object, state: object) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(cast("Tensor", state))
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = cast("dict[str, object]", state)
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(cast("dict[str, object]", state))
    else:
        cast("random.Random", generator).setstate(cast("tuple[object, ...]", state))


def _without_arrays(value: object) -> object:
    """Return the value with lists for NumPy's arrays, which ``weights_only`` refuses."""
    if isinstance(value, dict):
        return {key: _without_arrays(item) for key, item in value.items()}
    return value.tolist() if isinstance(value, np.ndarray) else value
