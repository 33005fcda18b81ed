"""A table of the GPUs of this machine, which joins the lists of NVML and torch by UUID."""

from dataclasses import asdict, dataclass

import torch

from autobatch.cli.reports import Fields
from autobatch.devices.cuda import TorchGpu, visible_gpus
from autobatch.devices.host_memory import host_memory
from autobatch.devices.nvml import NvmlGpu, NvmlSurvey, survey
from autobatch.units import format_bytes

HEADERS = ("GPU", "name", "in use", "by processes", "torch")


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """The GPUs and the host memory of this machine.

    Attributes:
        nvml: The GPUs that NVML lists.
        torch_gpus: The GPUs that torch can use.
        torch_build: The version of torch, and the platform that it was built for.
        host_total_bytes: The host memory that this process may use.
        host_free_bytes: The free part of ``host_total_bytes``.
    """

    nvml: NvmlSurvey
    torch_gpus: tuple[TorchGpu, ...]
    torch_build: str
    host_total_bytes: int
    host_free_bytes: int

    @property
    def lines(self) -> tuple[str, ...]:
        """The lines above the table: versions, numbers of GPUs, and a note if there is no GPU."""
        gpus, seen = len(self.nvml.gpus), len(self.torch_gpus)
        driver = f"driver {self.nvml.driver}" if self.nvml.driver else ""
        counted = _gpus(gpus) if gpus or not self.nvml.problem else ""
        nvml = ", ".join(filter(None, (driver, counted, self.nvml.problem)))
        lines = (f"NVML:  {nvml}", f"torch: {_gpus(seen)}, {self.torch_build}")
        if seen:
            return lines
        host = f"{format_bytes(self.host_free_bytes)} of {format_bytes(self.host_total_bytes)}"
        if gpus:
            return (*lines, f"torch cannot use a GPU: training runs on the CPU, with {host} free.")
        return (*lines, f"There is no GPU here. Training runs on the CPU, with {host} free.")

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """The rows of the table, one per GPU; GPUs that only torch lists come last."""
        by_uuid = {_bare(gpu.uuid): gpu for gpu in self.torch_gpus}
        rows = [_row(gpu, by_uuid.pop(_bare(gpu.uuid), None)) for gpu in self.nvml.gpus]
        return rows + [("-", gpu.name, "-", "-", _seen(gpu)) for gpu in by_uuid.values()]

    @property
    def fields(self) -> Fields:
        """All values, for JSON."""
        by_uuid = {_bare(gpu.uuid): gpu.device for gpu in self.torch_gpus}
        gpus = [
            asdict(gpu) | {"torch_device": by_uuid.get(_bare(gpu.uuid))} for gpu in self.nvml.gpus
        ]
        nvml = {"driver": self.nvml.driver, "problem": self.nvml.problem or None, "gpus": gpus}
        return {
            "nvml": nvml,
            "torch": {"build": self.torch_build, "gpus": [asdict(gpu) for gpu in self.torch_gpus]},
            "host": {"total_bytes": self.host_total_bytes, "free_bytes": self.host_free_bytes},
        }


def take_inventory() -> Inventory:
    """Return the GPUs and the host memory, without creating a CUDA context, which takes memory."""
    total, free = host_memory()
    version = torch.version
    platform = f"for CUDA {version.cuda}" if version.cuda else "without CUDA"
    return Inventory(
        nvml=survey(),
        torch_gpus=visible_gpus(),
        torch_build=(
            f"{torch.__version__} built {f'for ROCm {version.hip}' if version.hip else platform}"
        ),
        host_total_bytes=total,
        host_free_bytes=free,
    )


def _row(gpu: NvmlGpu, seen: TorchGpu | None) -> tuple[str, ...]:
    used = f"{_bytes(gpu.used_bytes)} of {_bytes(gpu.total_bytes)}"
    processes = "\n".join(f"{p.pid}: {_bytes(p.used_bytes)}" for p in gpu.processes)
    name = f"{gpu.name or 'unknown'}{' (MIG)' if gpu.mig else ''}"
    return (str(gpu.index), name, used, processes or "-", _seen(seen) if seen else "not seen")


def _seen(gpu: TorchGpu) -> str:
    return f"{gpu.device}, {format_bytes(gpu.total_bytes)}"


def _bytes(count: int | None) -> str:
    return "unknown" if count is None else format_bytes(count)


def _bare(uuid: str) -> str:
    return uuid.lower().removeprefix("mig-").removeprefix("gpu-")


def _gpus(number: int) -> str:
    return {0: "no GPU", 1: "1 GPU"}.get(number, f"{number} GPUs")
