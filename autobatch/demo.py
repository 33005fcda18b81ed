"""The demo: a ResNet-18 learns handwritten digits from batches that exceed its memory limit.

Run it with ``python -m autobatch.demo``. It runs ``autobatch train`` and judges the result.
"""

import sys
from typing import Final

import torch
import typer

from autobatch.cli.app import ExitCode, conclude
from autobatch.cli.arguments import OutputArguments, TrainArguments
from autobatch.cli.commands import train
from autobatch.cli.reports import ProgressLog, Report, TrainingReport
from autobatch.devices.base import HOST
from autobatch.devices.factory import choose_device, open_device
from autobatch.units import format_bytes

BUDGET_BYTES: Final = 384 * 2**20
ENOUGH: Final = 0.9  # The accuracy on the test digits that the demo must exceed.


def main() -> int:
    """Run the demo and return its exit code; it also fails if the test accuracy is too low."""
    reports: list[TrainingReport] = []

    def work(progress: ProgressLog) -> Report:
        outside = outside_bytes()
        progress.log(introduction(outside))
        reports.append(train(the_arguments(outside), progress))
        return Report(text=judgement(reports[0]), fields=reports[0].fields)

    try:
        conclude(work, OutputArguments())
    except typer.Exit as end:
        return end.exit_code
    return ExitCode.DONE if learned(reports[0]) else ExitCode.FAILED


def the_arguments(outside: int) -> TrainArguments:
    """Return the arguments of the training, with ``outside`` bytes added to the memory limit."""
    return TrainArguments(
        model="torchvision:resnet18",
        data="digits",
        pixels=64,
        desired=256,
        epochs=4,
        memory_limit=f"{BUDGET_BYTES + outside}B",
        seed=2,
    )


def outside_bytes() -> int:
    """Return the used memory of the GPU outside this process's tensors, in bytes; 0 without a GPU.

    ``memory_limit`` includes the driver's context and libraries, which alone exceed the budget of
    the demo. A step runs before the measurement, because loading its kernels takes memory.
    """
    device = choose_device(None, HOST)
    if device == HOST:
        return 0
    layer = torch.nn.Conv2d(3, 64, 7).to(device)
    layer(torch.zeros(8, 3, 64, 64, device=device)).sum().backward()
    del layer
    memory = open_device(device)
    memory.release_cached()
    return memory.read().outside_bytes


def introduction(outside: int) -> str:
    """Return an introduction for the user: what the demo does, and what its limit includes."""
    budget = format_bytes(BUDGET_BYTES)
    aim = f"ResNet-18 learns handwritten digits, 256 per step, with {budget} of memory."
    if not outside:
        return aim
    return (
        f"{aim} On a GPU the limit includes memory outside tensors, so {format_bytes(outside)} are "
        "added for the driver's context, libraries and other processes."
    )


def judgement(report: TrainingReport) -> str:
    """Return the result as text, followed by what was exact."""
    result = report.result
    exact = (
        f"Exact: every step weights its examples as one batch of {result.plan.desired} does, with "
        f"memory for {result.plan.tolerable} at once."
    )
    notes = "The notes list what was not exact." if result.notes else "Nothing was inexact."
    text = report.text
    if not result.replays:  # The plan did not change, and is printed above.
        text = text.removeprefix(f"{result.plan}\n")
    verdict = (
        "" if learned(report) else f"\nThe demo failed: the accuracy must exceed {ENOUGH:.0%}."
    )
    return f"{text}\n{exact} {notes}{verdict}"


def learned(report: TrainingReport) -> bool:
    """Return whether the test accuracy is high enough."""
    return report.after is not None and report.after > ENOUGH


if __name__ == "__main__":
    sys.exit(main())
