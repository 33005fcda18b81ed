"""Everything a search may disturb, taken once and put back bit for bit, in place.

Never through ``load_state_dict``: that re-creates parameter groups and changes dtypes. Objects keep
their identity, so that what the user holds (a parameter, a buffer, an optimizer's group) is what
the model has afterwards.
"""

import copy
import signal
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from autobatch.randomness import Restore, random_state

_PLAIN: Final = (str, bytes, int, float, complex, bool, type(None))
_CONTAINERS: Final = (dict, OrderedDict, list, deque, set)  # Exactly these: a subclass may differ.


@contextmanager
def preserved(
    modules: Sequence[nn.Module],
    optimizers: Sequence[Optimizer] = (),
    *,
    random_sources: Iterable[object] = (),
) -> Iterator[None]:
    """Put everything back afterwards, whatever happens inside; gradients are set aside meanwhile.

    Covers parameters, buffers, gradients, modes, devices and plain attributes of every module,
    the optimizers' state and groups, and the random number generators. The copies lie in host
    memory. Ctrl-C during the restoring takes effect once it is complete. What a closure or a
    global variable holds cannot be seen, and is not restored.

    Args:
        modules: Roots: the model, and the loss where it is a module.
        optimizers: Their state may be empty; it is empty again afterwards.
        random_sources: Objects (loaders, datasets, samplers) whose own generators are restored.
    """
    # In this order, and put back in this order: a gradient needs its parameter's device and dtype.
    restores: list[Restore] = []
    try:
        restores += [_attributes(child) for root in modules for child in root.modules()]
        restores += [_optimizer_state(optimizer) for optimizer in optimizers]
        tensors = _unique(_tensors(modules, optimizers))
        restores += [_tensor(tensor) for tensor in tensors]
        # No comprehension: each is undone if a later one fails, or Ctrl-C comes.
        with uninterrupted():
            for tensor in tensors:
                if tensor.is_leaf:
                    restores.append(_gradient_set_aside(tensor))
        own = [vars(child) for root in modules for child in root.modules()]
        restores.append(random_state([*random_sources, *own]))
        yield
    finally:
        with uninterrupted():
            for restore in restores:
                restore()


@contextmanager
def training_mode(module: nn.Module) -> Iterator[None]:
    """Put the module in training mode if its root is in evaluation mode, and back afterwards."""
    if module.training:
        yield
        return
    modes = [(child, child.training) for child in module.modules()]
    module.train()
    try:
        yield
    finally:
        for child, mode in modes:
            child.training = mode


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back until the end. Only the main thread receives it, so only there."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[FrameType | None] = []
    outer = signal.signal(signal.SIGINT, lambda _, frame: held.append(frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler if outer is None else outer)
    if held and callable(outer):
        outer(signal.SIGINT, held[0])


def _attributes(module: nn.Module) -> Restore:
    """The module's own attributes: modes and counters, and which tensors and children it has."""
    attributes = dict(vars(module))
    containers = [
        (value, value.copy()) for value in attributes.values() if type(value) in _CONTAINERS
    ]

    def put_back() -> None:
        vars(module).clear()
        vars(module).update(attributes)
        for container, content in containers:
            container.clear()
            add = container.extend if isinstance(container, list | deque) else container.update
            add(content)

    return put_back


def _optimizer_state(optimizer: Optimizer) -> Restore:
    """Groups, scalar attributes and state: which entries there are; tensors are taken apart."""
    attributes = dict(vars(optimizer))
    groups = [(group, dict(group), list(group["params"])) for group in optimizer.param_groups]
    entries = [(key, entry, _entry(entry)) for key, entry in optimizer.state.items()]
    group_list, state = optimizer.param_groups, optimizer.state

    def put_back() -> None:
        vars(optimizer).clear()
        vars(optimizer).update(attributes)
        group_list[:] = [group for group, _, _ in groups]
        for group, content, parameters in groups:
            group.clear()
            group.update(content)
            group["params"][:] = parameters
        state.clear()
        for key, entry, content in entries:
            if isinstance(entry, dict):
                entry.clear()
                entry.update(content)
            state[key] = entry

    return put_back


def _entry(entry: object) -> dict[str, object]:
    """One parameter's state: tensors as they are (their values are taken elsewhere)."""
    if not isinstance(entry, dict):
        return {}
    return {
        key: value if isinstance(value, (Tensor, *_PLAIN)) else copy.deepcopy(value)
        for key, value in entry.items()
    }


def _tensor(tensor: Tensor) -> Restore:
    """Where the tensor's memory is, and what is in it."""
    home = tensor.data  # Shares the memory: what a move to another device leaves behind.
    values = tensor.detach().to("cpu", copy=True)
    requires_grad = tensor.requires_grad

    def put_back() -> None:
        if not _same_memory(tensor, home):
            tensor.data = home
        _fill(home, values)
        if tensor.is_leaf and tensor.requires_grad != requires_grad:
            tensor.requires_grad_(requires_grad)

    return put_back


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return (
        one.layout is torch.strided
        and one.device == other.device
        and one.dtype == other.dtype
        and one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
    )


@torch.no_grad()
def _fill(tensor: Tensor, values: Tensor) -> None:
    if tensor.layout is torch.strided:
        for dimension, stride in enumerate(tensor.stride()):
            if stride == 0 and tensor.shape[dimension] > 1:  # Expanded: one row stands for all.
                tensor = tensor.narrow(dimension, 0, 1)
                values = values.narrow(dimension, 0, 1)
    tensor.copy_(values)


def _gradient_set_aside(parameter: Tensor) -> Restore:
    """Detach ``.grad``; on an accelerator its memory waits on the host."""
    gradient = parameter.grad
    if gradient is None:
        return lambda: setattr(parameter, "grad", None)
    device = gradient.device
    moved = device.type != "cpu" and _owns_its_memory(gradient)
    on_host = gradient.data.cpu() if moved else None
    parameter.grad = None  # Only now: if the copy fails, the gradient is still in its place.
    if on_host is not None:
        gradient.data = on_host

    def put_gradient_back() -> None:
        if moved:
            gradient.data = gradient.data.to(device)
        parameter.grad = gradient

    return put_gradient_back


def _owns_its_memory(tensor: Tensor) -> bool:
    """False for a view into a larger buffer, which must stay one."""
    return (
        tensor.layout is torch.strided
        and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    )


def _parameters(modules: Sequence[nn.Module], optimizers: Sequence[Optimizer]) -> Iterator[Tensor]:
    for module in modules:
        yield from module.parameters()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            yield from group["params"]


def _tensors(modules: Sequence[nn.Module], optimizers: Sequence[Optimizer]) -> Iterator[Tensor]:
    """All tensors that belong to the modules and the optimizers."""
    yield from _parameters(modules, optimizers)
    for root in modules:
        yield from root.buffers()
        for child in root.modules():
            yield from _direct_tensors(vars(child).values())
    for optimizer in optimizers:
        for holder in (*optimizer.param_groups, *optimizer.state.values()):
            if isinstance(holder, dict):
                yield from (value for value in holder.values() if isinstance(value, Tensor))


def _direct_tensors(values: Iterable[object]) -> Iterator[Tensor]:
    """The tensors among the values, and those directly inside a container among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | deque | set):
            yield from (item for item in value if isinstance(item, Tensor))
        elif isinstance(value, dict):
            yield from (item for item in value.values() if isinstance(item, Tensor))


def _unique(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())
