"""The result of a prediction: for one GPU or several, as numbers and in words."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from autobatch.prediction.caching_allocator import replay
from autobatch.prediction.gpu_catalogue import Gpu, safe_bytes
from autobatch.prediction.plot import peak_over_batch
from autobatch.prediction.trace import AllocationSite
from autobatch.prediction.traced_step import PredictionMode, TracedStep
from autobatch.results.memory import Breakdown
from autobatch.results.plan import BatchPlan
from autobatch.results.plot import save
from autobatch.results.search import LimitedBy
from autobatch.search.prior import Prior
from autobatch.training.engine.precision import PrecisionName
from autobatch.units import format_bytes
from autobatch.validation import check_size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_POINTS: Final = 40  # The number of points of a curve.


@dataclass(frozen=True, slots=True, kw_only=True)
class WhatIf:
    """The tolerable batch after one change of the step.

    Attributes:
        change: The change in words, such as ``"bf16"``.
        tolerable: The largest batch that memory would allow, by the rule of
            ``Prediction.tolerable``.
    """

    change: str
    tolerable: int

    def __str__(self) -> str:
        return f"{self.change}: {self.tolerable}"


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The memory of a step on a GPU, and its tolerable batch, found without that GPU.

    Attributes:
        gpu: The GPU.
        precision: The precision of the forward passes; None for a step that the user wrote.
        mode: ``"train"``, ``"inference"``, or ``"own"`` for a step that the user wrote.
        tolerable: The largest batch that fits with the largest CUDA context seen on such a card and
            with the headroom that a search keeps. It is the safe end of the interval.
        largest: The largest batch that fits with the smallest context and without headroom. Memory
            runs out at larger ones.
        by_memory: The batch that memory tolerates, however few examples the data have.
        limited_by: ``"memory"``, ``"data"`` or ``"ceiling"``: the reason why no larger batch is
            tolerable. If the reason is not memory, ``tolerable`` and ``largest`` are at most that
            bound, and the notes say what memory allows.
        desired: The argument ``desired``.
        size: The batch of the following attributes: the tolerable one, or ``desired`` if it is
            smaller, or 1 if no batch is tolerable.
        peak_allocated_bytes: The peak of allocated bytes at ``size``.
        peak_reserved_bytes: The peak of the bytes that the allocator reserves at ``size``.
        breakdown: The contents of the GPU's memory at the peak, with the headroom of a search.
        at_peak: The phase and the operation that reach the peak.
        what_ifs: The tolerable batches after changes of the step.
        notes: What the prediction could not know.
        others: The predictions for the other GPUs.

    Example:
        >>> found = predict(model, data, gpu="RTX 4090", desired=1024)
        >>> found.tolerable, found.peak_bytes(64), found.plan
    """

    gpu: Gpu
    precision: PrecisionName | None
    mode: PredictionMode | Literal["own"]
    tolerable: int
    largest: int
    by_memory: int
    limited_by: LimitedBy
    desired: int | None
    size: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    breakdown: Breakdown
    at_peak: AllocationSite
    what_ifs: tuple[WhatIf, ...] = ()
    notes: tuple[str, ...] = ()
    others: "tuple[Prediction, ...]" = ()
    _step: "TracedStep" = field(repr=False)

    @property
    def safe_bytes(self) -> int:
        """The most bytes that the allocator may reserve at the tolerable batch."""
        return safe_bytes(self.gpu)

    @property
    def plan(self) -> BatchPlan | None:
        """The micro-batches of the desired batch; None if none is desired, or none is tolerable.

        The plan follows from memory, also if the data have fewer examples.
        """
        if self.desired is None or not self.tolerable:
            return None
        tolerable = self.by_memory if self.limited_by == "data" else self.tolerable
        return BatchPlan(desired=self.desired, tolerable=tolerable)

    def peak_bytes(self, batch: int) -> int:
        """Return the peak of allocated bytes at a batch, whether it fits or not.

        Args:
            batch: Examples in a micro-batch.

        Raises:
            TypeError, ValueError: If ``batch`` is no positive integer.
        """
        batch = check_size("batch", batch)
        events = self._step.at(batch).events(batch, workspace_bytes=self.gpu.workspace_bytes)
        return replay(events).peak_allocated

    @property
    def prior(self) -> Prior:
        """The prior with which a search for the same step on such a GPU starts."""
        if not self.tolerable:
            return Prior(tolerable=0)
        widest = 2 * self.largest
        if self._step.every is None:  # Any other batch would need a trace.
            batches = set(self._step.traces)
        else:
            batches = {1 << n for n in range(widest.bit_length())}
            batches |= {self.tolerable, self.largest, widest}
        peaks = tuple((batch, self.peak_bytes(batch)) for batch in sorted(batches))
        return Prior(tolerable=self.tolerable, limit_bytes=self.safe_bytes, peaks=peaks)

    def curve(self, widest: int) -> list[tuple[int, int]]:
        """Return pairs of a batch and its peak in bytes, ascending, without tracing.

        Args:
            widest: The largest batch.
        """
        if self._step.every is None:
            batches = sorted(batch for batch in self._step.traces if batch <= widest)
        else:
            batches = sorted({max(round(widest * n / _POINTS), 1) for n in range(_POINTS + 1)})
        return [(batch, self.peak_bytes(batch)) for batch in batches]

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Return a matplotlib ``Figure`` of the peak over the batch, with the limit of each GPU.

        Args:
            path: A file to which the figure is written too, as by ``SearchResult.plot``.

        Raises:
            ImportError: If matplotlib is not installed: ``pip install 'torch-autobatch[plot]'``.
            ValueError: If nothing can be written to ``path``.
        """
        figure = peak_over_batch([self, *self.others])
        if path is not None:
            save(figure, path)
        return figure

    @property
    def line(self) -> str:
        """The result in one line: the tolerable batch as an interval, and the plan."""
        kind = {"train": "", "inference": "inference", "own": "own step"}[self.mode]
        name = ", ".join(filter(None, [self.gpu.name, self.precision, kind]))
        plan = "" if self.plan is None else f"; {self.plan}"
        return f"{name}: tolerable batch {interval(self.tolerable, self.largest)}{plan}"

    @property
    def lines(self) -> str:
        """The results for all GPUs, each in a line with its notes; notes of all GPUs come last."""
        every = [self, *self.others]
        common = [note for note in self.notes if all(note in each.notes for each in every)]
        found = []
        for each in every:
            found += [each.line, *(f"  note: {n}" for n in each.notes if n not in common)]
        return "\n".join(found + [f"note: {note}" for note in common])

    def __str__(self) -> str:
        return "\n".join([self._report(), *map(str, self.others)])

    def _report(self) -> str:
        parts = ", ".join(f"{name} {format_bytes(n)}" for name, n in self.breakdown.parts.items())
        lines = [
            self.line,
            f"  at {self.size}: peak {format_bytes(self.peak_allocated_bytes)} allocated, "
            f"{format_bytes(self.peak_reserved_bytes)} reserved, of "
            f"{format_bytes(self.gpu.capacity_bytes)}",
            f"  at the peak, in {self.at_peak.phase} ({self.at_peak.operation}): {parts}",
            *(f"  what if {what_if}" for what_if in self.what_ifs),
            *(f"  note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)


def interval(safe: int, most: int) -> str:
    """Return ``"310 to 330"``, or ``"310"`` if both ends are equal."""
    return f"{safe}" + f" to {most}" * (most > safe)
