import json

import pytest
import torch

from autobatch.cli import device_table, main
from autobatch.cli.device_table import Inventory, take_inventory
from autobatch.devices.cuda import TorchGpu
from autobatch.devices.nvml import NvmlGpu, NvmlProcess, NvmlSurvey

GIB = 2**30
ONE, TWO = (
    NvmlGpu(
        index=index,
        uuid=f"GPU-00000000-0000-0000-0000-00000000000{index}",
        name="NVIDIA H200",
        total_bytes=140 * GIB,
        used_bytes=2 * GIB,
        reserved_bytes=GIB,
        processes=(NvmlProcess(pid=41, used_bytes=GIB), NvmlProcess(pid=42, used_bytes=None)),
    )
    for index in (0, 1)
)


def machine(nvml: NvmlSurvey, *torch_gpus: TorchGpu) -> Inventory:
    return Inventory(
        nvml=nvml,
        torch_gpus=torch_gpus,
        torch_build="2.13.0 built for CUDA 13.0",
        host_total_bytes=8 * GIB,
        host_free_bytes=4 * GIB,
    )


def seen(device: str, gpu: NvmlGpu) -> TorchGpu:
    return TorchGpu(
        device=device, uuid=gpu.uuid.removeprefix("GPU-"), name=gpu.name, total_bytes=139 * GIB
    )


def test_gpus_are_joined_by_uuid_and_not_by_number() -> None:
    """As with CUDA_VISIBLE_DEVICES=1: torch's first is NVML's second."""
    both = machine(NvmlSurvey(driver="580.1", gpus=(ONE, TWO)), seen("cuda:0", TWO))
    assert [(row[0], row[-1]) for row in both.rows] == [
        ("0", "not seen"),
        ("1", "cuda:0, 139.0 GiB"),
    ]
    assert both.rows[0][2:4] == ("2.0 GiB of 140.0 GiB", "41: 1.0 GiB\n42: unknown")
    assert both.lines == (
        "NVML:  driver 580.1, 2 GPUs",
        "torch: 1 GPU, 2.13.0 built for CUDA 13.0",
    )


def test_a_gpu_that_only_torch_sees_has_its_row() -> None:
    alone = machine(NvmlSurvey(problem="not available: refused"), seen("cuda:0", ONE))
    assert alone.rows == [("-", "NVIDIA H200", "-", "-", "cuda:0, 139.0 GiB")]
    assert alone.lines[0] == "NVML:  not available: refused"


def test_no_gpu_is_said_plainly() -> None:
    nothing = machine(NvmlSurvey(problem="not available: no library"))
    assert nothing.rows == []
    assert nothing.lines[-1] == (
        "There is no GPU here. Training runs on the CPU, with 4.0 GiB of 8.0 GiB free."
    )


def test_a_gpu_that_torch_cannot_use_is_said_plainly() -> None:
    unused = machine(NvmlSurvey(driver="580.1", gpus=(ONE,)))
    assert unused.lines[-1].startswith("torch cannot use a GPU: training runs on the CPU")


def test_unknown_memory_and_slices_are_shown_as_such() -> None:
    cut = NvmlGpu(
        index=0, uuid="", name="", total_bytes=None, used_bytes=None, reserved_bytes=None, mig=True
    )
    row = machine(NvmlSurvey(driver="580.1", gpus=(cut,))).rows[0]
    assert row == ("0", "unknown (MIG)", "unknown of unknown", "-", "not seen")


def test_json_has_both_views_and_their_join() -> None:
    both = machine(NvmlSurvey(driver="580.1", gpus=(ONE, TWO)), seen("cuda:0", TWO))
    fields = json.loads(json.dumps(both.fields, allow_nan=False))
    assert [gpu["torch_device"] for gpu in fields["nvml"]["gpus"]] == [None, "cuda:0"]
    assert fields["torch"]["gpus"][0]["total_bytes"] == 139 * GIB
    assert fields["nvml"]["gpus"][0]["processes"][1] == {"pid": 42, "used_bytes": None}


def test_this_machine_is_described_without_touching_a_gpu() -> None:
    here = take_inventory()
    assert 0 < here.host_free_bytes <= here.host_total_bytes
    assert len(here.torch_gpus) == torch.cuda.device_count()
    assert torch.__version__ in here.torch_build


def test_the_command_shows_the_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    both = machine(NvmlSurvey(driver="580.1", gpus=(ONE, TWO)), seen("cuda:0", TWO))
    monkeypatch.setattr(device_table, "take_inventory", lambda: both)
    assert main(["devices"]) == 0
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[3].split("   ")[0] == device_table.HEADERS[0]
    assert lines[6] == (
        "1     NVIDIA H200   2.0 GiB of 140.0 GiB   41: 1.0 GiB    cuda:0, 139.0 GiB"
    )
    assert main(["devices", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["nvml"]["driver"] == "580.1"
