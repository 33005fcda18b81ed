"""Each case twice: against a C library that the real pynvml loads, and against a fake module."""

import ctypes
import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import IO, Protocol

import pytest

from autobatch.devices import nvml
from autobatch.devices.nvml import NvmlGpu, NvmlProcess, NvmlSurvey

GIB = 1 << 30
NOT_AVAILABLE = (1 << 64) - 1
MODULE = Path(nvml.__file__)
STUB = Path(__file__).with_name("nvml_stub.c")

# NVML's codes for a refusal.
NOT_SUPPORTED, NO_PERMISSION, DRIVER_NOT_LOADED, FUNCTION_NOT_FOUND = 3, 4, 9, 13
GPU_IS_LOST, DRIVER_MISMATCH, STRUCTURE_MISMATCH, UNHEARD_OF = 15, 18, 25, 987


@dataclass(frozen=True, kw_only=True)
class Card:
    """What NVML shall say of a card or a slice."""

    uuid: str = "GPU-ffc79498-8ff3-c2dc-3b0d-fafd804516ae"
    name: str = "NVIDIA A100 80GB PCIe"
    total: int = 80 * GIB
    used: int = 5 * GIB
    reserved: int = GIB
    processes: tuple[tuple[int, int], ...] = ((4321, 3 * GIB), (4322, 2 * GIB))
    slices: tuple["Card", ...] = ()

    def __str__(self) -> str:
        processes = "|".join(f"{pid}:{used}" for pid, used in self.processes)
        facts = (self.uuid, self.name, self.total, self.used, self.reserved, processes)
        return ">".join([",".join(map(str, facts)), *map(str, self.slices)])


@dataclass(frozen=True, kw_only=True)
class Driver:
    """What NVML shall say; ``refused`` maps its functions to the codes they answer."""

    cards: tuple[Card, ...] = (Card(),)
    refused: Mapping[str, int] = field(default_factory=dict)
    growth: int = 0

    @property
    def environ(self) -> dict[str, str]:
        return {
            "NVML_STUB": ";".join(map(str, self.cards)),
            "NVML_STUB_FAIL": ",".join(f"{name}={code}" for name, code in self.refused.items()),
            "NVML_STUB_GROW": str(self.growth),
        }


class Machine(Protocol):
    """Something that NVML can be asked on."""

    @property
    def pid(self) -> int: ...
    @property
    def left_open(self) -> int: ...
    def survey(self, driver: Driver) -> NvmlSurvey: ...
    def by_uuid(self, driver: Driver, uuid: str) -> NvmlGpu | None: ...


class FakeNvml(ModuleType):
    """The part of pynvml that is used, in Python: no library, no compiler."""

    nvmlMemory_v2 = 0x02000028  # noqa: N815 - pynvml's name

    class NVMLError(Exception):
        def __init__(self, value: int) -> None:
            super().__init__(value)
            self.value = value

        def __str__(self) -> str:
            return f"NVML Error with code {self.value}"

        __hash__ = None  # type: ignore[assignment]  # As in pynvml.

    def __init__(self, driver: Driver) -> None:
        super().__init__("pynvml")
        self.driver = driver
        self.opened = 0
        self.readings = 0

    def allow(self, function: str) -> None:
        if code := self.driver.refused.get(function, 0 if self.opened else 1):
            raise self.NVMLError(code)

    def nvmlInit(self) -> None:  # noqa: N802 - pynvml's name, as are the following
        self.opened += 1
        try:
            self.allow("nvmlInitWithFlags")
        except self.NVMLError:
            self.opened -= 1
            raise

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.allow("nvmlShutdown")
        self.opened -= 1

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        self.allow("nvmlSystemGetDriverVersion")
        return "555.42.02"

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        self.allow("nvmlDeviceGetCount_v2")
        return len(self.driver.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Card:  # noqa: N802
        self.allow("nvmlDeviceGetHandleByIndex_v2")
        return self.driver.cards[index]

    def nvmlDeviceGetUUID(self, card: Card) -> str:  # noqa: N802
        self.allow("nvmlDeviceGetUUID")
        return card.uuid

    def nvmlDeviceGetName(self, card: Card) -> str:  # noqa: N802
        self.allow("nvmlDeviceGetName")
        return os.fsencode(card.name).decode()

    def nvmlDeviceGetMigMode(self, card: Card) -> list[int]:  # noqa: N802
        self.allow("nvmlDeviceGetMigMode")
        return [int(bool(card.slices) or card.uuid.startswith("MIG-"))] * 2

    def nvmlDeviceGetMaxMigDeviceCount(self, card: Card) -> int:  # noqa: N802
        self.allow("nvmlDeviceGetMaxMigDeviceCount")
        return 7 if card.slices else 0

    def nvmlDeviceGetMigDeviceHandleByIndex(self, card: Card, place: int) -> Card:  # noqa: N802
        self.allow("nvmlDeviceGetMigDeviceHandleByIndex")
        if place >= len(card.slices):
            raise self.NVMLError(6)
        return card.slices[place]

    def nvmlDeviceGetMemoryInfo(self, card: Card, version: int = 0) -> SimpleNamespace:  # noqa: N802
        self.allow("nvmlDeviceGetMemoryInfo_v2" if version else "nvmlDeviceGetMemoryInfo")
        used = card.used + self.driver.growth * self.readings
        self.readings += 1
        if version:
            return SimpleNamespace(total=card.total, used=used, reserved=card.reserved)
        return SimpleNamespace(total=card.total, used=used + card.reserved)

    def nvmlDeviceGetComputeRunningProcesses(self, card: Card) -> list[SimpleNamespace]:  # noqa: N802
        self.allow("nvmlDeviceGetComputeRunningProcesses_v3")
        return [
            SimpleNamespace(pid=pid, usedGpuMemory=None if used == NOT_AVAILABLE else used)
            for pid, used in card.processes
        ]


class FakeMachine:
    """This process, with the fake in place of pynvml."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self._fake: FakeNvml | None = None
        self.pid = os.getpid()

    @property
    def left_open(self) -> int:
        return self._fake.opened if self._fake else 0

    def install(self, driver: Driver) -> FakeNvml:
        if self._fake is None or self._fake.driver != driver:
            self._fake = FakeNvml(driver)
        self._monkeypatch.setitem(sys.modules, "pynvml", self._fake)
        return self._fake

    def survey(self, driver: Driver) -> NvmlSurvey:
        self.install(driver)
        return nvml.survey()

    def by_uuid(self, driver: Driver, uuid: str) -> NvmlGpu | None:
        self.install(driver)
        return nvml.by_uuid(uuid)


# Loads the module from its file alone: importing the package would import torch, every time.
ALONE = """
import dataclasses, importlib.util, json, os, sys
spec = importlib.util.spec_from_file_location("nvml", sys.argv[1])
nvml = sys.modules["nvml"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(nvml)
"""
ANSWER = """
for line in sys.stdin:
    environ, uuid = json.loads(line)
    os.environ.update(environ)
    gpu = None if uuid is None else nvml.by_uuid(uuid)
    found = nvml.NvmlSurvey(gpus=(gpu,) if gpu else ()) if uuid is not None else nvml.survey()
    from pynvml import _nvmlLib_refcount
    print(json.dumps([dataclasses.asdict(found), _nvmlLib_refcount]), flush=True)
"""


class LibraryMachine:
    """Another process, in which the real pynvml loads the library made from ``nvml_stub.c``."""

    def __init__(self, process: "subprocess.Popen[str]", to: IO[str], back: IO[str]) -> None:
        self.pid = process.pid
        self.left_open = 0
        self._to, self._back = to, back

    def survey(self, driver: Driver) -> NvmlSurvey:
        return self._ask(driver, None)

    def by_uuid(self, driver: Driver, uuid: str) -> NvmlGpu | None:
        return next(iter(self._ask(driver, uuid).gpus), None)

    def _ask(self, driver: Driver, uuid: str | None) -> NvmlSurvey:
        print(json.dumps([driver.environ, uuid]), file=self._to, flush=True)
        found, self.left_open = json.loads(self._back.readline())
        gpus = [
            NvmlGpu(**{**gpu, "processes": tuple(NvmlProcess(**p) for p in gpu["processes"])})
            for gpu in found["gpus"]
        ]
        return NvmlSurvey(**{**found, "gpus": tuple(gpus)})


def run_alone(code: str, library_path: Path) -> "subprocess.Popen[str]":
    """Python with every warning an error, which finds its libraries in ``library_path`` first."""
    paths = os.pathsep.join(filter(None, (str(library_path), os.environ.get("LD_LIBRARY_PATH"))))
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", ALONE + code, str(MODULE)],
        env={**os.environ, "LD_LIBRARY_PATH": paths, "PYTHONUTF8": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """The folder of the stub, or None where it cannot be made: the fake then stands alone."""
    compiler = shutil.which("cc") if sys.platform == "linux" else None
    if compiler is None:
        return None
    folder = tmp_path_factory.mktemp("nvml")
    options = ["-shared", "-fPIC", "-o", str(folder / "libnvidia-ml.so.1")]
    subprocess.run([compiler, *options, str(STUB)], check=True)
    return folder


@pytest.fixture(scope="session")
def library_machine(library: Path | None) -> Iterator[LibraryMachine | None]:
    if library is None:
        yield None
        return
    with run_alone(ANSWER, library) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield LibraryMachine(process, process.stdin, process.stdout)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    return FakeMachine(monkeypatch)


@pytest.fixture(params=["library", "fake"])
def machine(
    request: pytest.FixtureRequest, fake: FakeMachine, library_machine: LibraryMachine | None
) -> Iterator[Machine]:
    if request.param == "library" and library_machine is None:
        pytest.skip("no C compiler: the fake covers the same cases")
    chosen: Machine = fake if request.param == "fake" or not library_machine else library_machine
    yield chosen
    assert chosen.left_open == 0, "init and shutdown were not paired"


GPU = NvmlGpu(
    index=0,
    uuid="GPU-ffc79498-8ff3-c2dc-3b0d-fafd804516ae",
    name="NVIDIA A100 80GB PCIe",
    total_bytes=80 * GIB,
    used_bytes=5 * GIB,
    reserved_bytes=GIB,
    processes=(
        NvmlProcess(pid=4321, used_bytes=3 * GIB),
        NvmlProcess(pid=4322, used_bytes=2 * GIB),
    ),
)


def only(survey: NvmlSurvey) -> NvmlGpu:
    (gpu,) = survey.gpus
    assert survey.problem == ""
    return gpu


def test_every_fact_is_read(machine: Machine) -> None:
    assert machine.survey(Driver()) == NvmlSurvey(driver="555.42.02", gpus=(GPU,))


def test_a_driver_without_gpus_is_no_problem(machine: Machine) -> None:
    assert machine.survey(Driver(cards=())) == NvmlSurvey(driver="555.42.02")


@pytest.mark.parametrize(
    "code", [NO_PERMISSION, DRIVER_NOT_LOADED, DRIVER_MISMATCH, UNHEARD_OF], ids=str
)
def test_an_nvml_that_will_not_start_is_a_problem_and_no_error(machine: Machine, code: int) -> None:
    driver = Driver(refused={"nvmlInitWithFlags": code})
    found = machine.survey(driver)
    assert found == NvmlSurvey(problem=found.problem)
    assert found.problem.startswith("not available: ")
    assert machine.by_uuid(driver, GPU.uuid) is None


WITHOUT: dict[tuple[str, ...], NvmlGpu] = {
    ("nvmlDeviceGetUUID",): replace(GPU, uuid=""),
    ("nvmlDeviceGetName",): replace(GPU, name=""),
    ("nvmlDeviceGetMemoryInfo_v2", "nvmlDeviceGetMemoryInfo"): replace(
        GPU, total_bytes=None, used_bytes=None, reserved_bytes=None
    ),
    # Version 1 counts what is reserved as used.
    ("nvmlDeviceGetMemoryInfo_v2",): replace(GPU, used_bytes=6 * GIB, reserved_bytes=None),
    ("nvmlDeviceGetMemoryInfo",): GPU,
    ("nvmlDeviceGetComputeRunningProcesses_v3",): replace(GPU, processes=()),
    ("nvmlDeviceGetMigMode",): GPU,
    ("nvmlDeviceGetMaxMigDeviceCount",): GPU,
    ("nvmlDeviceGetMigDeviceHandleByIndex",): GPU,
}


@pytest.mark.parametrize(
    "code",
    [NOT_SUPPORTED, NO_PERMISSION, FUNCTION_NOT_FOUND, GPU_IS_LOST, STRUCTURE_MISMATCH, UNHEARD_OF],
)
@pytest.mark.parametrize("functions", WITHOUT, ids="+".join)
def test_a_refusal_makes_only_its_own_fact_unknown(
    machine: Machine, functions: tuple[str, ...], code: int
) -> None:
    found = machine.survey(Driver(refused=dict.fromkeys(functions, code)))
    assert found == NvmlSurvey(driver="555.42.02", gpus=(WITHOUT[functions],))


def test_a_driver_that_hides_its_version_still_shows_its_gpus(machine: Machine) -> None:
    found = machine.survey(Driver(refused={"nvmlSystemGetDriverVersion": NOT_SUPPORTED}))
    assert found == NvmlSurvey(driver=None, gpus=(GPU,))


def test_gpus_that_cannot_be_counted_are_a_problem(machine: Machine) -> None:
    found = machine.survey(Driver(refused={"nvmlDeviceGetCount_v2": NO_PERMISSION}))
    assert found.gpus == ()
    assert "counted" in found.problem


def test_gpus_that_cannot_be_reached_are_named(machine: Machine) -> None:
    two = (Card(), Card(uuid="GPU-2"))
    found = machine.survey(
        Driver(cards=two, refused={"nvmlDeviceGetHandleByIndex_v2": GPU_IS_LOST})
    )
    assert found.gpus == ()
    assert found.problem.endswith("GPU 0, 1")


@pytest.mark.parametrize(
    ("card", "unknown"),
    [
        (Card(total=NOT_AVAILABLE), ("total_bytes",)),
        (Card(used=NOT_AVAILABLE), ("used_bytes",)),
        (Card(reserved=NOT_AVAILABLE), ("reserved_bytes",)),
        (Card(total=NOT_AVAILABLE, used=NOT_AVAILABLE), ("total_bytes", "used_bytes")),
        (Card(total=0, used=0, reserved=0), ("total_bytes",)),
        (Card(used=NOT_AVAILABLE - 4095), ("used_bytes",)),  # -4096 read as unsigned.
        (Card(used=80 * GIB + 1), ("used_bytes",)),
        (Card(reserved=80 * GIB + 1), ("reserved_bytes",)),
        (Card(used=80 * GIB, reserved=0), ()),
    ],
    ids=str,
)
def test_what_cannot_be_true_is_unknown(
    machine: Machine, card: Card, unknown: tuple[str, ...]
) -> None:
    gpu = only(machine.survey(Driver(cards=(card,))))
    facts = {
        "total_bytes": (gpu.total_bytes, card.total),
        "used_bytes": (gpu.used_bytes, card.used),
        "reserved_bytes": (gpu.reserved_bytes, card.reserved),
    }
    expected = {name: None if name in unknown else said for name, (_, said) in facts.items()}
    assert {name: known for name, (known, _) in facts.items()} == expected


def test_a_process_may_hide_what_it_holds(machine: Machine) -> None:
    card = Card(processes=((7, NOT_AVAILABLE), (8, GIB)))
    assert only(machine.survey(Driver(cards=(card,)))).processes == (
        NvmlProcess(pid=7, used_bytes=None),
        NvmlProcess(pid=8, used_bytes=GIB),
    )


def test_our_own_process_is_not_among_the_others(machine: Machine) -> None:
    card = Card(processes=((machine.pid, GIB), (machine.pid + 1, GIB)))
    (other,) = only(machine.survey(Driver(cards=(card,)))).processes
    assert other.pid == machine.pid + 1


def test_a_card_without_processes_has_none(machine: Machine) -> None:
    assert only(machine.survey(Driver(cards=(Card(processes=()),)))).processes == ()


def test_a_name_that_is_no_utf8_is_unknown(machine: Machine) -> None:
    gpu = only(machine.survey(Driver(cards=(Card(name="NVIDIA \udcff"),))))
    assert gpu == replace(GPU, name="")


def test_memory_is_read_anew_each_time(machine: Machine) -> None:
    driver = Driver(growth=GIB)
    used = [only(machine.survey(driver)).used_bytes for _ in range(3)]
    assert None not in used
    assert [later - first for first, later in pairwise(filter(None, used))] == [GIB, GIB]


FIRST, SECOND = "GPU-" + "a1" * 16, "GPU-" + "B2" * 16
SLICES = (
    Card(uuid="MIG-" + "c3" * 16, name="NVIDIA A100 MIG 1g.10gb", total=10 * GIB, used=GIB),
    Card(uuid="MIG-" + "d4" * 16, name="NVIDIA A100 MIG 2g.20gb", total=20 * GIB, used=2 * GIB),
)
CUT = Card(uuid=SECOND, slices=SLICES)


@pytest.mark.parametrize("cards", [(FIRST, SECOND), (SECOND, FIRST)], ids=["1,2", "2,1"])
def test_a_gpu_is_joined_by_uuid_whatever_its_index(
    machine: Machine, cards: tuple[str, str]
) -> None:
    sizes = {FIRST: 24 * GIB, SECOND: 80 * GIB}
    driver = Driver(cards=tuple(Card(uuid=card, total=sizes[card]) for card in cards))
    for card, size in sizes.items():
        gpu = machine.by_uuid(driver, card)
        assert gpu is not None
        assert (gpu.uuid, gpu.total_bytes, gpu.index) == (card, size, cards.index(card))


@pytest.mark.parametrize("change", [str, str.upper, str.lower, str.swapcase])
@pytest.mark.parametrize("prefix", ["", "GPU-", "MIG-", " "])
def test_prefix_and_case_of_a_uuid_do_not_matter(
    machine: Machine, prefix: str, change: Callable[[str], str]
) -> None:
    asked = change(prefix + SECOND.removeprefix("GPU-"))
    gpu = machine.by_uuid(Driver(cards=(Card(uuid=FIRST), Card(uuid=SECOND))), asked)
    assert gpu is not None
    assert gpu.uuid == SECOND


@pytest.mark.parametrize("asked", ["", "GPU-", "0", "None", "GPU-" + "e5" * 16, FIRST[:-1]])
def test_no_match_is_none(machine: Machine, asked: str) -> None:
    assert machine.by_uuid(Driver(cards=(Card(uuid=FIRST), CUT)), asked) is None


@pytest.mark.parametrize("asked", ["", "GPU-", FIRST])
def test_a_gpu_without_uuid_matches_nothing(machine: Machine, asked: str) -> None:
    assert machine.by_uuid(Driver(refused={"nvmlDeviceGetUUID": NOT_SUPPORTED}), asked) is None


def test_a_card_cut_by_mig_is_replaced_by_its_slices(machine: Machine) -> None:
    found = machine.survey(Driver(cards=(Card(uuid=FIRST), CUT)))
    facts = [(gpu.index, gpu.uuid, gpu.total_bytes, gpu.used_bytes, gpu.mig) for gpu in found.gpus]
    assert facts == [
        (0, FIRST, 80 * GIB, 5 * GIB, False),
        (1, SLICES[0].uuid, 10 * GIB, GIB, True),
        (1, SLICES[1].uuid, 20 * GIB, 2 * GIB, True),
    ]


def test_a_slice_is_joined_by_its_own_uuid(machine: Machine) -> None:
    driver = Driver(cards=(Card(uuid=FIRST), CUT))
    gpu = machine.by_uuid(driver, SLICES[1].uuid.removeprefix("MIG-"))
    assert gpu is not None
    assert (gpu.name, gpu.total_bytes) == (SLICES[1].name, 20 * GIB)
    assert machine.by_uuid(driver, SECOND) is None, "the whole card is nobody's"


@pytest.mark.parametrize(
    "refused", ["nvmlDeviceGetMaxMigDeviceCount", "nvmlDeviceGetMigDeviceHandleByIndex"]
)
def test_the_memory_of_a_card_whose_slices_are_hidden_is_unknown(
    machine: Machine, refused: str
) -> None:
    gpu = only(machine.survey(Driver(cards=(CUT,), refused={refused: NO_PERMISSION})))
    assert (gpu.uuid, gpu.mig) == (SECOND, True)
    assert (gpu.total_bytes, gpu.used_bytes, gpu.reserved_bytes) == (None, None, None)


def test_a_slice_without_uuid_is_a_slice_nevertheless(machine: Machine) -> None:
    found = machine.survey(Driver(cards=(CUT,), refused={"nvmlDeviceGetUUID": NOT_SUPPORTED}))
    assert [(gpu.uuid, gpu.mig, gpu.total_bytes) for gpu in found.gpus] == [
        ("", True, 10 * GIB),
        ("", True, 20 * GIB),
    ]


def test_a_slice_shown_as_a_card_keeps_its_memory(machine: Machine) -> None:
    gpu = only(machine.survey(Driver(cards=(SLICES[0],))))
    assert (gpu.mig, gpu.total_bytes, gpu.used_bytes) == (True, 10 * GIB, GIB)


def test_a_slice_as_old_drivers_name_it_is_joined(machine: Machine) -> None:
    old = Card(uuid=f"MIG-{FIRST}/1/0")
    assert machine.by_uuid(Driver(cards=(old,)), f"MIG-{FIRST}/1/0") is not None
    assert machine.by_uuid(Driver(cards=(old,)), FIRST) is None


# From here on: what only other bindings, or none, could answer.


def test_a_uuid_need_not_be_text(fake: FakeMachine) -> None:
    own = uuid.UUID(GPU.uuid.removeprefix("GPU-"))
    fake.install(Driver())
    assert nvml.by_uuid(own) == GPU


def test_without_bindings_there_is_a_problem_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert nvml.survey().problem.startswith("not available: ")
    assert nvml.by_uuid(GPU.uuid) is None


def test_bindings_that_are_something_else_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", ModuleType("pynvml"))
    assert nvml.survey().problem.startswith("not available: ")


def test_a_refused_shutdown_spoils_nothing(fake: FakeMachine) -> None:
    assert only(fake.survey(Driver(refused={"nvmlShutdown": UNHEARD_OF}))) == GPU


def test_nvml_is_shut_down_when_the_user_interrupts(
    fake: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: Card) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(fake.install(Driver()), "nvmlDeviceGetName", interrupt, raising=False)
    with pytest.raises(KeyboardInterrupt):
        nvml.survey()
    assert fake.left_open == 0


@pytest.mark.parametrize("count", [None, -1, 1 << 10, 0xFFFFFFFF, "2", 2.0, True], ids=repr)
def test_a_count_that_is_none_is_a_problem(
    fake: FakeMachine, monkeypatch: pytest.MonkeyPatch, count: object
) -> None:
    monkeypatch.setattr(fake.install(Driver()), "nvmlDeviceGetCount", lambda: count, raising=False)
    found = nvml.survey()
    assert (found.gpus, "counted" in found.problem) == ((), True)


@pytest.mark.parametrize("value", [None, -1, 1.5, "80 GiB", True, 1 << 50], ids=repr)
def test_memory_that_is_no_count_of_bytes_is_unknown(
    fake: FakeMachine, monkeypatch: pytest.MonkeyPatch, value: object
) -> None:
    said = SimpleNamespace(total=value, used=value, reserved=value)
    module = fake.install(Driver())
    monkeypatch.setattr(module, "nvmlDeviceGetMemoryInfo", lambda *_, **__: said, raising=False)
    gpu = only(nvml.survey())
    assert (gpu.total_bytes, gpu.used_bytes, gpu.reserved_bytes) == (None, None, None)


def test_old_bindings_without_version_2_are_asked_for_version_1(
    fake: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version_1(card: Card) -> SimpleNamespace:
        return SimpleNamespace(total=card.total, used=card.used)

    module = fake.install(Driver())
    monkeypatch.setattr(module, "nvmlDeviceGetMemoryInfo", version_1, raising=False)
    assert only(nvml.survey()) == replace(GPU, reserved_bytes=None)


def test_old_bindings_answer_in_bytes(fake: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    module = fake.install(Driver())
    monkeypatch.setattr(module, "nvmlDeviceGetName", lambda _: b"Tesla \xff", raising=False)
    monkeypatch.setattr(module, "nvmlDeviceGetUUID", lambda card: card.uuid.encode(), raising=False)
    gpu = nvml.by_uuid(GPU.uuid)
    assert gpu == replace(GPU, name="Tesla \ufffd")


@pytest.mark.parametrize("rows", [None, 3, [None], [SimpleNamespace(pid="7", usedGpuMemory=1)]])
def test_processes_that_make_no_sense_are_left_out(
    fake: FakeMachine, monkeypatch: pytest.MonkeyPatch, rows: object
) -> None:
    module = fake.install(Driver())
    name = "nvmlDeviceGetComputeRunningProcesses"
    monkeypatch.setattr(module, name, lambda _: rows, raising=False)
    assert only(nvml.survey()) == replace(GPU, processes=())


@pytest.mark.parametrize(
    "error",
    [OSError("access violation"), ctypes.ArgumentError("argument 1"), AttributeError("no such")],
)
def test_a_call_that_ctypes_cannot_make_is_a_refusal(
    fake: FakeMachine, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(fake.install(Driver()), "nvmlDeviceGetName", fail, raising=False)
    assert only(nvml.survey()) == replace(GPU, name="")


def test_a_library_that_cannot_be_loaded_is_a_problem_and_no_error(tmp_path: Path) -> None:
    (tmp_path / "libnvidia-ml.so.1").write_bytes(b"")  # Found first, also where a real one is.
    with run_alone("print(nvml.survey().problem, nvml.by_uuid('GPU-1'))", tmp_path) as process:
        said, _ = process.communicate()
    assert process.returncode == 0
    assert said == "not available: NVML Shared Library Not Found None\n"


def test_importing_the_module_imports_no_bindings(tmp_path: Path) -> None:
    with run_alone("print('pynvml' in sys.modules)", tmp_path) as process:
        said, _ = process.communicate()
    assert (process.returncode, said) == (0, "False\n")


def test_the_bindings_give_no_warning(tmp_path: Path) -> None:
    code = "nvml.survey(); print('pynvml' in sys.modules)"  # Any warning is an error there.
    with run_alone(code, tmp_path) as process:
        said, _ = process.communicate()
    assert (process.returncode, said) == (0, "True\n")


def test_the_check_for_warnings_can_fail(tmp_path: Path) -> None:
    code = "import warnings; warnings.warn('The pynvml package is deprecated.', FutureWarning)"
    with run_alone(code + "; print('not reached')", tmp_path) as process:
        said, _ = process.communicate()
    assert (process.returncode, said) == (1, "")
