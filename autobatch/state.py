"""Everything a search may disturb, taken once and put back bit for bit, in place.

Never through ``load_state_dict``: that re-creates parameter groups and changes dtypes. Objects keep
their identity, so that what the user holds (a parameter, a buffer, an optimizer's group) is what
the model has afterwards.
"""

import copy
import functools
import signal
import threading
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from autobatch.compat.torch_settings import TorchSettings
from autobatch.randomness import Restore, random_state

_PLAIN: Final = (str, bytes, int, float, complex, bool, type(None))
PLAIN_TYPES: Final = frozenset(_PLAIN)
# Exactly these are put back item by item: a class of the user's may have other rules.
_MAPPINGS: Final = (dict, OrderedDict, defaultdict, Counter)
_COLLECTIONS: Final = (list, deque, set, tuple)
LOOSE: Final = (Tensor, dict, list, deque, set, tuple)
"""What is put back itself; of other objects, their attributes are."""


@contextmanager
def preserved(
    modules: Sequence[nn.Module],
    optimizers: Sequence[Optimizer] = (),
    *,
    others: Iterable[object] = (),
    random_sources: Iterable[object] = (),
) -> Iterator[None]:
    """Put everything back afterwards, whatever happens inside; gradients are set aside meanwhile.

    Covers parameters, buffers, gradients, modes, devices and plain attributes of every module,
    the optimizers' state and groups, what lies in lists, mappings and sets among them however
    deep, the random number generators, and torch's settings. The copies lie in host memory. Ctrl-C
    during the restoring takes effect once it is complete. What a closure, a global variable, an
    array of NumPy or an object of the user's own holds is not restored. What cannot be put
    back, as on a device that is lost, keeps nothing else from it, and never hides an error from
    inside.

    Args:
        modules: Roots: the model, and the loss where it is a module.
        optimizers: Their state may be empty; it is empty again afterwards.
        others: Schedulers, scalers, tensors, lists and mappings, objects of the user's own.
        random_sources: Objects (loaders, datasets, samplers) whose own generators are restored.
    """
    # In this order, and put back in this order: a gradient needs its parameter's device and dtype.
    # Ctrl-C in the middle of torch's own no_grad leaves it on; at the end of a meter, the meter.
    restores: list[Restore] = [
        functools.partial(torch.set_grad_enabled, torch.is_grad_enabled()),
        _dispatch_modes(),
        TorchSettings.here().apply,
    ]
    try:
        children = [child for root in modules for child in root.modules()]
        others = list(others)
        loose = [other for other in others if isinstance(other, LOOSE)]
        holders = [*children, *optimizers, *(other for other in others if has_attributes(other))]
        restores += [attributes_of(holder) for holder in holders]
        restores += [contents_of(reachable(loose))]
        restores += [_odd_state(optimizer) for optimizer in optimizers]
        tensors = _tensors(modules, [*map(vars, holders), *loose])
        restores += [_tensor(tensor) for tensor in tensors]
        # No comprehension: each is undone if a later one fails, or Ctrl-C comes.
        with uninterrupted():
            for tensor in tensors:
                if tensor.is_leaf:
                    restores.append(_gradient_set_aside(tensor))
        restores.append(random_state([*random_sources, *modules, *others]))
        yield
    except BaseException as error:
        failure = _put_back(restores)
        if failure is not None:
            error.add_note(f"not everything could be put back: {failure}")
        raise
    failure = _put_back(restores)
    if failure is not None:
        raise failure


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


def attributes_of(holder: object) -> Restore:
    """Take which attributes the holder has, and what is in the containers among them.

    Returns:
        A function that puts them back.
    """
    attributes = dict(vars(holder))
    contents = contents_of(reachable(attributes.values()))

    def put_back() -> None:
        vars(holder).clear()
        vars(holder).update(attributes)
        contents()

    return put_back


def contents_of(found: Iterable[object]) -> Restore:
    """Take what is in the containers among what was found.

    Returns:
        A function that puts it back.
    """
    containers = [
        (value, value.copy()) for value in found if isinstance(value, dict | list | deque | set)
    ]

    def put_back() -> None:
        for container, content in containers:
            container.clear()
            if isinstance(container, list | deque):
                container.extend(content)
            else:
                container.update(content)

    return put_back


def reachable(values: Iterable[object]) -> list[object]:
    """Return the containers and tensors among the values, and in those containers, however deep."""
    found: dict[int, object] = {}
    unseen = list(values)
    while unseen:
        value = unseen.pop()
        if id(value) in found or isinstance(value, _PLAIN):
            continue
        if isinstance(value, Tensor):
            found[id(value)] = value
        elif isinstance(value, dict) and type(value) in _MAPPINGS:
            found[id(value)] = value
            unseen += value.values()
        elif isinstance(value, list | deque | set | tuple) and type(value) in _COLLECTIONS:
            found[id(value)] = value
            if not PLAIN_TYPES.issuperset(map(type, value)):  # Most hold a layer's few numbers.
                unseen += value
    return list(found.values())


def state_tensors(optimizer: Optimizer) -> list[Tensor]:
    """Return what an optimizer keeps for its parameters: Adam's moments, say."""
    return [
        value
        for entry in optimizer.state.values()
        for value in entry.values()
        if isinstance(value, Tensor)
    ]


def has_attributes(other: object) -> bool:
    """Whether what an object holds is in its attributes, and not in itself."""
    return hasattr(other, "__dict__") and not isinstance(other, LOOSE)


def _put_back(restores: Iterable[Restore]) -> Exception | None:
    """Call every one, whatever becomes of the others; return the first error."""
    failures: list[Exception] | None = None
    late: list[KeyboardInterrupt] = []
    while failures is None:  # Ctrl-C may come before it can be held back.
        try:
            with uninterrupted():
                failures = [error for restore in restores if (error := _error_of(restore))]
        except KeyboardInterrupt as interrupt:
            late.append(interrupt)
    if late:
        raise late[0]
    return failures[0] if failures else None


def _error_of(restore: Restore) -> Exception | None:
    try:
        restore()
    except Exception as error:  # noqa: BLE001 - whatever it is, it is returned
        return error
    return None


def _tensors(modules: Iterable[nn.Module], held: Iterable[object]) -> list[Tensor]:
    """All that belong to the modules or are held, and have values, each once."""
    own = list(held)
    for root in modules:  # Where a class of its own keeps them.
        own += [*root.parameters(), *root.buffers()]
    return [item for item in reachable(own) if isinstance(item, Tensor) and not item.is_meta]


def _dispatch_modes() -> Restore:
    """Which modes operations pass through, such as a meter: those added later are ended."""
    before = len(_get_current_dispatch_mode_stack())

    def put_back() -> None:
        for mode in reversed(_get_current_dispatch_mode_stack()[before:]):
            mode.__exit__(None, None, None)

    return put_back


def _odd_state(optimizer: Optimizer) -> Restore:
    """State that is neither tensors, nor plain, nor in containers: replaced by a copy."""
    odd = [
        (entry, key, copy.deepcopy(value))
        for entry in optimizer.state.values()
        if isinstance(entry, dict)
        for key, value in entry.items()
        if not isinstance(value, (Tensor, *_PLAIN, *_MAPPINGS, *_COLLECTIONS))
    ]

    def put_back() -> None:
        for entry, key, value in odd:
            entry[key] = value

    return put_back


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
