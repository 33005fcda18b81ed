"""GPUs as NVIDIA's driver reports them: for people to read, never for the budget.

NVML creates no context, so it can list idle GPUs; it also sees what other processes hold. NVML may
be absent, refuse an answer, or be wrong: a fact that is missing, or that cannot be true, is unknown
here, and nothing raises.
"""

import ctypes
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Final

_MEMORY_V2: Final = 0x02000028  # pynvml.nvmlMemory_v2: size and version of the structure.
_IMPLAUSIBLE_BYTES: Final = 1 << 50  # From here up it is -1 or its kin, read as unsigned.
_IMPLAUSIBLE_COUNT: Final = 1 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class NvmlProcess:
    """A compute process on a GPU.

    Attributes:
        pid: Its number on the host: in a container, not the number known inside.
        used_bytes: The bytes that it holds; None where they are unknown (Windows, containers).
    """

    pid: int
    used_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class NvmlGpu:
    """A GPU, or a MIG slice of one, as something to compute on.

    Attributes:
        index: NVML's own number of the card. Never torch's: join by ``uuid``.
        uuid: With its prefix ``GPU-`` or ``MIG-``; ``""`` where unknown.
        name: The model; ``""`` where unknown.
        total_bytes: All memory; None where unknown, as are the next two.
        used_bytes: The bytes of all processes; with old drivers, the reserved bytes too.
        reserved_bytes: The bytes that driver and firmware keep for themselves.
        processes: Other processes that compute here, as far as known: ``()`` may also mean
            "unknown". This process's number is skipped. In a container the numbers are the host's,
            so this process may be listed, or may hide another with the same number: show them, and
            compute nothing from them.
        mig: Whether this is a slice, or a card cut into slices that could not be listed: such a
            card's memory is unknown, since no one process can have the whole.
    """

    index: int
    uuid: str
    name: str
    total_bytes: int | None
    used_bytes: int | None
    reserved_bytes: int | None
    processes: tuple[NvmlProcess, ...] = ()
    mig: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class NvmlSurvey:
    """All GPUs that NVML shows.

    Attributes:
        driver: The driver's version, or None.
        gpus: In NVML's order; a card cut by MIG is replaced by its slices.
        problem: Why something is unknown, or ``""``.
    """

    driver: str | None = None
    gpus: tuple[NvmlGpu, ...] = ()
    problem: str = ""


def survey() -> NvmlSurvey:
    """Return every GPU that NVML shows, read anew. Milliseconds; creates no context."""
    try:
        import pynvml
    except ImportError as error:
        return NvmlSurvey(problem=f"not available: {error}")
    try:
        pynvml.nvmlInit()
    except _refusals(pynvml) as error:
        return NvmlSurvey(problem=f"not available: {error}")
    try:
        return _survey(pynvml)
    finally:
        _ask(pynvml, "nvmlShutdown")  # NVML counts its users: it stays open for others.


def by_uuid(uuid: object) -> NvmlGpu | None:
    """Return the GPU or slice with this UUID, or None.

    Args:
        uuid: With or without a prefix, in any case, as text or as torch's
            ``get_device_properties(device).uuid``.
    """
    key = _key(str(uuid))
    return next((gpu for gpu in survey().gpus if gpu.uuid and _key(gpu.uuid) == key), None)


def _key(uuid: str) -> str:
    """``MIG-GPU-<uuid>/1/0`` is what drivers before R470 called a slice."""
    return re.sub(r"^(?:mig-)?(?:gpu-)?", "", uuid.strip().lower())


def _survey(nvml: ModuleType) -> NvmlSurvey:
    driver = _text(_ask(nvml, "nvmlSystemGetDriverVersion")) or None
    count = _number(_ask(nvml, "nvmlDeviceGetCount"), below=_IMPLAUSIBLE_COUNT)
    if count is None:
        return NvmlSurvey(driver=driver, problem="the GPUs cannot be counted")
    cards = [(i, _ask(nvml, "nvmlDeviceGetHandleByIndex", i)) for i in range(count)]
    silent = [str(index) for index, card in cards if card is None]
    return NvmlSurvey(
        driver=driver,
        gpus=tuple(
            gpu for index, card in cards if card is not None for gpu in _gpus(nvml, index, card)
        ),
        problem=f"no access to GPU {', '.join(silent)}" if silent else "",
    )


def _gpus(nvml: ModuleType, index: int, card: object) -> list[NvmlGpu]:
    """The card's slices; the card itself where there are none."""
    slices = [_gpu(nvml, index, part, is_slice=True) for part in _slices(nvml, card)]
    return slices or [_gpu(nvml, index, card, is_slice=False)]


def _slices(nvml: ModuleType, card: object) -> Iterator[object]:
    most = _number(_ask(nvml, "nvmlDeviceGetMaxMigDeviceCount", card), below=_IMPLAUSIBLE_COUNT)
    for place in range(most or 0):
        part = _ask(nvml, "nvmlDeviceGetMigDeviceHandleByIndex", card, place)
        if part is not None:  # Places may be empty.
            yield part


def _gpu(nvml: ModuleType, index: int, handle: object, *, is_slice: bool) -> NvmlGpu:
    uuid = _text(_ask(nvml, "nvmlDeviceGetUUID", handle))
    is_slice = is_slice or uuid.upper().startswith("MIG-")
    is_cut = not is_slice and _is_cut(nvml, handle)
    total, used, reserved = (None, None, None) if is_cut else _memory(nvml, handle)
    return NvmlGpu(
        index=index,
        uuid=uuid,
        name=_text(_ask(nvml, "nvmlDeviceGetName", handle)),
        total_bytes=total,
        used_bytes=used,
        reserved_bytes=reserved,
        processes=tuple(_others(_ask(nvml, "nvmlDeviceGetComputeRunningProcesses", handle))),
        mig=is_slice or is_cut,
    )


def _is_cut(nvml: ModuleType, card: object) -> bool:
    modes = _ask(nvml, "nvmlDeviceGetMigMode", card)  # Now, and after the next reset.
    return isinstance(modes, list | tuple) and modes[:1] in ([1], (1,))


def _memory(nvml: ModuleType, handle: object) -> tuple[int | None, int | None, int | None]:
    """Total, used and reserved bytes. Version 1 counts what is reserved as used."""
    version = getattr(nvml, "nvmlMemory_v2", _MEMORY_V2)
    info = _ask(nvml, "nvmlDeviceGetMemoryInfo", handle, version=version)
    if info is None:
        info = _ask(nvml, "nvmlDeviceGetMemoryInfo", handle)
    total = _number(getattr(info, "total", None), below=_IMPLAUSIBLE_BYTES) or None
    room = _IMPLAUSIBLE_BYTES if total is None else total + 1
    used = _number(getattr(info, "used", None), below=room)
    return total, used, _number(getattr(info, "reserved", None), below=room)


def _others(rows: object) -> Iterator[NvmlProcess]:
    for row in rows if isinstance(rows, list | tuple) else ():
        pid = _number(getattr(row, "pid", None), below=1 << 32)
        used = _number(getattr(row, "usedGpuMemory", None), below=_IMPLAUSIBLE_BYTES)
        if pid is not None and pid != os.getpid():
            yield NvmlProcess(pid=pid, used_bytes=used)


def _number(value: object, *, below: int) -> int | None:
    """``value`` if it is a whole number in ``0..below - 1``, or None."""
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    return value if 0 <= value < below else None


def _text(value: object) -> str:
    """``value`` as text, be it text or bytes as in old bindings; ``""`` for anything else."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value if isinstance(value, str) else ""


def _ask(nvml: ModuleType, function: str, *args: object, **options: int) -> object:
    """The answer, or None: a function that fails makes only its own fact unknown."""
    try:
        return getattr(nvml, function)(*args, **options)
    except _refusals(nvml):
        return None


def _refusals(nvml: ModuleType) -> tuple[type[BaseException], ...]:
    """The errors that a call of NVML may raise: NVML's own, and five of Python's.

    ``AttributeError`` and ``TypeError``: the bindings lack the function, or an option of it.
    ``OSError``, ``ValueError`` and ``ArgumentError``: ctypes cannot make the call, or the answer
    is not UTF-8.
    """
    own = (getattr(nvml, name, None) for name in ("NVMLError", "NVMLLibraryMismatchError"))
    known = (error for error in own if isinstance(error, type) and issubclass(error, Exception))
    return (*known, AttributeError, TypeError, OSError, ValueError, ctypes.ArgumentError)
