"""What a prediction says: of one GPU, beside it of others, and in words."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from autobatch.breakdown import Breakdown
from autobatch.plan import BatchPlan, check_size
from autobatch.plot import save
from autobatch.prediction.caching_allocator import replay
from autobatch.prediction.gpu_catalogue import Gpu, safe_bytes
from autobatch.prediction.plot import peak_over_batch
from autobatch.prediction.trace import Place
from autobatch.prediction.traced_step import Mode, Step
from autobatch.probing.prior import Prior
from autobatch.results import LimitedBy
from autobatch.training.precision import PrecisionName
from autobatch.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_POINTS: Final = 40  # Of a curve that is drawn.


@dataclass(frozen=True, slots=True, kw_only=True)
class WhatIf:
    """What one change of the step would allow.

    Attributes:
        change: In words.
        tolerable: The batch that memory would allow, by the same rule.
    """

    change: str
    tolerable: int

    def __str__(self) -> str:
        return f"{self.change}: {self.tolerable}"


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a step needs on a GPU, and the batch that it tolerates. Made without that GPU.

    Attributes:
        gpu: Which one.
        precision: Of the forward passes; None where a step of one's own sees to it.
        mode: ``"train"``, ``"inference"``, or ``"own"`` for a step of one's own.
        tolerable: The largest batch that fits with the largest context seen on such a card and
            the headroom that a search keeps: the safe end.
        largest: The largest that fits with the smallest context and no headroom: beyond it memory
            runs out.
        by_memory: What memory alone tolerates, however little data there is.
        limited_by: ``"memory"``, ``"data"`` or ``"ceiling"``: why nothing larger is tolerable.
            Where it is not memory, both of the above end there, and the notes say what memory
            allows.
        desired: As given.
        size: The batch that the following is about: the tolerable one, ``desired`` if that is
            smaller, and 1 where none is tolerable.
        peak_allocated_bytes: The peak of allocated bytes at ``size``.
        peak_reserved_bytes: The peak of what the allocator holds at ``size``.
        breakdown: What the memory holds at the peak; what a search would keep free is in it.
        at_peak: The phase and the operation that reach the peak.
        what_ifs: What else would allow which batch.
        notes: What the prediction could not know.
        others: The same step on the other GPUs that were asked for.
    """

    gpu: Gpu
    precision: PrecisionName | None
    mode: Mode | Literal["own"]
    tolerable: int
    largest: int
    by_memory: int
    limited_by: LimitedBy
    desired: int | None
    size: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    breakdown: Breakdown
    at_peak: Place
    what_ifs: tuple[WhatIf, ...] = ()
    notes: tuple[str, ...] = ()
    others: "tuple[Prediction, ...]" = ()
    _step: "Step" = field(repr=False)

    @property
    def safe_bytes(self) -> int:
        """What the allocator may hold at the tolerable batch."""
        return safe_bytes(self.gpu)

    @property
    def plan(self) -> BatchPlan | None:
        """How the desired batch is cut; None where none is desired, or none tolerable.

        By memory, not by how little data there is: of that no desired batch can be made anyway.
        """
        if self.desired is None or not self.tolerable:
            return None
        tolerable = self.by_memory if self.limited_by == "data" else self.tolerable
        return BatchPlan(desired=self.desired, tolerable=tolerable)

    def peak_bytes(self, batch: int) -> int:
        """Return the peak of allocated bytes at any batch, fitting or not."""
        batch = check_size("batch", batch)
        events = self._step.at(batch).events(batch, workspace_bytes=self.gpu.workspace_bytes)
        return replay(events).peak_allocated

    @property
    def prior(self) -> Prior:
        """What a search for the same step on such a GPU begins with."""
        if not self.tolerable:
            return Prior(tolerable=0)
        widest = 2 * self.largest
        if self._step.every is None:  # Others would each cost a trace.
            batches = set(self._step.traces)
        else:
            batches = {1 << n for n in range(widest.bit_length())}
            batches |= {self.tolerable, self.largest, widest}
        peaks = tuple((batch, self.peak_bytes(batch)) for batch in sorted(batches))
        return Prior(tolerable=self.tolerable, limit_bytes=self.safe_bytes, peaks=peaks)

    def curve(self, widest: int) -> list[tuple[int, int]]:
        """Return batches up to ``widest``, ascending, and their peaks: those that cost no trace."""
        if self._step.every is None:
            batches = sorted(batch for batch in self._step.traces if batch <= widest)
        else:
            batches = sorted({max(round(widest * n / _POINTS), 1) for n in range(_POINTS + 1)})
        return [(batch, self.peak_bytes(batch)) for batch in batches]

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Return the peak over the batch as a matplotlib ``Figure``, with the limit of each GPU.

        It is written to ``path`` too, as ``SearchResult.plot`` does it.

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
        """The answer in a line: the tolerable batch as an interval, and the plan."""
        kind = {"train": "", "inference": "inference", "own": "own step"}[self.mode]
        name = ", ".join(filter(None, [self.gpu.name, self.precision, kind]))
        plan = "" if self.plan is None else f"; {self.plan}"
        return f"{name}: tolerable batch {interval(self.tolerable, self.largest)}{plan}"

    @property
    def lines(self) -> str:
        """The answers for all GPUs, each in a line with its notes; what all note comes last."""
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
    """Return both ends in words, or the one that they are."""
    return f"{safe}" + f" to {most}" * (most > safe)
