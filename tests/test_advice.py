"""What is said of a search's memory beside its numbers."""

from types import SimpleNamespace

import pytest
import torch
from test_demo import RESULT

from autobatch import advice as module
from autobatch.advice import advice, torn
from autobatch.compat import platform
from autobatch.results import SearchResult, Trial

GIB = 2**30
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def searched(peak: int = GIB, reserved: int | None = GIB) -> SearchResult:
    chosen = Trial(size=43, fits=True, peak_bytes=peak, reserved_bytes=reserved)
    larger = Trial(size=52, fits=False, reserved_bytes=100 * GIB)
    return SearchResult(
        size=43,
        trials=(chosen, larger),
        ceiling=256,
        limit_bytes=4 * GIB,
        limited_by="memory",
        upper=RESULT.search.upper,
    )


@pytest.fixture(autouse=True)
def _on_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "spilling_platform", lambda: "")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)


def test_where_nothing_is_odd_nothing_is_said() -> None:
    assert list(advice(CUDA, searched())) == []
    assert list(advice(CPU, searched(GIB, None))) == []


def test_cudnn_choosing_anew_at_each_size_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """USERS 1.3.8: four examples fit and three do not."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    (note,) = advice(CUDA, searched())
    assert note.startswith("cudnn.benchmark is on")
    assert list(advice(CPU, searched())) == [], "there is no cuDNN"


@pytest.mark.parametrize("where", ["Windows", "WSL"])
def test_a_driver_that_spills_to_the_host_is_said(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """USERS 1.7.1 and 4.6; nor is a setting suggested that does not work there."""
    monkeypatch.setattr(module, "spilling_platform", lambda: where)
    platform, pieces = advice(CUDA, searched(GIB, 2 * GIB))
    assert platform.startswith(f"on {where} the driver may keep in the host's memory")
    assert "1.0 GiB more" in pieces
    assert "PYTORCH_ALLOC_CONF" not in pieces


@pytest.mark.parametrize(
    ("release", "system", "found"),
    [
        ("5.15.167.4-microsoft-standard-WSL2", "linux", "WSL"),
        ("4.4.0-19041-Microsoft", "linux", "WSL"),
        ("6.8.0-1015-aws", "linux", ""),
        ("11", "win32", "Windows"),
    ],
)
def test_platforms_are_told_apart(
    release: str, system: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "platform", SimpleNamespace(release=lambda: release))
    monkeypatch.setattr(platform, "sys", SimpleNamespace(platform=system))
    assert platform.spilling_platform() == found


@pytest.mark.parametrize(
    ("peak", "reserved", "said"),
    [
        (4 * GIB, 5 * GIB, True),
        (4 * GIB, 4 * GIB + 900 * 2**20, False),  # 18 % of what is reserved.
        (2**20, 200 * 2**20, False),  # Much of it, and still little.
        (2**20, 300 * 2**20, True),
        (GIB, None, False),
        (None, GIB, False),
    ],
)
def test_memory_torn_into_pieces_is_said_with_what_may_help(
    peak: int | None, reserved: int | None, said: bool
) -> None:
    """USERS 1.8.4, 4.5 and 4.6."""
    notes = list(torn(peak, reserved, "training"))
    assert len(notes) == said
    for note in notes:
        assert "PYTORCH_ALLOC_CONF=expandable_segments:True, set before Python starts" in note


@pytest.mark.parametrize("expands", [True, False])
def test_what_is_in_effect_already_is_not_suggested(
    expands: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """USERS 4.5: read from the allocator, not from the environment."""
    told = {"allocator_settings": {"expandable_segments": expands}}
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda: told)
    (note,) = torn(4 * GIB, 5 * GIB, "the trial")
    assert ("PYTORCH_ALLOC_CONF" in note) is not expands


def test_a_search_carries_what_is_to_be_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from autobatch.probing import finder

    monkeypatch.setattr(finder, "advice", lambda device, search: [f"{device} {search.size}"])
    import autobatch

    model = torch.nn.Linear(4, 3)
    rows = (torch.randn(64, 4), torch.randint(0, 3, (64,)))
    found = autobatch.find_batch_size(model, rows, ceiling=8, device="cpu")
    assert found.notes == ("cpu 8",)
    assert str(found).endswith("\nnote: cpu 8")
    result = autobatch.find_and_train(model, rows, 8, device="cpu", progress=False)
    assert "cpu 8" in result.notes
