"""Which device a model trains on."""

from collections.abc import Callable, Iterable
from typing import Final

import torch
from torch import Tensor

from autobatch.devices.accelerator import open_accelerator
from autobatch.devices.base import MemoryDevice
from autobatch.devices.cpu import CpuDevice
from autobatch.devices.cuda import CudaDevice
from autobatch.errors import DeviceUnavailableError

_KNOWN: Final = ("cuda", "xpu", "mps")


def choose_device(asked: str | torch.device | None, present: torch.device) -> torch.device:
    """Return where to train: as asked, else where the parameters are, a GPU before the CPU.

    Raises:
        TypeError, ValueError: If ``asked`` names no device.
        DeviceUnavailableError: If it is not here, or is no device to train on.
    """
    if asked is None:
        return _checked(_preferred() if present.type == "cpu" else present)
    if not isinstance(asked, str | torch.device):
        raise TypeError(f'device must be text like "cuda:0" or a torch.device, got {asked!r}')
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        raise ValueError(f"device cannot be read from {asked!r}: {error}") from None
    return _checked(device)


def open_device(
    device: torch.device,
    residents: Callable[[], Iterable[Tensor]] = tuple,
    *,
    counts_host: bool = False,
) -> MemoryDevice:
    """Return the memory of ``device``.

    Args:
        device: As ``choose_device`` returns it.
        residents: Lists the tensors that live on it between steps.
        counts_host: For the CPU, whether the limit is the host's own memory.
    """
    if device.type == "cuda":
        return CudaDevice(device)
    if device.type != "cpu":
        return open_accelerator(device)
    return CpuDevice(residents, counts_host=counts_host)


def _preferred() -> torch.device:
    """A GPU if there is one, CUDA's or ROCm's before another."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def _checked(device: torch.device) -> torch.device:
    """The device with its index, started; the CPU without one."""
    if device.type == "cpu":
        return torch.device("cpu")
    count = _count(device.type)
    if count is None:
        raise DeviceUnavailableError(
            f"device {str(device)!r} is not supported: its memory cannot be read; use "
            f"{', '.join(map(repr, _KNOWN))} or 'cpu'"
        )
    if (device.index or 0) >= count:
        raise DeviceUnavailableError(
            f"device {str(device)!r} is not here: torch {torch.__version__} sees {count} "
            f"{device.type.upper()} devices"
        )
    if device.type != "cuda":
        _start(device.type)
        unnumbered = device == torch.device(device.type)
        current = torch.accelerator.current_device_index()
        return torch.device(device.type, current if unnumbered else device.index)
    torch.cuda.init()  # Now, so that its generators exist before their state is taken.
    with torch.cuda.device(device):  # Without an index it means the current one.
        return torch.device("cuda", torch.cuda.current_device())


def _count(kind: str) -> int | None:
    """How many devices of this kind are here; None if torch cannot read the memory of any."""
    if kind == "cuda":
        return torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is not None and found.type == kind:
        return torch.accelerator.device_count()
    return 0 if kind in _KNOWN else None


def _start(kind: str) -> None:
    """Begin as CUDA does, for the same reason."""
    start = getattr(torch.get_device_module(kind), "init", None)
    if start is not None:
        start()
