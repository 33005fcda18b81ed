"""What NVML and torch see of this machine, side by side."""

from dataclasses import dataclass

import torch

from autobatch.cli.reports import Fields
from autobatch.devices.cuda import TorchGpu, visible_gpus
from autobatch.devices.host_memory import host_memory
from autobatch.devices.nvml import NvmlGpu, NvmlSurvey, survey
from autobatch.units import format_bytes

HEADERS = ("GPU", "name", "in use", "by processes", "torch")


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """The machine at one moment.

    Attributes:
        nvml: What the driver's library says.
        torch_gpus: What torch can use.
        torch_build: Torch's version, and what it was built for.
        host_total_bytes: Memory that the host lets this process have.
        host_free_bytes: What of it is available.
    """

    nvml: NvmlSurvey
    torch_gpus: tuple[TorchGpu, ...]
    torch_build: str
    host_total_bytes: int
    host_free_bytes: int

    @property
    def lines(self) -> tuple[str, ...]:
        """What is to be said beside the table."""
        gpus, seen = len(self.nvml.gpus), len(self.torch_gpus)
        driver = f"driver {self.nvml.driver}" if self.nvml.driver else ""
        counted = _gpus(gpus) if gpus or not self.nvml.problem else ""
        nvml = ", ".join(filter(None, (driver, counted, self.nvml.problem)))
        facts = (f"NVML:  {nvml}", f"torch: {_gpus(seen)}, {self.torch_build}")
        host = f"{format_bytes(self.host_free_bytes)} of {format_bytes(self.host_total_bytes)}"
        if not (gpus or seen):
            return (*facts, f"There is no GPU here. Training runs on the CPU, with {host} free.")
        if not seen:
            return (*facts, f"torch cannot use a GPU: training runs on the CPU, with {host} free.")
        return facts

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """A row for each GPU under ``HEADERS``; one that torch alone sees comes last."""
        by_uuid = {_bare(gpu.uuid): gpu for gpu in self.torch_gpus}
        rows = [_row(gpu, by_uuid.pop(_bare(gpu.uuid), None)) for gpu in self.nvml.gpus]
        return rows + [("-", gpu.name, "-", "-", _seen(gpu)) for gpu in by_uuid.values()]

    @property
    def fields(self) -> Fields:
        """The same and more, as JSON takes it."""
        by_uuid = {_bare(gpu.uuid): gpu.device for gpu in self.torch_gpus}
        return {
            "nvml": {
                "driver": self.nvml.driver,
                "problem": self.nvml.problem or None,
                "gpus": [_fields(gpu, by_uuid.get(_bare(gpu.uuid))) for gpu in self.nvml.gpus],
            },
            "torch": {
                "build": self.torch_build,
                "gpus": [
                    {"device": gpu.device, "name": gpu.name, "total_bytes": gpu.total_bytes}
                    for gpu in self.torch_gpus
                ],
            },
            "host": {"total_bytes": self.host_total_bytes, "free_bytes": self.host_free_bytes},
        }


def take_inventory() -> Inventory:
    """Ask NVML, torch and the host. No CUDA context is made, so this takes no GPU memory."""
    total, free = host_memory()
    return Inventory(
        nvml=survey(),
        torch_gpus=visible_gpus(),
        torch_build=_torch_build(),
        host_total_bytes=total,
        host_free_bytes=free,
    )


def _torch_build() -> str:
    version = torch.version
    kind = f"for CUDA {version.cuda}" if version.cuda else "without CUDA"
    return f"{torch.__version__} built {f'for ROCm {version.hip}' if version.hip else kind}"


def _row(gpu: NvmlGpu, seen: TorchGpu | None) -> tuple[str, ...]:
    used = f"{_bytes(gpu.used_bytes)} of {_bytes(gpu.total_bytes)}"
    processes = [f"{p.pid}: {_bytes(p.used_bytes)}" for p in gpu.processes]
    name = f"{gpu.name or 'unknown'}{' (MIG)' if gpu.mig else ''}"
    return (
        str(gpu.index),
        name,
        used,
        "\n".join(processes) or "-",
        "not seen" if seen is None else _seen(seen),
    )


def _seen(gpu: TorchGpu) -> str:
    return f"{gpu.device}, {format_bytes(gpu.total_bytes)}"


def _fields(gpu: NvmlGpu, device: str | None) -> Fields:
    return {
        "index": gpu.index,
        "uuid": gpu.uuid,
        "name": gpu.name,
        "total_bytes": gpu.total_bytes,
        "used_bytes": gpu.used_bytes,
        "reserved_bytes": gpu.reserved_bytes,
        "mig": gpu.mig,
        "processes": [{"pid": p.pid, "used_bytes": p.used_bytes} for p in gpu.processes],
        "torch_device": device,
    }


def _bytes(count: int | None) -> str:
    return "unknown" if count is None else format_bytes(count)


def _bare(uuid: str) -> str:
    return uuid.lower().removeprefix("mig-").removeprefix("gpu-")


def _gpus(number: int) -> str:
    return {0: "no GPU", 1: "1 GPU"}.get(number, f"{number} GPUs")
