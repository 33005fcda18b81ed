"""cloudpickle, which sends to another process what only a script or a notebook knows."""

from types import ModuleType

from autobatch.errors import AutobatchError


def cloudpickle() -> ModuleType:
    """Return the module; what needs no second process does without it.

    Raises:
        AutobatchError: If it is not installed.
    """
    try:
        import cloudpickle as module
    except ImportError as error:
        raise AutobatchError(
            "what runs in a process of its own (isolate=True, predict) needs cloudpickle: "
            "pip install cloudpickle"
        ) from error
    return module  # type: ignore[no-any-return]  # It is not typed.
