from dataclasses import replace

import pytest
import torch

from autobatch import demo
from autobatch.cli.app import ExitCode
from autobatch.cli.arguments import TrainArguments
from autobatch.cli.reports import ProgressLog, TrainingReport
from autobatch.results.plan import BatchPlan
from autobatch.results.search import SearchResult, Trial, Upper
from autobatch.results.training import TrainingResult
from autobatch.units import parse_bytes

RESULT = TrainingResult(
    plan=BatchPlan(desired=256, tolerable=86),
    search=SearchResult(
        size=43,
        trials=(Trial(size=43, fits=True, peak_bytes=1),),
        ceiling=256,
        limit_bytes=demo.BUDGET_BYTES,
        limited_by="memory",
        upper=Upper(reason="ran out", size=52),
    ),
    losses=(2.3, 0.1),
    epochs=1,
    examples=512,
    seconds=1.0,
)


def report(after: float, *, notes: tuple[str, ...] = ()) -> TrainingReport:
    return TrainingReport(
        text="the result", fields={}, result=replace(RESULT, notes=notes), before=0.1, after=after
    )


def test_it_is_the_training_that_was_promised() -> None:
    run = demo.the_arguments(outside=0)
    assert (run.model, run.data, run.pixels) == ("torchvision:resnet18", "digits", 64)
    assert (run.desired, run.optimizer, run.lr) == (256, "adamw", 1e-3)
    assert (parse_bytes(run.memory_limit or 0), run.seed is not None) == (384 * 2**20, True)
    assert run.epochs in {3, 4}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, whose context counts")
def test_without_a_gpu_the_budget_is_the_limit() -> None:
    assert demo.outside_bytes() == 0
    assert demo.introduction(0) == (
        "ResNet-18 learns handwritten digits, 256 per step, with 384.0 MiB of memory."
    )


def test_what_is_added_on_a_gpu_is_said() -> None:
    assert demo.the_arguments(outside=500).memory_limit == f"{demo.BUDGET_BYTES + 500}B"
    assert "so 500.0 MiB are added" in demo.introduction(500 * 2**20)


def test_the_judgement_says_what_was_exact() -> None:
    text = demo.judgement(report(0.95, notes=("BatchNorm",)))
    assert "as one batch of 256 does, with memory for 86 at once" in text
    assert text.endswith("The notes list what was not exact.")
    assert demo.judgement(report(0.95)).endswith("Nothing was inexact.")


def test_a_plan_that_stands_above_and_was_kept_is_not_told_again() -> None:
    whole = replace(report(0.95), text=str(RESULT))
    assert str(RESULT.plan) not in demo.judgement(whole)
    replayed = replace(RESULT, replays=1)
    assert str(RESULT.plan) in demo.judgement(replace(whole, result=replayed))


@pytest.mark.parametrize(
    ("after", "code"), [(0.95, ExitCode.DONE), (0.9, ExitCode.FAILED), (0.1, ExitCode.FAILED)]
)
def test_a_demo_that_did_not_learn_fails(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    after: float,
    code: ExitCode,
) -> None:
    def run(_run: TrainArguments, _progress: ProgressLog) -> TrainingReport:
        return report(after)

    monkeypatch.setattr(demo, "train", run)
    assert demo.main() == code
    assert ("The demo failed" in capsys.readouterr().out) == (code is ExitCode.FAILED)


def test_an_interrupted_demo_ends_like_every_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(_run: TrainArguments, _progress: ProgressLog) -> TrainingReport:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "train", run)
    assert demo.main() == ExitCode.INTERRUPTED
    assert "interrupted before the first trial" in capsys.readouterr().err
