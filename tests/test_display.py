import io
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
from rich.console import Console

from autobatch.display import Display, print_table
from autobatch.events import (
    EpochEnded,
    ErrorForgotten,
    Evaluated,
    Event,
    Replayed,
    Resumed,
    SearchEnded,
    SearchStarted,
    SizesTimed,
    StepEnded,
    TrainingStarted,
    TrialEnded,
    TrialStarted,
)
from autobatch.results.memory import Breakdown
from autobatch.results.plan import BatchPlan
from autobatch.results.search import LimitedBy, OtherProcess, SearchResult, Trial, Upper
from autobatch.results.training import Evaluation, StepResult
from autobatch.results.verdict import Verdict

MIB = 2**20
PLAN = BatchPlan(desired=256, tolerable=93)
HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"  # The cursor.


class Clock:
    """A second passes each time somebody says so."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class Screen(io.StringIO):
    """What a terminal was sent."""

    def isatty(self) -> bool:
        return True


def console(
    *, terminal: bool, width: int = 80, clock: Clock | None = None, **environ: str
) -> tuple[Console, io.StringIO]:
    file = Screen() if terminal else io.StringIO()
    made = Console(
        file=file,
        width=width,
        get_time=clock or Clock(),
        highlight=False,
        _environ={"TERM": "xterm", **environ},
    )
    return made, file


def trial(size: int, peak_mib: float | None, failure: Verdict | None = None) -> Trial:
    peak = None if peak_mib is None else int(peak_mib * MIB)
    return Trial(size=size, fits=failure is None, failure=failure, peak_bytes=peak, seconds=0.25)


def found(limited_by: LimitedBy = "memory", upper: int | None = 103) -> SearchResult:
    return SearchResult(
        size=93,
        trials=(trial(93, 250.0),),
        ceiling=256,
        limit_bytes=256 * MIB,
        limited_by=limited_by,
        upper=Upper(reason="ceiling") if upper is None else Upper(reason="ran out", size=upper),
    )


def step(loss: float, *, epoch: int, skipped: bool = False) -> StepEnded:
    done = StepResult(
        loss=math.nan if skipped else loss,
        terms=0 if skipped else 256,
        examples=256,
        micro_batch_sizes=PLAN.micro_batch_sizes,
        skipped=skipped,
    )
    return StepEnded(step=done, epoch=epoch, plan=PLAN)


def story(clock: Clock, *, steps: int | None = 4) -> Iterator[Event]:
    """A search, and two epochs of two steps that take a second each."""
    yield SearchStarted(device="CPU", limit_bytes=256 * MIB, ceiling=256)
    for done in (trial(4, 188.7), trial(256, None, Verdict.OUT_OF_MEMORY), trial(93, 250.0)):
        yield TrialStarted(size=done.size)
        yield TrialEnded(trial=done)
    yield SearchEnded(search=found())
    yield TrainingStarted(plan=PLAN, steps=steps, epochs=2)
    for epoch in (1, 2):
        for loss in (2.0 / epoch, 1.0 / epoch):
            clock.seconds += 1
            yield step(loss, epoch=epoch)
        if epoch == 1:
            yield Replayed(failed=86, micro_batch=64)
        yield EpochEnded(epoch=epoch, loss=1.5 / epoch, examples_per_second=256.0)


def test_without_a_terminal_there_are_whole_lines_and_nothing_else() -> None:
    clock = Clock()
    out, file = console(terminal=False, clock=clock)
    with Display(out) as display:
        for event in story(clock):
            display(event)
    assert file.getvalue() == (
        "CPU, limit 256.0 MiB, sizes up to 256\n"
        "   size   verdict                peak   of limit   seconds\n"
        "      4   fits              188.7 MiB      73.7%       0.2\n"
        "    256   out of memory             -          -       0.2\n"
        "     93   fits              250.0 MiB      97.7%       0.2\n"
        "tolerable batch 93, limited by memory (103 failed)\n"
        "256 = 86 + 85 + 85: 3 accumulation steps, tolerable batch 93\n"
        "memory ran out with micro-batches of 86: the logical batch runs again with 64\n"
        "epoch 1/2  loss 1.5000     256 examples/s\n"
        "epoch 2/2  loss 0.7500     256 examples/s\n"
    )


@pytest.mark.parametrize("verdict", [None, *Verdict])
@pytest.mark.parametrize("size", [1, 999_999])
def test_columns_are_aligned_whatever_the_trial(verdict: Verdict | None, size: int) -> None:
    out, file = console(terminal=False)
    display = Display(out)
    display(SearchStarted(device="CPU", limit_bytes=1024 * MIB, ceiling=size))
    display(TrialEnded(trial=trial(size, None if verdict else 1023.9, verdict)))
    _, header, row = file.getvalue().splitlines()
    assert len(header) == len(row)
    assert row[7:10] == "   "
    assert row[24:27] == "   "
    assert row[37:40] == "   "
    assert row[48:51] == "   "


@pytest.mark.parametrize("verdict", [None, Verdict.OUT_OF_MEMORY])
def test_the_verdict_alone_is_coloured(verdict: Verdict | None) -> None:
    out, file = console(terminal=True)
    Display(out)(TrialEnded(trial=trial(93, None if verdict else 250.0, verdict)))
    colour, word = ("33", "out of memory") if verdict else ("32", "fits")
    assert f"\x1b[{colour}m{word:<14}\x1b[0m" in file.getvalue()
    assert file.getvalue().count("\x1b[0m") == 1


def test_other_processes_on_the_device_are_named() -> None:
    others = (OtherProcess(pid=7, used_bytes=3 * MIB), OtherProcess(pid=8, used_bytes=None))
    out, file = console(terminal=False)
    display = Display(out)
    display(SearchStarted(device="a card", limit_bytes=MIB, ceiling=8, others=others))
    assert "on the same device process 7 holds 3.0 MiB" in file.getvalue()
    assert "on the same device process 8 holds memory" in file.getvalue()


@pytest.mark.parametrize(
    ("limited_by", "upper", "words"),
    [
        ("memory", 103, "limited by memory (103 failed)"),
        ("kernel", 103, "limited by a kernel (103 failed)"),
        ("data", None, "limited by the data"),
        ("ceiling", None, "limited by the ceiling"),
    ],
)
def test_the_tolerable_batch_comes_with_its_reason(
    limited_by: LimitedBy, upper: int | None, words: str
) -> None:
    out, file = console(terminal=False)
    Display(out)(SearchEnded(search=found(limited_by, upper)))
    assert file.getvalue() == f"tolerable batch 93, {words}\n"


def test_memory_that_a_kernels_limit_leaves_unused_is_said() -> None:
    """USERS 1.2.6."""
    out, file = console(terminal=False)
    limited = replace(found("kernel"), breakdown=Breakdown(free_bytes=3 * MIB))
    Display(out)(SearchEnded(search=limited))
    assert "limited by a kernel and not by memory: 3.0 MiB unused (103 failed)" in file.getvalue()


def test_what_was_let_go_of_and_what_is_to_be_known_is_said() -> None:
    """USERS 1.1.8, 1.3.8 and 1.8.4."""
    out, file = console(terminal=False)
    display = Display(out)
    display(ErrorForgotten())
    display(SearchEnded(search=replace(found("data"), notes=("cudnn.benchmark is on",))))
    display(SizesTimed(search=replace(found("data"), notes=("too short to be timed",))))
    first, _, *notes = file.getvalue().splitlines()
    assert first == "deleted the last error and the tensors that its traceback held"
    assert notes == ["note: cudnn.benchmark is on", "note: too short to be timed"]


def test_a_line_in_a_file_is_as_long_as_it_is() -> None:
    out, file = console(terminal=False, width=20)
    Display(out).log("a [name] with brackets, :smile: and more than twenty columns")
    assert file.getvalue() == "a [name] with brackets, :smile: and more than twenty columns\n"


def frames(text: str) -> list[str]:
    """What was drawn, line by line, without control sequences."""
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    return [line for line in re.split(r"[\r\n]+", plain) if line.strip()]


@pytest.mark.parametrize(("width", "bar"), [(60, ""), (80, "━{8,}  "), (120, "━{40}  ")])
def test_everything_is_in_one_line_of_the_terminal(width: int, bar: str) -> None:
    clock = Clock()
    out, file = console(terminal=True, width=width, clock=clock)
    with Display(out) as display:
        for event in story(clock):
            display(event)
    drawn = frames(file.getvalue())
    assert max(map(len, drawn)) <= width
    assert "      4   running" in drawn
    bars = [line for line in drawn if line.endswith("left")]
    assert any(
        re.fullmatch(rf"epoch 2/2  loss 0.5000     256 examples/s  {bar}4/4  00:00 left", line)
        for line in bars
    ), bars


def test_the_size_being_tried_is_shown_while_it_runs() -> None:
    out, file = console(terminal=True)
    with Display(out) as display:
        display(TrialStarted(size=93))
        assert frames(file.getvalue()) == ["     93   running"]


def test_an_unknown_number_of_steps_is_counted_without_a_bar() -> None:
    clock = Clock()
    out, file = console(terminal=True, clock=clock)
    with Display(out) as display:
        for event in story(clock, steps=None):
            display(event)
    drawn = frames(file.getvalue())
    assert not any("━" in line for line in drawn)
    assert any(re.search(r"examples/s  step 4  0:00:0\d", line) for line in drawn), drawn


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_terminal_is_given_back_when_training_ends_early(error: type[BaseException]) -> None:
    clock = Clock()
    out, file = console(terminal=True, clock=clock)
    with pytest.raises(error), Display(out) as display:  # noqa: PT012  # It is raised inside.
        display(TrainingStarted(plan=PLAN, steps=4, epochs=2))
        clock.seconds += 2
        display(step(0.5, epoch=1))
        raise error
    text = file.getvalue()
    assert text.index(HIDE) < text.rindex(SHOW)
    assert text.count(HIDE) == text.count(SHOW)
    assert frames(text)[-1] == "epoch 1/2  loss 0.5000     128 examples/s  (stopped after 1 step)"


def test_training_that_stops_within_an_epoch_still_says_its_loss() -> None:
    clock = Clock()
    out, file = console(terminal=False, clock=clock)
    with Display(out) as display:
        display(TrainingStarted(plan=PLAN, steps=2, epochs=1))
        clock.seconds += 4
        for loss in (1.0, 0.5):
            display(step(loss, epoch=1))
    last = file.getvalue().splitlines()[-1]
    assert last == "epoch 1/1  loss 0.7500     128 examples/s  (stopped after 2 steps)"


def test_an_evaluation_is_a_line_of_its_own() -> None:
    clock = Clock()
    out, file = console(terminal=False, clock=clock)
    evaluation = Evaluation(epoch=1, loss=0.5, metrics={"accuracy": 0.875, "[f1]": 2}, examples=9)
    with Display(out) as display:
        display(TrainingStarted(plan=PLAN, steps=1, epochs=1))
        display(step(0.5, epoch=1))
        display(EpochEnded(epoch=1, loss=0.5, examples_per_second=256.0))
        display(Evaluated(evaluation=evaluation))
    assert file.getvalue().splitlines()[1:] == [
        "epoch 1/1  loss 0.5000     256 examples/s",
        "evaluation after epoch 1: loss 0.5000, accuracy 0.875, [f1] 2",
    ]


def test_a_training_that_goes_on_says_from_where_and_counts_its_epochs_on() -> None:
    clock = Clock()
    out, file = console(terminal=True, clock=clock)
    with Display(out) as display:
        display(Resumed(checkpoint="runs/step-00000007.pt", steps=7, epoch=3))
        display(TrainingStarted(plan=PLAN, steps=1, epochs=3))
        clock.seconds += 1
        display(step(0.5, epoch=3))
    drawn = frames(file.getvalue())
    assert drawn[0] == "continuing from runs/step-00000007.pt: 7 steps done, epoch 3"
    assert any(line.startswith("epoch 3/3  loss -") for line in drawn)
    assert not any(line.startswith("epoch 1/3") for line in drawn)


def test_a_skipped_step_leaves_the_loss_as_it_was() -> None:
    clock = Clock()
    out, file = console(terminal=False, clock=clock)
    with Display(out) as display:
        display(TrainingStarted(plan=PLAN, steps=2, epochs=1))
        clock.seconds += 4
        display(step(0.5, epoch=1))
        display(step(0.0, epoch=1, skipped=True))
    assert "loss 0.5000" in file.getvalue().splitlines()[-1]


def test_a_bare_observer_draws_nothing_that_somebody_must_close() -> None:
    clock = Clock()
    out, file = console(terminal=True, clock=clock)
    display = Display(out)
    for event in story(clock):
        display(event)
    assert HIDE not in file.getvalue()
    assert "epoch 2/2" in file.getvalue()


def test_a_terminal_that_cannot_draw_gets_lines() -> None:
    clock = Clock()
    dumb, file = console(terminal=True, clock=clock, TERM="dumb")
    with Display(dumb) as display:
        for event in story(clock):
            display(event)
    assert "running" not in file.getvalue()
    assert HIDE not in file.getvalue()


def test_colours_in_a_log_file_bring_no_bar_with_them() -> None:
    clock = Clock()
    coloured, file = console(terminal=False, clock=clock, FORCE_COLOR="1")
    with Display(coloured) as display:
        for event in story(clock):
            display(event)
    assert "\x1b[32mfits" in file.getvalue()
    assert HIDE not in file.getvalue()
    assert "running" not in file.getvalue()


def test_what_is_printed_below_the_bar_stays_on_the_standard_output(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The output is piped, the progress is not: rich would take both for the terminal."""
    out, file = console(terminal=True)
    with Display(out) as display:
        display(TrainingStarted(plan=PLAN, steps=4, epochs=2))
        sys.stdout.write("for the pipe\n")
    assert capsys.readouterr().out == "for the pipe\n"
    assert "for the pipe" not in file.getvalue()


def test_small_and_odd_numbers_can_be_read() -> None:
    out, file = console(terminal=False)
    display = Display(out)
    display(EpochEnded(epoch=1, loss=1.5e-7, examples_per_second=0.25))
    display(EpochEnded(epoch=1, loss=math.nan, examples_per_second=123_456.0))
    assert file.getvalue().splitlines() == [
        "epoch 1/1  loss 1.50e-07     0.2 examples/s",
        "epoch 1/1  loss nan  123,456 examples/s",
    ]


def test_a_table_in_a_file_is_as_wide_as_it_must_be(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    print_table(["GPU", "name"], [["0", "NVIDIA H200 [MIG], wider than 20 columns"]])
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == ["GPU   name", "0     NVIDIA H200 [MIG], wider than 20 columns"]


def test_the_standard_error_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    Display().log("a line")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "a line\n")
