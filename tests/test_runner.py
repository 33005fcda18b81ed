import io
import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from autobatch.prediction.gpu_catalogue import find_gpu
from benchmarks import __main__ as command
from benchmarks import findings as findings_module
from benchmarks import runner
from benchmarks.findings import Findings, Notice
from benchmarks.machine import environment
from benchmarks.progress import shown
from benchmarks.runner import Options, Part, read_kept, run, share

CPU = torch.device("cpu")
NAMES = ("a", "b", "c", "d")
REPORTS: list[Path] = []


@pytest.fixture(autouse=True)
def _reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report has tests of its own; here it is enough that it is asked for."""
    REPORTS.clear()

    def note(folder: Path) -> bool:
        REPORTS.append(folder)
        return True

    monkeypatch.setattr(runner, "_report", note)


@dataclass
class Work:
    """A part with cases by name; what happens in them is told beforehand."""

    cases: tuple[str, ...] = NAMES
    happens: Mapping[str, Callable[[], object]] = field(default_factory=dict)
    measured: list[str] = field(default_factory=list)
    seconds: Callable[[str, None], float] | None = None

    def __call__(self, findings: Findings) -> None:
        for name, _ in findings.in_time(dict.fromkeys(self.cases), self.seconds):
            self.measured.append(name)
            findings.add("rows", {"case": name, "half": 1})
            self.happens.get(name, lambda: None)()
            findings.add("rows", {"case": name, "half": 2})
        total = len(findings.rows("rows"))
        findings.add("sum", {"rows": total})


@dataclass
class Clock:
    """A time that only passes when somebody lets it."""

    now: float = 1000.0

    def monotonic(self) -> float:
        return self.now

    def passes(self, seconds: float) -> Callable[[], None]:
        def wait() -> None:
            self.now += seconds

        return wait


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    stand_in = SimpleNamespace(monotonic=clock.monotonic)
    monkeypatch.setattr(findings_module, "time", stand_in)
    monkeypatch.setattr(runner, "time", stand_in)
    return clock


def options(out: Path | None, **more: Any) -> Options:
    return Options(**{"device": CPU, "minutes": 5.0, "out": out, **more})


def written(out: Path, part: str = "work") -> dict[str, Any]:
    (file,) = out.glob(f"*/{part}.json")
    content: dict[str, Any] = json.loads(file.read_text())
    return content


def only(work: Work) -> dict[str, Part]:
    return {"work": Part(run=work, weight=1)}


def press_ctrl_c() -> None:
    raise KeyboardInterrupt


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def leave() -> None:
    raise SystemExit(1)  # As Lightning does after Ctrl-C.


@pytest.mark.parametrize("end", [press_ctrl_c, terminate, leave])
@pytest.mark.parametrize("where", NAMES)
def test_an_interrupted_run_goes_on_where_it_was(
    where: str, end: Callable[[], None], tmp_path: Path
) -> None:
    first, second, whole = Work(happens={where: end}), Work(), Work()
    assert run(only(first), options(tmp_path / "out")) == 130
    assert run(only(second), options(tmp_path / "out")) == 0
    assert run(only(whole), options(tmp_path / "whole")) == 0
    assert first.measured == list(NAMES[: NAMES.index(where) + 1])
    assert second.measured == list(NAMES[NAMES.index(where) :])
    assert written(tmp_path / "out")["cases"] == written(tmp_path / "whole")["cases"]
    assert [row["rows"] for row in written(tmp_path / "out")["cases"] if "rows" in row] == [8]


def test_after_an_interrupt_the_file_holds_the_finished_cases_and_a_report_is_written(
    tmp_path: Path,
) -> None:
    run(only(Work(happens={"c": press_ctrl_c})), options(tmp_path))
    kept = written(tmp_path)
    assert [row["case"] for row in kept["cases"]] == ["a", "a", "b", "b"]
    assert kept["done"] == {"a": [0, 1], "b": [2, 3]}
    assert len(REPORTS) == 1


def test_the_file_is_there_after_every_case_even_if_the_process_is_killed(tmp_path: Path) -> None:
    seen: list[list[str]] = []

    def look() -> None:
        seen.append(list(written(tmp_path)["done"]))

    run(only(Work(happens={"b": look, "d": look})), options(tmp_path))
    assert seen == [["a"], ["a", "b", "c"]]


def test_a_part_that_raises_keeps_its_cases_and_the_other_parts_run(tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("no luck")

    broken, other = Work(happens={"b": fail}), Work()
    parts = {"work": Part(run=broken, weight=1), "other": Part(run=other, weight=1)}
    assert run(parts, options(tmp_path)) == 1
    assert (written(tmp_path)["failed"], list(written(tmp_path)["done"])) == (
        "RuntimeError('no luck')",
        ["a"],
    )
    assert other.measured == list(NAMES)
    again = Work()
    assert run({"work": Part(run=again, weight=1)}, options(tmp_path)) == 0
    assert again.measured == ["b", "c", "d"]
    assert "failed" not in written(tmp_path)


def test_asked_to_begin_anew_everything_is_measured_again(tmp_path: Path) -> None:
    again = Work()
    run(only(Work()), options(tmp_path))
    run(only(again), options(tmp_path, fresh=True))
    assert again.measured == list(NAMES)


@pytest.mark.parametrize("name", ["code", "torch", "device", "driver", "threads", "seed"])
def test_results_of_another_code_or_machine_are_not_gone_on_with(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(only(Work()), options(tmp_path))
    facts = environment(CPU)
    monkeypatch.setattr(runner, "_folder", lambda _: next(tmp_path.iterdir()).name)
    monkeypatch.setattr(runner, "environment", lambda _: facts | {name: "another"})
    other, same = Work(), Work()
    run(only(other), options(tmp_path))
    run(only(same), options(tmp_path))
    assert (other.measured, same.measured) == (list(NAMES), [])


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"cases": 3, "done": {}}', '{"cases": [], "done": {"a": [7]}, "seconds": 1}'],
)
def test_a_file_that_cannot_be_read_is_measured_anew(content: str, tmp_path: Path) -> None:
    path = tmp_path / "work.json"
    path.write_text(content)
    assert read_kept(path, {}) is None


def test_what_a_quick_run_saw_is_no_result(tmp_path: Path) -> None:
    run(only(Work()), options(tmp_path, quick=True))
    real = Work()
    run(only(real), options(tmp_path))
    assert real.measured == list(NAMES)


@given(left=st.floats(0, 1e4), weights=st.lists(st.floats(0.1, 10), min_size=1, max_size=6))
def test_shares_are_by_weight_and_the_last_part_may_take_all_that_is_left(
    left: float, weights: list[float]
) -> None:
    shares = []
    rest = left
    for place in range(len(weights)):
        shares.append(share(rest, weights[place:]))
        rest -= shares[-1]
    assert sum(shares) == pytest.approx(left)
    total = sum(weights)
    assert shares == pytest.approx([left * weight / total for weight in weights])
    assert share(-1.0, weights) == 0


def test_no_part_takes_the_time_of_those_behind_it(tmp_path: Path, clock: Clock) -> None:
    names = tuple(f"case {number}" for number in range(100))
    slow = [Work(names, dict.fromkeys(names, clock.passes(10))) for _ in range(3)]
    parts = {f"part {place}": Part(run=work, weight=1) for place, work in enumerate(slow)}
    assert run(parts, options(tmp_path, minutes=6.0)) == 0
    assert 1000 + 360 - 3 * 10 <= clock.now <= 1000 + 360
    assert all(10 <= len(work.measured) <= 13 for work in slow)
    assert "case 99: no time, it takes about 10 s" in written(tmp_path, "part 2")["left_out"]


def test_what_a_cheap_part_leaves_is_spent_on_those_that_were_short(
    tmp_path: Path, clock: Clock
) -> None:
    names = tuple(f"case {number}" for number in range(20))
    long = Work(names, dict.fromkeys(names, clock.passes(10)))
    parts = {"long": Part(run=long, weight=1), "short": Part(run=Work(), weight=9)}
    assert run(parts, options(tmp_path, minutes=5.0)) == 0
    assert long.measured == list(names), "each once, though the part was run twice"
    assert written(tmp_path, "long")["left_out"] == []
    assert written(tmp_path, "long")["seconds"] == 200


def test_a_case_that_would_end_too_late_does_not_begin_and_a_shorter_one_does(
    tmp_path: Path, clock: Clock
) -> None:
    lasts = {"a": 10.0, "b": 100.0, "c": 20.0, "d": 31.0}
    happens = {name: clock.passes(seconds) for name, seconds in lasts.items()}
    work = Work(happens=happens, seconds=lambda name, _: lasts[name])
    run(only(work), options(tmp_path, minutes=1.0))
    assert work.measured == ["a", "c"]
    assert written(tmp_path)["left_out"] == [
        "b: no time, it takes about 100 s",
        "d: no time, it takes about 31 s",
    ]


def test_the_case_before_is_the_example_where_nothing_else_is_known(
    tmp_path: Path, clock: Clock
) -> None:
    happens = {"a": clock.passes(10), "b": clock.passes(30)}
    work = Work(happens=happens)
    run(only(work), options(tmp_path, minutes=1.0))
    assert work.measured == ["a", "b"]
    assert written(tmp_path)["left_out"][0] == "c: no time, it takes about 30 s"


def test_imitated_results_say_so_and_leave_measured_ones_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = find_gpu("RTX 3060")
    run(only(Work()), options(tmp_path))
    (measured,) = tmp_path.iterdir()
    before = (measured / "work.json").read_text()
    capsys.readouterr()
    imitation = Work()
    run(only(imitation), options(tmp_path, imitated=card))
    assert imitation.measured == list(NAMES), "nothing measured is taken over"
    assert (measured / "work.json").read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [measured.name, "imitated-rtx-3060"]
    )
    content = json.loads((tmp_path / "imitated-rtx-3060" / "work.json").read_text())
    assert (content["imitated"], content["device"]) == ("RTX 3060", environment(CPU)["device"])
    told = capsys.readouterr().out.splitlines()
    titles = [line for line in told if line.endswith((": rows", ": sum"))]
    assert titles == [f"imitated RTX 3060, no measured card: {name}" for name in ("rows", "sum")]
    assert json.loads(before)["imitated"] is None


def test_a_file_of_a_measured_card_is_not_gone_on_with_by_an_imitation(tmp_path: Path) -> None:
    run(only(Work()), options(tmp_path))
    (measured,) = tmp_path.iterdir()
    measured.rename(tmp_path / "imitated-rtx-3060")
    imitation = Work()
    run(only(imitation), options(tmp_path, imitated=find_gpu("RTX 3060")))
    assert imitation.measured == list(NAMES)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["holding"], "there is no 'holding'; choose from exactness"),
        (["--minutes", "-1"], "minutes are a number from 0 to 1440, got '-1'"),
        (["--minutes", "nan"], "got 'nan'"),
        (["--minutes", "soon"], "got 'soon'"),
        (["--models", "resnet19"], "there is no model 'resnet19'; choose from efficientnet_b0"),
        (["--imitate", "RTX 9999"], "no GPU in the catalogue is called 'RTX 9999'"),
        (["--imitate", "900GiB"], "free: imitate a smaller card"),
        (["--imitate", "1GiB", "--device", "meta"], "meta"),
    ],
)
def test_a_bad_argument_is_refused_with_the_value_and_the_way_out(
    wrong: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        command.main(wrong)
    assert end.value.code == 2
    assert said in capsys.readouterr().err


def test_an_imitation_beside_a_gpu_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "choose_device", lambda *_: torch.device("cuda", 0))
    with pytest.raises(SystemExit):
        command.main(["--imitate", "1GiB", "--device", "cuda:0"])
    assert "--imitate runs on the CPU, got --device cuda:0" in capsys.readouterr().err


def test_the_words_of_the_command_line_are_what_the_runner_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[list[str], Options]] = []

    def note(parts: Mapping[str, Part], asked: Options) -> int:
        told.append((list(parts), asked))
        return 7

    monkeypatch.setattr(runner, "run", note)
    words = ["engine", "holdings", "engine", "--minutes", "2", "--imitate", "1GiB", "--fresh"]
    assert command.main([*words, "--models", "gpt2", "swin_t", "--out", str(tmp_path)]) == 7
    assert command.main(["all", "--device", "cpu"]) == 7
    (parts, asked), (everything, standard) = told
    assert parts == ["engine", "holdings"]
    assert (asked.minutes, asked.fresh, asked.out) == (2.0, True, tmp_path)
    assert (asked.models, asked.device) == (("gpt2", "swin_t"), CPU)
    assert asked.imitated is not None
    assert asked.imitated.capacity_bytes == 2**30
    assert everything == list(command.PARTS)
    assert (standard.imitated, standard.out) == (None, command.RESULTS)


def test_progress_is_a_line_a_case_where_nobody_watches() -> None:
    text = io.StringIO()
    with shown(["work"], 2.0, Console(file=text)) as tell:
        tell("work", Notice("K = 3 [bold]", 4, 9))
    assert text.getvalue().rstrip() in {
        f"[{left} left] work 5/9: K = 3 [bold]" for left in ("2:00", "1:59")
    }


def test_progress_is_a_bar_on_a_terminal() -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=120)
    with shown(["first", "work"], 2.0, console) as tell:
        tell("work", Notice("K = 3 [bold]", 4, 9))
    assert "4/9" in text.getvalue()
    assert "K = 3 [bold]" in text.getvalue()
    assert "waits" in text.getvalue()


def test_every_case_that_begins_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(only(Work()), options(tmp_path))
    lines = [line for line in capsys.readouterr().out.splitlines() if " left] " in line]
    assert [line.split("] ")[1] for line in lines] == [
        f"work {place}/4: {name}" for place, name in enumerate(NAMES, start=1)
    ]


@pytest.fixture(autouse=True)
def _sigterm_as_before() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    assert signal.getsignal(signal.SIGTERM) is before
