"""The demo: a ResNet-18 learns real digits from batches that its memory cannot hold.

Run as ``python -m autobatch.demo``; it is ``autobatch train`` with a look at the outcome.
"""

import sys
from typing import Final

import torch
import typer

from autobatch.cli import ExitCode, Output, conclude
from autobatch.commands.reports import Report, TrainingReport, Watch
from autobatch.commands.runs import TrainingRun
from autobatch.devices.base import HOST
from autobatch.devices.factory import choose_device, open_device
from autobatch.units import format_bytes

BUDGET_BYTES: Final = 384 * 2**20
ENOUGH: Final = 0.9  # Of the test digits, afterwards.


def main() -> int:
    """Run the demo and return its exit code: failed, too, where nothing was learned."""
    reports: list[TrainingReport] = []

    def work(watch: Watch) -> Report:
        outside = outside_bytes()
        watch.log(introduction(outside))
        reports.append(the_run(outside).run(watch))
        return Report(text=judgement(reports[0]), fields=reports[0].fields)

    try:
        conclude(work, Output())
    except typer.Exit as end:
        return end.exit_code
    return ExitCode.DONE if learned(reports[0]) else ExitCode.FAILED


def the_run(outside: int) -> TrainingRun:
    """Return the demo's training, with ``outside`` bytes on top of the budget."""
    return TrainingRun(
        model="torchvision:resnet18",
        data="digits",
        pixels=64,
        desired=256,
        epochs=4,
        memory_limit=BUDGET_BYTES + outside,
        seed=2,
    )


def outside_bytes() -> int:
    """Return what a GPU holds beside this process's tensors; 0 where there is no GPU.

    A ``memory_limit`` counts the driver's context and libraries, and those alone are more than the
    demo's budget. A step runs first: loading its kernels takes memory as well.
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
    """Say what is going to happen, and what the limit counts."""
    budget = format_bytes(BUDGET_BYTES)
    aim = f"ResNet-18 learns handwritten digits, 256 to a step, in {budget} of memory."
    if not outside:
        return aim
    return (
        f"{aim} On a GPU the limit is the whole process's: {format_bytes(outside)} that are no "
        "tensors (the driver's context, libraries, others' memory) are added."
    )


def judgement(report: TrainingReport) -> str:
    """Say how far the outcome can be believed, below the outcome itself."""
    result = report.result
    exact = (
        f"Exact: every step weighed its examples as one batch of {result.plan.desired} would, with "
        f"memory for {result.plan.tolerable} at once."
    )
    notes = "Not exact: what the notes say." if result.notes else "Nothing was inexact."
    text = report.text
    if not result.replays:  # Training began with this plan, which stands above, and kept it.
        text = text.removeprefix(f"{result.plan}\n")
    verdict = "" if learned(report) else f"\nThe demo failed: it promises more than {ENOUGH:.0%}."
    return f"{text}\n{exact} {notes}{verdict}"


def learned(report: TrainingReport) -> bool:
    """Whether enough of the test digits are right."""
    return report.after is not None and report.after > ENOUGH


if __name__ == "__main__":
    sys.exit(main())
