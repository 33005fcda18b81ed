"""Control groups as the kernel lays them out, in a folder of our own."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autobatch.devices.host_memory import host_memory

TOTAL, AVAILABLE = 1_000_000, 600_000  # The machine's.
UNLIMITED_V1 = 9_223_372_036_854_771_712

Group = Callable[..., None]
Read = Callable[[str], tuple[int, int]]


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SimpleNamespace(total=TOTAL, available=AVAILABLE)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


@pytest.fixture
def group(tmp_path: Path) -> Group:
    """Makes a group of version 2."""

    def make(
        path: str, limit: object, used: object = 0, stat: str = "anon 5\ninactive_file 0\n"
    ) -> None:
        folder = tmp_path / "cgroup" / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(stat)

    return make


@pytest.fixture
def group_v1(tmp_path: Path) -> Group:
    def make(path: str, limit: object, used: object = 0, stat: str = "") -> None:
        folder = tmp_path / "cgroup" / "memory" / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
        (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(stat)

    return make


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Reads the host as a process with this membership sees it."""

    def memory_of(membership: str) -> tuple[int, int]:
        file = tmp_path / "self"
        file.write_text(membership)
        return host_memory(tmp_path / "cgroup", file)

    return memory_of


def test_without_groups_it_is_the_machine(tmp_path: Path, read: Read) -> None:
    assert host_memory(tmp_path / "none", tmp_path / "nothing") == (TOTAL, AVAILABLE)
    assert read("") == read("0::/\n") == read("0::/user/job\n") == (TOTAL, AVAILABLE)


def test_a_group_allows_its_limit_less_what_it_uses(group: Group, read: Read) -> None:
    group("job", 500_000, used=120_000)
    assert read("0::/job\n") == (500_000, 380_000)


def test_cache_that_can_be_dropped_is_available(group: Group, read: Read) -> None:
    stat = "anon 20000\nfile 90000\ninactive_anon 7\ninactive_file 80000\nactive_file 10000\n"
    group("job", 500_000, used=120_000, stat=stat)
    assert read("0::/job\n") == (500_000, 460_000)


def test_a_group_that_says_max_has_no_limit(group: Group, read: Read) -> None:
    group("job", "max", used=120_000)
    assert read("0::/job\n") == (TOTAL, AVAILABLE)


@pytest.mark.parametrize("where", ["", "a", "a/b", "a/b/c"])
def test_any_ancestor_may_hold_the_smaller_limit(group: Group, read: Read, where: str) -> None:
    for path in ("", "a", "a/b", "a/b/c"):
        group(path, "max" if path != where else 300_000, used=100_000)
    assert read("0::/a/b/c\n") == (300_000, 200_000)


def test_the_tightest_of_several_limits_counts_for_each_figure(group: Group, read: Read) -> None:
    group("a", 400_000, used=390_000)  # Others in the same parent use nearly all of it.
    group("a/b", 300_000, used=100_000)
    assert read("0::/a/b\n") == (300_000, 10_000)


def test_groups_of_other_processes_do_not_count(group: Group, read: Read) -> None:
    group("mine", 400_000)
    group("mine/child", 1_000)
    group("other", 1_000)
    assert read("0::/mine\n")[0] == 400_000


def test_a_container_sees_its_own_group_as_the_root(group: Group, read: Read) -> None:
    group("", 250_000, used=50_000)
    assert read("0::/\n") == (250_000, 200_000)


def test_version_one_has_its_memory_in_a_folder_of_its_own(group_v1: Group, read: Read) -> None:
    stat = "cache 9\ninactive_file 1\ntotal_inactive_file 30000\n"
    group_v1("docker/abc", 500_000, used=100_000, stat=stat)
    membership = "12:cpu,cpuacct:/docker/abc\n5:memory:/docker/abc\n1:name=systemd:/docker/abc\n"
    assert read(membership) == (500_000, 430_000)


def test_version_one_without_a_limit_says_a_huge_number(group_v1: Group, read: Read) -> None:
    group_v1("", UNLIMITED_V1, used=100_000)
    group_v1("docker/abc", UNLIMITED_V1, used=100_000)
    assert read("5:memory:/docker/abc\n") == (TOTAL, AVAILABLE)


def test_version_one_in_a_container_finds_the_limit_at_the_root(
    group_v1: Group, read: Read
) -> None:
    """The path is the host's, which is not to be seen from inside."""
    group_v1("", 200_000, used=50_000)
    assert read("5:memory:/docker/abc\n") == (200_000, 150_000)


def test_both_versions_at_once_count_both(group: Group, group_v1: Group, read: Read) -> None:
    group("new", 500_000)
    group_v1("old", 400_000, used=100_000)
    assert read("5:memory:/old\n0::/new\n") == (400_000, 300_000)
    assert read("5:cpu,memory:/old\n") == (400_000, 300_000)
    assert read("5:cpu:/old\n") == (TOTAL, AVAILABLE)


def test_a_group_cannot_use_more_than_the_machine_has_left(group: Group, read: Read) -> None:
    group("job", 900_000, used=0)
    assert read("0::/job\n") == (900_000, AVAILABLE)


def test_a_group_beyond_its_limit_has_nothing_left(group: Group, read: Read) -> None:
    group("job", 300_000, used=350_000)
    assert read("0::/job\n") == (300_000, 0)


def test_more_droppable_cache_than_use_is_no_gift(group: Group, read: Read) -> None:
    group("job", 300_000, used=10_000, stat="inactive_file 50000\n")
    assert read("0::/job\n") == (300_000, 300_000)


def test_a_limit_of_zero_is_a_limit(group: Group, read: Read) -> None:
    group("job", 0)
    assert read("0::/job\n") == (0, 0)


@pytest.mark.parametrize("missing", ["memory.max", "memory.current", "memory.stat"])
def test_a_file_that_is_missing_is_no_error(
    group: Group, read: Read, tmp_path: Path, missing: str
) -> None:
    group("job", 500_000, used=100_000, stat="inactive_file 50000\n")
    (tmp_path / "cgroup" / "job" / missing).unlink()
    left = {
        "memory.max": (TOTAL, AVAILABLE),
        "memory.current": (500_000, 500_000),
        "memory.stat": (500_000, 400_000),
    }
    assert read("0::/job\n") == left[missing]


@pytest.mark.parametrize("membership", ["nonsense", "0:", "::", ":::", "0::", "\n\n", "5:memory"])
def test_a_membership_that_cannot_be_read_is_no_error(read: Read, membership: str) -> None:
    assert read(membership) == (TOTAL, AVAILABLE)


@pytest.mark.parametrize("stat", ["", "inactive_file", "inactive_file 5 6", "a b\n\n"])
def test_a_stat_without_the_line_drops_nothing(group: Group, read: Read, stat: str) -> None:
    group("job", 500_000, used=100_000, stat=stat)
    assert read("0::/job\n") == (500_000, 400_000)


@settings(
    deadline=None,
    max_examples=60,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    limits=st.lists(st.one_of(st.just("max"), st.integers(0, 3 * TOTAL)), min_size=1, max_size=3),
    used=st.integers(0, 2 * TOTAL),
    cache=st.integers(0, 2 * TOTAL),
)
def test_never_more_than_the_machine_and_never_less_than_nothing(
    group: Group, read: Read, limits: list[object], used: int, cache: int
) -> None:
    for depth, limit in enumerate(limits):
        group("/".join("abc"[: depth + 1]), limit, used, f"inactive_file {cache}\n")
    total, available = read("0::/" + "/".join("abc"[: len(limits)]) + "\n")
    assert 0 <= total <= TOTAL
    assert 0 <= available <= min(total, AVAILABLE)
    assert total == min([TOTAL, *(limit for limit in limits if isinstance(limit, int))])


def test_the_real_host_has_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    total, available = host_memory()
    assert 0 <= available <= total <= psutil.virtual_memory().total
    assert total > 0
