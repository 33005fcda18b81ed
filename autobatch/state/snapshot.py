"""A snapshot of all that a search may change, restored bit for bit and in place.

``load_state_dict`` is not used: it makes new parameter groups and changes dtypes. Objects keep
their identity: a parameter, buffer or parameter group that the user holds is still the model's
after the search.
"""

import copy
import functools
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from autobatch.compat.torch_settings import TorchSettings
from autobatch.devices.base import HOST, on_host
from autobatch.signals import deferred_interrupt
from autobatch.state.rng import Restore, random_state

_PLAIN: Final = (str, bytes, int, float, complex, bool, type(None))
PLAIN_TYPES: Final = frozenset(_PLAIN)
# Only these classes are restored item by item: a subclass of the user's may have other rules.
_MAPPINGS: Final = (dict, OrderedDict, defaultdict, Counter)
_COLLECTIONS: Final = (list, deque, set, tuple)
LOOSE: Final = (Tensor, dict, list, deque, set, tuple)
"""Objects whose content is restored; of any other object the attributes are."""


@contextmanager
def preserved(
    modules: Sequence[nn.Module],
    optimizers: Sequence[Optimizer] = (),
    *,
    others: Iterable[object] = (),
    random_sources: Iterable[object] = (),
) -> Iterator[None]:
    """Restore everything at the end of the block, also after an error in it.

    Inside the block all gradients are None. Restored are parameters, buffers, gradients, modes,
    devices and plain attributes of all modules, the optimizers' state and groups, the lists,
    mappings and sets in these at any depth, the random number generators, and torch's settings.
    Not restored are values that only a closure, a global variable, a NumPy array or an object of
    the user's own class holds.

    The copies lie in host memory. Ctrl-C while state is restored takes effect when all of it is.
    A value that cannot be restored, on a lost device for example, does not prevent the others from
    being restored, and does not hide an error of the block.

    Args:
        modules: The model, and the loss if it is a module.
        optimizers: Their state may be empty; an empty state is empty again afterwards.
        others: Schedulers, scalers, tensors, lists, mappings and other objects.
        random_sources: Loaders, datasets and samplers, whose own generators are restored.

    Raises:
        Exception: The first error of a value that could not be restored, if the block had none.

    Example:
        >>> with preserved([model], [optimizer]):
        ...     train_one_step(model, optimizer)
    """
    # The order of taking is the order of restoring: a gradient needs its parameter's device and
    # dtype. Ctrl-C inside torch's no_grad can leave gradients off, and inside a meter's exit it can
    # leave the meter on.
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
        # No comprehension: if one fails, or Ctrl-C arrives, those before it are in the list.
        with deferred_interrupt():
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
    """Put a module that is in evaluation mode in training mode; restore all modes afterwards."""
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


def attributes_of(holder: object) -> Restore:
    """Take an object's attributes, and the content of the containers among them.

    Returns:
        A function that restores both.
    """
    attributes = dict(vars(holder))
    contents = contents_of(reachable(attributes.values()))

    def put_back() -> None:
        vars(holder).clear()
        vars(holder).update(attributes)
        contents()

    return put_back


def contents_of(found: Iterable[object]) -> Restore:
    """Take the content of the containers among the given objects.

    Returns:
        A function that restores the content.
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
    """Return the containers and tensors among the values, and all inside those containers."""
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
    """Return the tensors that an optimizer keeps for its parameters, such as Adam's moments."""
    return [
        value
        for entry in optimizer.state.values()
        for value in entry.values()
        if isinstance(value, Tensor)
    ]


def has_attributes(other: object) -> bool:
    """Return whether an object holds its values in attributes, unlike a tensor or a list."""
    return hasattr(other, "__dict__") and not isinstance(other, LOOSE)


def _put_back(restores: Iterable[Restore]) -> Exception | None:
    """Call all functions, also after an error of one of them; return the first error."""
    failures: list[Exception] | None = None
    late: list[KeyboardInterrupt] = []
    while failures is None:  # Ctrl-C may come before it can be held back.
        try:
            with deferred_interrupt():
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
    """Return the tensors with values of the modules and of the other objects, each once."""
    own = list(held)
    for root in modules:  # A module of the user's own class may keep its parameters elsewhere.
        own += [*root.parameters(), *root.buffers()]
    return [item for item in reachable(own) if isinstance(item, Tensor) and not item.is_meta]


def _dispatch_modes() -> Restore:
    """Take the stack of dispatch modes, such as a meter; restoring leaves those added later."""
    before = len(_get_current_dispatch_mode_stack())

    def put_back() -> None:
        for mode in reversed(_get_current_dispatch_mode_stack()[before:]):
            mode.__exit__(None, None, None)

    return put_back


def _odd_state(optimizer: Optimizer) -> Restore:
    """Take a copy of optimizer state that is neither a tensor, a plain value nor a container."""
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
    """Take a tensor's memory and the values in it."""
    home = tensor.data  # It shares the memory that a move to another device leaves behind.
    values = tensor.detach().to(HOST, copy=True)
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
            if stride == 0 and tensor.shape[dimension] > 1:  # Expanded: all rows share memory.
                tensor = tensor.narrow(dimension, 0, 1)
                values = values.narrow(dimension, 0, 1)
    tensor.copy_(values)


def _gradient_set_aside(parameter: Tensor) -> Restore:
    """Set ``.grad`` to None; an accelerator's gradient is kept in host memory meanwhile."""
    gradient = parameter.grad
    if gradient is None:
        return lambda: setattr(parameter, "grad", None)
    device = gradient.device
    leaves = not on_host(gradient) and _owns_its_memory(gradient)
    waiting = gradient.data.cpu() if leaves else None
    parameter.grad = None  # Only now: if the copy fails, the gradient is still in its place.
    if waiting is not None:
        gradient.data = waiting

    def put_gradient_back() -> None:
        if waiting is not None:
            gradient.data = gradient.data.to(device)
        parameter.grad = gradient

    return put_gradient_back


def _owns_its_memory(tensor: Tensor) -> bool:
    """Return False for a view into a larger buffer, which must stay a view."""
    return (
        tensor.layout is torch.strided
        and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    )
