"""The demo: a ResNet-18 learns real digits from batches that its memory cannot hold.

Run it as ``python -m autobatch.demo``. It is ``autobatch train`` with a judgement of the outcome.
"""

import sys
from typing import Final

import torch
import typer

from autobatch.cli.app import ExitCode, conclude
from autobatch.cli.arguments import OutputArguments, TrainArguments
from autobatch.cli.commands import train
from autobatch.cli.reports import ForwardTracker, Report, TrainingReport
from autobatch.devices.base import HOST
from autobatch.devices.factory import choose_device, open_device
from autobatch.units import format_bytes

BUDGET_BYTES: Final = 384 * 2**20
ENOUGH: Final = 0.9  # Of the test digits, afterwards.


def main() -> int:
    """Run the demo and return its exit code; the demo fails too if too little was learned."""
    reports: list[TrainingReport] = []

    def work(watch: ForwardTracker) -> Report:
        outside = outside_bytes()
        watch.log(introduction(outside))
        reports.append(train(the_arguments(outside), watch))
        return Report(text=judgement(reports[0]), fields=reports[0].fields)

    try:
        conclude(work, OutputArguments())
    except typer.Exit as end:
        return end.exit_code
    return ExitCode.DONE if learned(reports[0]) else ExitCode.FAILED


def the_arguments(outside: int) -> TrainArguments:
    """Return the arguments of the demo's training, with ``outside`` bytes added to the budget."""
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
    """Return how many bytes a GPU holds beside this process's tensors; 0 without a GPU.

    A ``memory_limit`` counts the driver's context and libraries, and these alone are more than the
    demo's budget. A step runs first, because its kernels take memory when they are loaded.
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
    """Return what the demo is going to do, and what its limit counts."""
    budget = format_bytes(BUDGET_BYTES)
    aim = f"ResNet-18 learns handwritten digits, 256 to a step, in {budget} of memory."
    if not outside:
        return aim
    return (
        f"{aim} On a GPU the limit is the whole process's: {format_bytes(outside)} that are no "
        "tensors (the driver's context, libraries, others' memory) are added."
    )


def judgement(report: TrainingReport) -> str:
    """Return the outcome, and below it what was exact."""
    result = report.result
    exact = (
        f"Exact: every step weighed its examples as one batch of {result.plan.desired} would, with "
        f"memory for {result.plan.tolerable} at once."
    )
    notes = "Not exact: what the notes say." if result.notes else "Nothing was inexact."
    text = report.text
    if not result.replays:  # The first plan was kept, and is printed above.
        text = text.removeprefix(f"{result.plan}\n")
    verdict = "" if learned(report) else f"\nThe demo failed: it promises more than {ENOUGH:.0%}."
    return f"{text}\n{exact} {notes}{verdict}"


def learned(report: TrainingReport) -> bool:
    """Whether enough of the test digits are right."""
    return report.after is not None and report.after > ENOUGH


if __name__ == "__main__":
    sys.exit(main())
