"""Search the largest size at which a function of the user runs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Final

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from autobatch.devices.accounting import account_for
from autobatch.devices.base import HOST
from autobatch.devices.budget import Budget
from autobatch.devices.factory import choose_device, open_device
from autobatch.display import observer_of
from autobatch.events import Observer
from autobatch.results.search import SearchResult
from autobatch.search.finder import BatchSizeFinder
from autobatch.search.options import STANDARD_SEARCH, SearchOptions, check_search
from autobatch.state.last_error import forget_last_error
from autobatch.state.rng import generators_in
from autobatch.state.snapshot import has_attributes, preserved, reachable, state_tensors
from autobatch.units import Size
from autobatch.validation import check_one_process, check_size

_SINGLE: Final = (str, Mapping, Tensor, nn.Module)  # One object, though it is iterable.
_RESTORED: Final = (nn.Module, Optimizer, LRScheduler, GradScaler)


def find_largest(
    run: Callable[[int], object],
    *,
    ceiling: int,
    state: object = (),
    device: str | torch.device | None = None,
    memory_limit: Size | None = None,
    headroom: Size | None = None,
    search: SearchOptions = STANDARD_SEARCH,
    progress: bool | Observer = False,
) -> SearchResult:
    """Return the largest size at which ``run`` works inside the memory limit.

    For everything that is not one model with one optimizer: two optimizers, reinforcement learning,
    generation. Sizes grow and shrink, errors are recognised as in training, and everything that
    ``state`` names is restored::

        model = nn.Linear(1000, 1000)

        def run(size):
            model(torch.randn(size, 1000)).square().mean().backward()

        print(find_largest(run, ceiling=64, state=model).size)

    Args:
        run: Takes a size and does the work of that size: a whole step, with backward passes and
            optimizers if there are some. It is called with the smallest sizes first, so that
            optimizers have their state.
        ceiling: The largest size of interest.
        state: What ``run`` changes, one object or several: modules, optimizers, schedulers,
            scalers, tensors, generators, containers, objects with attributes. Modules, optimizers,
            schedulers, scalers and tensors in containers and attributes are restored too. Gradients
            of the modules are released between trials, and earlier gradients are restored. NumPy
            arrays and the variables of a closure are not restored. On the CPU, only the memory of
            what is named here or made by an operation is counted: name the weights that ``run``
            reads as well.
        device: Whose memory counts. None is where the first tensor of ``state`` is, or a GPU if
            that tensor is on the CPU and there is a GPU. Nothing is copied to the device.
        memory_limit: As for ``find_and_train``.
        headroom: As for ``find_and_train``.
        search: As for ``find_and_train``; there is no data for a worst case.
        progress: As for ``find_and_train``.

    Returns:
        The size, what limits it, its memory and the trials.

    Raises:
        TypeError, ValueError: An argument is wrong. Nothing was changed.
        DoesNotFitError: ``run`` does not work even at the smallest size.
        SearchTimeoutError, DeviceLostError: As for ``find_and_train``.
    """
    if not callable(run):
        raise TypeError(f"run must be callable with a size, got {run!r}")
    check_search(search)
    if search.isolate:
        raise ValueError(
            "isolate=True cannot restore what run changes in another process; pass "
            "isolate=False, or use find_batch_size"
        )
    candidates = search.candidates(check_size("ceiling", ceiling))
    check_one_process()
    parts = _Parts(state)
    budget = Budget.parse(memory_limit, headroom)
    memory = open_device(
        choose_device(device, parts.device),
        parts.tensors,
        counts_host=budget.memory_limit_bytes is None,
    )
    with ExitStack() as stack:
        observer = observer_of(progress, stack)
        if search.forget_errors:
            forget_last_error(observer)
        stack.enter_context(preserved(parts.modules, parts.optimizers, others=parts.others))
        return BatchSizeFinder(
            program=_FunctionTrial(run, parts.modules),
            device=memory,
            limit_bytes=lambda: budget.limit_bytes(memory.read()),
            breakdown=lambda limit_bytes, trial: account_for(
                {"tensors in state": sum(t.nbytes for t in parts.tensors())},
                device=memory,
                budget=budget,
                limit_bytes=limit_bytes,
                trial=trial,
            ),
            observer=observer,
            options=search,
        ).largest(candidates, windows=lambda size: (size,), reason="ceiling")


class _Parts:
    """The objects that ``state`` names, sorted by how they are restored."""

    def __init__(self, state: object) -> None:
        named: list[object] = [state]
        if isinstance(state, Iterable) and not isinstance(state, _SINGLE):
            named = list(state)
        for part in named:
            if not _has_state(part):
                raise TypeError(
                    "state must hold the objects that run changes: modules, optimizers, tensors, "
                    f"containers, or objects with attributes; got {part!r}"
                )
        named += _torch_objects_in(named)
        self.modules = [part for part in named if isinstance(part, nn.Module)]
        self.optimizers = [part for part in named if isinstance(part, Optimizer)]
        self.others = [p for p in named if not isinstance(p, nn.Module | Optimizer)]

    @property
    def device(self) -> torch.device:
        """The device of the first tensor."""
        return next((tensor.device for tensor in self.tensors()), HOST)

    def tensors(self) -> list[Tensor]:
        """Return all tensors that live between two runs."""
        found = [t for module in self.modules for t in (*module.parameters(), *module.buffers())]
        for optimizer in self.optimizers:
            found += state_tensors(optimizer)
        return found + [part for part in self.others if isinstance(part, Tensor)]


def _has_state(part: object) -> bool:
    """Return True if ``part`` can be restored; a container class of the user cannot."""
    if isinstance(part, type):
        return False
    is_generator = any(found is part for found in generators_in(part))
    return is_generator or has_attributes(part) or bool(reachable([part]))


def _torch_objects_in(named: Sequence[object]) -> list[object]:
    """Return torch's objects in containers and in attributes of objects that are not torch's."""
    holders = [part for part in named if has_attributes(part) and not isinstance(part, nn.Module)]
    inside: dict[int, object] = {}
    for container in reachable([*named, *map(vars, holders)]):
        if not isinstance(container, Tensor):
            assert isinstance(container, Iterable), "reachable: tensors and containers"
            items = container.values() if isinstance(container, Mapping) else container
            inside |= {id(item): item for item in items if isinstance(item, _RESTORED)}
    for part in named:
        inside.pop(id(part), None)
    return list(inside.values())


class _FunctionTrial:
    """Calls ``run`` at any size, for the trials of a search."""

    def __init__(self, run: Callable[[int], object], modules: Sequence[nn.Module]) -> None:
        self._run = run
        self._modules = modules

    def prepare(self, sizes: Sequence[int], mark: Callable[[], None]) -> Callable[[], None]:  # noqa: ARG002  # A run has one phase.
        """Return a function that calls ``run`` with the first size."""

        def run() -> None:
            self._run(sizes[0])

        return run

    def verify(self, size: int, peak_bytes: int) -> str:  # noqa: ARG002  # The protocol's arguments.
        """Return ``""``: the result of ``run`` is not checked."""
        return ""

    def clear(self) -> None:
        """Release the gradients of the modules."""
        for module in self._modules:
            for parameter in module.parameters():
                parameter.grad = None
