"""Which device a model trains on, and which class knows it."""

from collections.abc import Callable, Iterable
from typing import Final

import torch
from torch import Tensor

from autobatch.devices.accelerator import AcceleratorDevice, MpsDevice, XpuDevice
from autobatch.devices.base import HOST, MemoryDevice
from autobatch.devices.cpu import CpuDevice
from autobatch.devices.cuda import CudaDevice
from autobatch.errors import DeviceUnavailableError

BACKENDS: Final[dict[str, type[MemoryDevice]]] = {
    "cuda": CudaDevice,  # ROCm as well.
    "xpu": XpuDevice,
    "mps": MpsDevice,
    "cpu": CpuDevice,
}
"""The class for each kind of device, the preferred kind first. A new kind is a line here."""


def backend_of(device: torch.device) -> type[MemoryDevice]:
    """Return the class for this kind of device; a general one for an unlisted accelerator."""
    return BACKENDS.get(device.type, AcceleratorDevice)


def widest_dtype(device: torch.device) -> torch.dtype:
    """Return the widest floating type that a device computes in: float64, except on some GPUs."""
    return backend_of(device).widest_dtype(device)


def choose_device(requested: str | torch.device | None, present: torch.device) -> torch.device:
    """Return where to train: on the requested device, else where the parameters are.

    Parameters on the CPU go to a GPU if there is one.

    Args:
        requested: What the user requests, or None.
        present: Where the parameters are.

    Raises:
        TypeError, ValueError: If ``requested`` names no device.
        DeviceUnavailableError: If the device is not here, or its memory cannot be read.
    """
    if requested is None:
        return _started(_preferred() if present.type == HOST.type else present)
    if not isinstance(requested, str | torch.device):
        raise TypeError(f'device must be text like "cuda:0" or a torch.device, got {requested!r}')
    try:
        device = torch.device(requested)
    except RuntimeError as error:
        raise ValueError(f"device cannot be read from {requested!r}: {error}") from None
    return _started(device)


def open_device(
    device: torch.device,
    residents: Callable[[], Iterable[Tensor]] = tuple,
    *,
    counts_host: bool = False,
) -> MemoryDevice:
    """Return the memory of ``device``.

    Args:
        device: As ``choose_device`` returns it.
        residents: Lists the tensors that live on the device between steps.
        counts_host: For the CPU, whether the limit is the host's own memory.
    """
    return backend_of(device).open(device, residents, counts_host=counts_host)


def _preferred() -> torch.device:
    """A GPU if there is one, of the first kind that is here."""
    for kind, backend in BACKENDS.items():
        if backend.count(kind):
            return torch.device(kind)
    return torch.accelerator.current_accelerator(check_available=True) or HOST


def _started(device: torch.device) -> torch.device:
    """The device with its index, ready for use."""
    backend = backend_of(device)
    count = backend.count(device.type)
    if count == 0 and device.type not in BACKENDS:
        *kinds, last = map(repr, BACKENDS)
        raise DeviceUnavailableError(
            f"device {str(device)!r} is not supported: its memory cannot be read; use "
            f"{', '.join(kinds)} or {last}"
        )
    if count is not None and (device.index or 0) >= count:
        raise DeviceUnavailableError(
            f"device {str(device)!r} is not here: torch {torch.__version__} sees {count} "
            f"{device.type.upper()} devices"
        )
    return backend.start(device)


def in_widest(tensor: Tensor) -> Tensor:
    """Return a tensor's values in the widest floating type of its device."""
    return tensor.to(widest_dtype(tensor.device))
