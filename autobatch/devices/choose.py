"""Which device a model trains on."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from autobatch.devices.base import MemoryDevice
from autobatch.devices.cuda import CudaDevice
from autobatch.devices.metered import MeteredDevice
from autobatch.errors import DeviceUnavailableError


def choose_device(asked: str | torch.device | None, present: torch.device) -> torch.device:
    """Return where to train: as asked, else where the parameters are, a GPU before the CPU.

    Raises:
        TypeError, ValueError: If ``asked`` names no device.
        DeviceUnavailableError: If it is not here, or its memory cannot be limited yet.
    """
    if asked is None:
        if present.type == "cpu" and torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return _checked(present)
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
    return MeteredDevice(residents, counts_host=counts_host)


def _checked(device: torch.device) -> torch.device:
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise DeviceUnavailableError(
            f"device {str(device)!r} is not supported yet: its memory cannot be limited; "
            'use "cuda" or "cpu"'
        )
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) >= count:
        raise DeviceUnavailableError(
            f"device {str(device)!r} is not here: torch {torch.__version__} sees {count} CUDA "
            "devices"
        )
    torch.cuda.init()  # Now, so that its generators exist before their state is taken.
    with torch.cuda.device(device):  # Without an index it means the current one.
        return torch.device("cuda", torch.cuda.current_device())
