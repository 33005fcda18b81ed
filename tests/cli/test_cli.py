import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from autobatch.cli import app as cli
from autobatch.cli import commands, main
from autobatch.cli.app import ExitCode
from autobatch.devices.budget import Budget
from autobatch.errors import DeviceUnavailableError, DoesNotFitError, InexactStepError
from autobatch.events import Event, StepEnded, TrainingStarted, TrialEnded
from autobatch.results.plan import BatchPlan
from autobatch.results.search import SearchResult, Trial
from autobatch.results.training import StepResult
from autobatch.training.options import StepOptions
from autobatch.units import Size

CODE = """
import time
import torch
from torch import nn

generator = torch.Generator().manual_seed(0)
x = torch.randn(600, 20, generator=generator)
y = (x @ torch.randn(20, 3, generator=generator)).argmax(1)

def data(): return (x[:500], y[:500]), (x[500:], y[500:])
def untested(): return x, y
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 3))

def unseeded(): return nn.Linear(20, 3)

class Fails(nn.Linear):
    def forward(self, x): raise ValueError("the user's own")
def fails(): return Fails(20, 3)

class Slow(nn.Linear):
    def forward(self, x):
        time.sleep(0.05)
        return super().forward(x)
def slow(): return Slow(20, 3)
"""
TINY = ["tiny_for_tests:model", "--data", "tiny_for_tests:data"]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command where ``tiny_for_tests.py`` is; returns exit code, output and errors."""
    (tmp_path / "tiny_for_tests.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.delitem(sys.modules, "tiny_for_tests", raising=False)

    def command(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


def test_training_prints_the_plan_and_the_accuracy_before_and_after(run: Run) -> None:
    code, out, err = run(
        "train", *TINY, "--desired", "100", "--memory-limit", "80KiB", "--epochs", "8", "--lr",
        "1e-2", "--seed", "3", "--device", "cpu",
    )  # fmt: skip
    assert code == ExitCode.DONE, err
    assert "tiny_for_tests:model on tiny_for_tests:data: 500 to train on, 100 to test on" in err
    assert "epoch 8/8  loss 0." in err
    plan, *_, accuracies = out.splitlines()
    assert plan == "100 = 50 + 50: 2 accumulation steps, tolerable batch 50"
    before, after = (float(part.rstrip("%")) for part in accuracies.split()[2:5:2])
    assert after > max(before, 80)


def test_training_as_json_is_one_document(run: Run) -> None:
    code, out, _ = run(
        "train", *TINY, "--desired", "100", "--max-steps", "3", "--optimizer", "sgd", "--json",
        "--device", "cpu",
    )  # fmt: skip
    assert code == ExitCode.DONE
    written = json.loads(out)
    assert written["plan"]["micro_batch_sizes"] == [100]
    assert written["search"]["trials"][0]["fits"] is True
    assert (written["steps"], len(written["losses"]), written["replays"]) == (3, 3, 0)
    assert 0 <= written["test_accuracy"]["before"] <= 1


def test_data_without_a_test_part_is_trained_without_an_accuracy(run: Run) -> None:
    code, out, err = run("train", TINY[0], "--data", "tiny_for_tests:untested", "--max-steps", "1")
    assert code == ExitCode.DONE, err
    assert "accuracy" not in out + err


def test_nothing_right_is_an_accuracy_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "accuracy", lambda *_: 0.0)
    _, out, err = run("train", *TINY, "--max-steps", "1")
    assert "test accuracy before training: 0.0%" in err
    assert out.endswith("test accuracy 0.0% before, 0.0% after\n")


def test_the_same_seed_trains_the_same_model(run: Run, tmp_path: Path) -> None:
    for name in ("one.pt", "two.pt"):
        code, _, err = run(
            "train", "tiny_for_tests:unseeded", *TINY[1:], "--seed", "5", "--max-steps", "2",
            "--save", name,
        )  # fmt: skip
        assert code == ExitCode.DONE, err
    one, two = (torch.load(tmp_path / name) for name in ("one.pt", "two.pt"))
    for key in one:
        assert torch.equal(one[key], two[key])


def test_a_training_goes_on_from_its_checkpoint(run: Run) -> None:
    def losses(epochs: int, directory: str) -> list[float]:
        code, out, err = run(
            "train", *TINY, "--desired", "100", "--epochs", str(epochs), "--seed", "3", "--json",
            "--checkpoint-dir", directory, "--clip-grad-norm", "1.0", "--precision", "bf16",
            "--device", "cpu",
        )  # fmt: skip
        assert code == ExitCode.DONE, err
        found: list[float] = json.loads(out)["losses"]
        return found

    whole = losses(3, "whole")
    half = losses(1, "halves")
    assert losses(3, "halves") == whole
    assert whole[: len(half)] == half


def test_a_bad_precision_is_refused(run: Run) -> None:
    code, _, err = run("find", *TINY, "--precision", "fp8")
    assert code == ExitCode.BAD_ARGUMENTS
    assert "fp8" in err


def test_saving_needs_a_file_in_a_folder_before_anything_is_trained(
    run: Run, tmp_path: Path
) -> None:
    for name in ("nowhere/model.pt", str(tmp_path)):
        code, _, err = run("train", *TINY, "--save", name)
        assert code == ExitCode.BAD_ARGUMENTS
        assert "--save must name a file in a folder that exists and can be written to, got" in err
        assert name in err


def test_weights_that_cannot_be_written_are_refused_before_anything_is_trained(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there.pt").touch()
    for name, closed in (("new.pt", tmp_path), ("there.pt", tmp_path / "there.pt")):
        takes_none = (closed, os.W_OK)
        monkeypatch.setattr(os, "access", lambda *asked, no=takes_none: asked != no)
        code, _, err = run("train", *TINY, "--save", str(tmp_path / name))
        assert code == ExitCode.BAD_ARGUMENTS
        assert "can be written to" in " ".join(err.split())


def test_finding_prints_the_tolerable_batch_alone_on_the_output(run: Run) -> None:
    arguments = ("find", *TINY, "--memory-limit", "200kB", "--device", "cpu")
    code, out, err = run(*arguments)
    assert code == ExitCode.DONE
    assert out.startswith("tolerable batch ")
    assert "limited by memory" in out
    assert "out of memory" in err
    assert "tolerable" not in err
    code, out, err = run(*arguments, "--json", "--quiet")
    found = json.loads(out)
    assert (found["limited_by"], found["ceiling"], err) == ("memory", 500, "")
    assert found["peak_bytes"] <= found["limit_bytes"] == 200_000


def test_finding_for_inference_in_steps_of_eight(run: Run) -> None:
    limit = ("--memory-limit", "200kB", "--device", "cpu", "--json", "--quiet")
    _, trained, _ = run("find", *TINY, *limit)
    code, out, _ = run("find", *TINY, *limit, "--mode", "inference", "--multiple-of", "8")
    assert code == ExitCode.DONE
    found = json.loads(out)
    assert found["size"] > json.loads(trained)["size"]
    assert {trial["size"] % 8 for trial in found["trials"]} == {0}


def test_training_can_prefer_the_fastest(run: Run) -> None:
    code, out, err = run(
        "train", *TINY, "--desired", "64", "--prefer", "fastest", "--json", "--epochs", "4"
    )
    assert code == ExitCode.DONE
    assert json.loads(out)["search"]["speeds"]
    assert "examples a second at" in err


def test_finding_says_where_the_memory_goes(run: Run) -> None:
    arguments = ("find", *TINY, "--memory-limit", "200kB", "--device", "cpu", "--quiet")
    _, out, _ = run(*arguments)
    written, gap, *rows = out.splitlines()
    assert written.startswith("tolerable batch ")
    assert gap == ""
    assert [row.split("  ")[0] for row in rows] == [
        *["parameters", "gradients", "optimizer state", "activations and temporaries", "free"],
        "in all",
    ]
    breakdown = json.loads(run(*arguments, "--json")[1])["breakdown"]
    assert breakdown["total_bytes"] == 200_000
    assert breakdown["parameter_bytes"] == 4 * (20 * 64 + 64 + 64 * 3 + 3)
    assert sum(breakdown.values()) == 2 * 200_000, "the parts and their sum"


def test_finding_draws_memory_over_size_and_says_so(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("find", *TINY, "--ceiling", "7", "--quiet", "--plot", "memory.svg")
    assert code == ExitCode.DONE
    assert out.splitlines()[-1] == "memory over size is plotted in memory.svg"
    assert "<svg" in (tmp_path / "memory.svg").read_text()


def test_what_was_found_is_told_though_it_cannot_be_drawn(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SearchResult, "plot", full)
    code, out, _ = run("find", *TINY, "--ceiling", "7", "--plot", "memory.png")
    assert code == ExitCode.DONE
    assert out.startswith("tolerable batch 7")
    assert out.endswith("could not be plotted: [Errno 28] No space left on device\n")


@pytest.mark.parametrize(
    ("plot", "words"),
    [
        ("memory.txt", "plot must name a file that ends in .png, .svg or .pdf, got memory.txt"),
        ("nowhere/memory.png", "folder that exists and can be written to, got nowhere/memory.png"),
    ],
)
def test_a_plot_that_cannot_be_drawn_is_refused_before_anything_runs(
    run: Run, plot: str, words: str
) -> None:
    code, out, err = run("find", *TINY, "--plot", plot)
    assert (code, out) == (ExitCode.BAD_ARGUMENTS, "")
    assert words in err
    assert "running" not in err
    assert "500 to train on" not in err, "nothing was loaded"


def test_a_plot_without_matplotlib_is_refused_before_anything_runs(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, err = run("find", *TINY, "--plot", "memory.png")
    assert (code, out) == (ExitCode.FAILED, "")
    assert "not installed: pip install 'torch-autobatch[plot]'" in err
    assert "500 to train on" not in err


def test_what_does_not_fit_says_what_would_help_in_json_too(run: Run) -> None:
    arguments = ("find", *TINY, "--memory-limit", "10kB", "--device", "cpu")
    code, _, err = run(*arguments)
    assert code == ExitCode.DOES_NOT_FIT
    assert "missing, at least" in err
    assert "a larger --memory-limit or device: at least" in err
    error = json.loads(run(*arguments, "--json")[1])["error"]
    assert error["limit_bytes"] == error["breakdown"]["total_bytes"] == 10_000
    assert error["breakdown"]["missing_bytes"] > 0
    assert error["remedies"][-1]["bytes"] == 10_000 + error["breakdown"]["missing_bytes"]


def test_a_row_that_is_too_long_for_the_terminal_goes_on_further_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "20")
    text = "a heading:\n  a row that is too long\n  another     row"
    assert cli._wrapped(text, Screen()).splitlines() == [
        *["a heading:", "  a row that is too", "    long", "  another     row"],
    ]


def test_finding_stops_at_the_ceiling(run: Run) -> None:
    code, out, _ = run("find", *TINY, "--ceiling", "7", "--quiet")
    assert code == ExitCode.DONE
    assert out.startswith("tolerable batch 7 (limited by ceiling")


def test_a_plan_is_a_sentence_or_json(run: Run) -> None:
    assert run("plan", "--desired", "256", "--tolerable", "100") == (
        0,
        "256 = 86 + 85 + 85: 3 accumulation steps, tolerable batch 100\n",
        "",
    )
    _, out, _ = run("plan", "--tolerable", "100", "--json")
    assert json.loads(out) == {
        "desired": 256,
        "tolerable": 100,
        "accumulation_steps": 3,
        "micro_batch_sizes": [86, 85, 85],
    }


@pytest.mark.parametrize(("headroom", "kept"), [("0", 0), ("1GiB", 2**30)])
@pytest.mark.parametrize("command", ["train", "find"])
def test_a_headroom_is_kept_free(
    run: Run, monkeypatch: pytest.MonkeyPatch, command: str, headroom: str, kept: int
) -> None:
    budgets = []
    parse = Budget.parse

    def noted(memory_limit: Size | None, headroom: Size | None) -> Budget:
        budgets.append(parse(memory_limit, headroom))
        return budgets[-1]

    monkeypatch.setattr(Budget, "parse", noted)
    assert run(command, *TINY, "--headroom", headroom, "--device", "cpu")[0] == ExitCode.DONE
    assert {budget.headroom_bytes for budget in budgets} == {kept}


def test_the_versions_are_shown(run: Run) -> None:
    code, out, _ = run("--version")
    assert code == ExitCode.DONE
    assert out.startswith("autobatch ")
    assert f"torch {torch.__version__}" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", *TINY, "--memory-limit", "12 apples"], "--memory-limit cannot be read from"),
        (["find", *TINY, "--headroom", "some"], "--headroom cannot be read from"),
        (["find", *TINY, "--headroom", "0B"], "--headroom must be above zero bytes"),
        (["train", *TINY, "--desired", "0"], "--desired"),
        (["train", *TINY, "--optimizer", "lion"], "--optimizer"),
        (["train", "torchvision:resnet81"], "did you mean resnet"),
        (["train", "resnet18"], "model must be torchvision:resnet18 or"),
        (["train", TINY[0], "--data", "digit"], "data must be digits, imagefolder:PATH or"),
        (["train", *TINY, "--device", "abacus"], "device cannot be read from 'abacus'"),
        (["find", *TINY, "--ceiling", "0"], "--ceiling"),
        (["find"], "MODEL"),
        (["plan"], "--tolerable"),
        (["frobnicate"], "frobnicate"),
    ],
)
def test_a_bad_argument_ends_with_2_and_a_reason(
    run: Run, arguments: list[str], words: str
) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (ExitCode.BAD_ARGUMENTS, "")
    assert words in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["train", "--help"],
        ["--version"],
        ["find"],
        ["train", "resnet18"],
        ["train", "torchvision:resnet18", "--data", "digit"],
        ["find", "torchvision:resnet18", "--memory-limit", "12 apples"],
        ["train", "torchvision:resnet18", "--desired", "0"],
        ["plan", "--tolerable", "7"],
    ],
    ids=" ".join,
)
def test_help_and_slips_are_answered_before_torch_is_there(arguments: list[str]) -> None:
    """It takes seconds to import."""
    code = (
        f"import sys; from autobatch.cli import main; main({arguments!r}); "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr


def test_an_error_names_options_and_what_the_user_says_stays() -> None:
    written = cli._with_options(
        "data must be digits, or a larger memory_limit; max_steps=3; my_data"
    )
    assert written == "--data must be digits, or a larger --memory-limit; --max-steps=3; my_data"
    written = cli._with_options('headroom=0 frees 300.0 MiB, precision="bf16", frozen=True')
    assert written == '--headroom=0 frees 300.0 MiB, --precision="bf16", frozen=True'
    assert cli._with_options("the data must hold a model") == "the data must hold a model"
    assert cli._with_options("model must be a module") == "model must be a module"


def test_what_does_not_fit_ends_with_3(run: Run) -> None:
    code, out, err = run("train", *TINY, "--memory-limit", "10kB", "--device", "cpu")
    assert (code, out) == (ExitCode.DOES_NOT_FIT, "")
    assert "error: a batch of 1 does not fit in 9.8 KiB" in err


def test_an_error_of_the_users_code_ends_with_1_and_says_where(run: Run, tmp_path: Path) -> None:
    code, _, err = run("find", "tiny_for_tests:fails", *TINY[1:])
    assert code == ExitCode.FAILED, "a ValueError of the user is no bad argument"
    assert "error: ValueError: the user's own" in err
    assert str(tmp_path / "tiny_for_tests.py") in err
    assert "Traceback" not in err
    assert "Traceback" in run("find", "tiny_for_tests:fails", *TINY[1:], "--debug")[2]


def ends(monkeypatch: pytest.MonkeyPatch, *events: Event, error: BaseException) -> None:
    """Training tells ``events`` and raises ``error``."""

    def train(*_: object, progress: Callable[[Event], None], **__: object) -> None:
        for event in events:
            progress(event)
        raise error

    monkeypatch.setattr(commands, "find_and_train", train)


TRIALS = tuple(
    TrialEnded(trial=Trial(size=size, fits=fits)) for size, fits in ((4, True), (64, False))
)
STARTED = TrainingStarted(plan=BatchPlan(desired=100, tolerable=50), steps=15, epochs=3)


def steps(count: int) -> list[Event]:
    done = [
        StepResult(loss=1 / number, terms=100, examples=100, micro_batch_sizes=(50, 50))
        for number in range(1, count + 1)
    ]
    return [StepEnded(step=step, epoch=1, plan=STARTED.plan) for step in done]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DoesNotFitError(1, 1000), ExitCode.DOES_NOT_FIT),
        (torch.OutOfMemoryError("out of memory"), ExitCode.DOES_NOT_FIT),
        (InexactStepError("inexact"), ExitCode.FAILED),
        (DeviceUnavailableError("no device"), ExitCode.FAILED),
        (RuntimeError("anything else"), ExitCode.FAILED),
        (ValueError("not raised by autobatch"), ExitCode.FAILED),
        (KeyboardInterrupt(), ExitCode.INTERRUPTED),
    ],
    ids=lambda value: type(value).__name__,
)
def test_each_way_to_end_has_its_code(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: ExitCode
) -> None:
    ends(monkeypatch, error=error)
    ended, out, err = run("train", *TINY)
    assert (ended, out) == (code, "")
    assert str(error) in err
    ended, out, _ = run("train", *TINY, "--json")
    written = json.loads(out)
    assert (ended, written["error"]["exit_code"]) == (code, code)
    assert written["error"]["kind"] == type(error).__name__


@pytest.mark.parametrize(
    ("events", "words"),
    [
        ([], "interrupted before the first trial"),
        (TRIALS, "interrupted in the search, after 2 trials: the largest size that ran is 4"),
        (TRIALS[1:], "interrupted in the search, after 1 trial: none ran"),
        ([STARTED], "interrupted in epoch 1 of 3, before the first optimizer step"),
        (
            [STARTED, *steps(4)],
            "interrupted in epoch 1 of 3, after 4 of 15 optimizer steps (400 examples): "
            "last loss 0.2500",
        ),
    ],
)
def test_an_interrupted_command_says_what_was_done(
    run: Run, monkeypatch: pytest.MonkeyPatch, events: list[Event], words: str
) -> None:
    ends(monkeypatch, *events, error=KeyboardInterrupt())
    code, _, err = run("train", *TINY)
    assert code == ExitCode.INTERRUPTED
    assert err.splitlines()[-1] == words


def test_a_failure_in_training_says_what_was_done(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends(monkeypatch, STARTED, *steps(2), error=RuntimeError("gone"))
    code, _, err = run("train", *TINY)
    assert code == ExitCode.FAILED
    assert "the error occurred in epoch 1 of 3, after 2 of 15 optimizer steps" in err


@pytest.mark.slow
def test_ctrl_c_ends_a_real_process_with_130_and_no_traceback(run: Run, tmp_path: Path) -> None:
    del run  # It has written the module.
    command = [sys.executable, "-m", "autobatch", "train", "tiny_for_tests:slow", *TINY[1:]]
    root = str(Path(cli.__file__).parents[2])
    process = subprocess.Popen(
        [*command, "--desired", "10", "--epochs", "1000", "--device", "cpu"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": root},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    seen = ""
    while "accumulation step" not in seen:  # The plan: training begins.
        line = process.stderr.readline()
        assert line, seen
        seen += line
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == ExitCode.INTERRUPTED
    assert "interrupted in epoch 1 of 1000, after " in rest
    assert "Traceback" not in seen + rest


def test_python_dash_m_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "autobatch", "plan", "--tolerable", "100"],
        cwd=Path(cli.__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("256 = 86 + 85 + 85")


def test_predict_answers_for_a_gpu_that_is_not_here(
    capsys: pytest.CaptureFixture[str],
) -> None:
    size = ["--pixels", "32", "--desired", "64", "--memory", "4GiB", "--json", "--quiet"]
    assert main(["predict", "torchvision:resnet18", *size]) == 0
    (prediction,) = json.loads(capsys.readouterr().out)["predictions"]
    assert prediction["plan"]["desired"] == 64
    assert 0 < prediction["tolerable"] < prediction["largest"]
    assert prediction["what_ifs"].keys() > {"bf16", "fused AdamW", "activation checkpointing"}
    assert (prediction["mode"], prediction["limited_by"]) == ("train", "memory")


def test_predict_infers_within_the_data_and_draws(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    picture = tmp_path / "peak.png"
    options = ["--mode", "inference", "--precision", "bf16", "--memory", "80GiB", "--pixels", "16"]
    command = ["predict", "torchvision:resnet18", *options, "--data", "digits", "--quiet"]
    assert main([*command, "--plot", str(picture)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("80.0 GiB, bf16, inference: tolerable batch 1437\n")
    assert "note: the ceiling is 1437; memory alone would allow " in text
    assert text.endswith(f"the peak over the batch is plotted in {picture}\n")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_predict_refuses_a_plot_that_cannot_be_drawn_before_it_traces(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = ["predict", "torchvision:resnet18", "--gpu", "T4", "--ceiling", "4"]
    assert main([*command, "--plot", str(tmp_path / "peak.txt")]) == 2
    assert "plot must name a file that ends in .png" in capsys.readouterr().err


@pytest.mark.parametrize("card", [[], ["--gpu", "T4", "--memory", "4GiB"]])
def test_predict_wants_one_way_of_naming_the_card(
    card: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", "torchvision:resnet18", *card]) == 2
    assert "pass either --gpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "function"),
    [("train", "find_and_train"), ("find", "find_batch_size"), ("predict", "predict_batch")],
)
def test_the_step_s_options_reach_the_library(
    run: Run, monkeypatch: pytest.MonkeyPatch, command: str, function: str
) -> None:
    seen: list[StepOptions] = []

    def stop(*_: object, options: StepOptions, **__: object) -> None:
        seen.append(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, function, stop)
    card = ["--memory", "4GiB"] if command == "predict" else []
    step = ["--precision", "bf16", "--clip-grad-norm", "0.5", "--batch-norm", "frozen"]
    assert run(command, *TINY, *card, *step)[0] == ExitCode.INTERRUPTED
    assert seen == [StepOptions(precision="bf16", clip_grad_norm=0.5, batch_norm="frozen")]


@pytest.mark.parametrize("command", ["train", "find"])
def test_a_bad_option_of_the_step_is_refused_before_anything_is_loaded(
    run: Run, command: str
) -> None:
    code, _, err = run(command, *TINY, "--clip-grad-norm", "-1")
    assert code == ExitCode.BAD_ARGUMENTS
    assert "--clip-grad-norm must be above 0, got -1" in err
    assert "500 to train on" not in err
