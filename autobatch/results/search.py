"""What the public functions return: values that print well."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from autobatch.results.memory import Breakdown
from autobatch.results.plot import memory_over_size, save
from autobatch.results.verdict import Verdict
from autobatch.units import count, format_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_AS_FAST: Final = 0.02  # A difference that is not worth more memory.
LimitedBy = Literal["memory", "ceiling", "data", "kernel", "time", "crash"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """The memory of one stretch of a trial, in bytes: at its start, and at most."""

    floor_bytes: int
    peak_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherProcess:
    """Another process that computes on the same device.

    Attributes:
        pid: Its number where the driver lives: in a container, not the number known inside.
        used_bytes: What it holds; None where that is not told.
    """

    pid: int
    used_bytes: int | None

    def __str__(self) -> str:
        held = "memory" if self.used_bytes is None else format_bytes(self.used_bytes)
        return f"process {self.pid} holds {held}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One rehearsed window at one size.

    Attributes:
        size: Examples in each micro-batch of the rehearsal.
        fits: Whether the whole rehearsal ran inside the limit.
        failure: Why it did not, or None.
        peak_bytes: The most bytes allocated at once; None for a failed trial, which has no peak.
        reserved_bytes: The most bytes the caching allocator held; None where it has none.
        seconds: How long the rehearsal took.
        message: The text of the failure, or ``""``.
        phases: Its memory in the first micro-batch, in those after it, and in the optimizer's
            step; empty for a failed trial, and where nothing was read.
        explained: Of a failure, whether memory as it was read explains it.
        needed_bytes: Of a failure, what was needed at least as far as it was read; 0 otherwise.
        repeated: Whether the size had been tried before.
    """

    size: int
    fits: bool
    failure: Verdict | None = None
    peak_bytes: int | None = None
    reserved_bytes: int | None = None
    seconds: float = 0.0
    message: str = ""
    phases: tuple[Phase, ...] = ()
    explained: bool = True
    needed_bytes: int = 0
    repeated: bool = False

    def __bool__(self) -> bool:
        return self.fits

    def __str__(self) -> str:
        outcome = "fits" if self.failure is None else self.failure.value
        peak = "" if self.peak_bytes is None else f", peak {format_bytes(self.peak_bytes)}"
        return f"{self.size}: {outcome}{peak}, {self.seconds:.1f} s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Upper:
    """Why nothing larger is tolerable.

    Attributes:
        reason: ``"ran out"`` when the next size was tried, ``"extrapolated"`` when what smaller
            ones used leaves no room for it, ``"ceiling"`` when there is none.
        size: The smallest size known not to be tolerable; None at the ceiling.
        bytes: What it would need at least, where that is extrapolated.
    """

    reason: Literal["ran out", "extrapolated", "ceiling"]
    size: int | None = None
    bytes: int | None = None

    def __str__(self) -> str:
        if self.size is None:
            return "at the ceiling"
        if self.bytes is None:
            return f"{self.reason} at {self.size}"
        return f"{self.size} would need at least {format_bytes(self.bytes)}"

    def under(self, limit_bytes: int) -> str:
        """Return the same in words; where rounding would hide it, by how much a limit is short."""
        needed = 0 if self.bytes is None else self.bytes
        if needed <= limit_bytes or format_bytes(needed) != format_bytes(limit_bytes):
            return str(self)
        short = format_bytes(needed - limit_bytes)
        return f"{self.size} would need at least {short} more than there is"


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """How fast micro-batches of one size train.

    Attributes:
        size: Examples in the largest of them.
        examples_per_second: The median over whole logical batches, without loading.
        windows: So many were timed.
    """

    size: int
    examples_per_second: float
    windows: int

    def __str__(self) -> str:
        return f"{self.size}: {self.examples_per_second:.4g} examples a second"


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """The tolerable batch, and how it was found. Usable as an ``int``.

    Attributes:
        size: The tolerable batch: it really ran.
        trials: Every trial, in order.
        ceiling: The largest size of interest.
        limit_bytes: What the step was allowed to allocate.
        limited_by: What kept the size from being larger.
        upper: Why nothing larger was taken.
        worst_case: What the trials repeated, in words.
        speeds: How fast it and a few smaller sizes train, where ``prefer="fastest"`` asked.
        others: Other processes on the device when the search began, as far as told.
        breakdown: Where the memory goes at ``size``; None where it was not asked.
        notes: What else is to be known of the memory that was seen.
    """

    size: int
    trials: tuple[Trial, ...]
    ceiling: int
    limit_bytes: int
    limited_by: LimitedBy
    upper: Upper
    worst_case: str = ""
    speeds: tuple[Speed, ...] = ()
    others: tuple[OtherProcess, ...] = ()
    breakdown: Breakdown | None = None
    notes: tuple[str, ...] = ()

    def __int__(self) -> int:
        return self.size

    def __index__(self) -> int:
        return self.size

    @property
    def peak_bytes(self) -> int | None:
        """The peak of the last trial that ran at ``size``; None where it was not measured."""
        peaks = (t.peak_bytes for t in reversed(self.trials) if t.fits and t.size == self.size)
        return next(peaks, None)

    @property
    def fastest(self) -> int:
        """The smallest size within 2 % of the fastest; ``size`` where none was timed."""
        if not self.speeds:
            return self.size
        enough = (1 - _AS_FAST) * max(speed.examples_per_second for speed in self.speeds)
        return min(s.size for s in self.speeds if s.examples_per_second >= enough)

    def table(self) -> str:
        """Return a line for each trial, in order, as a search shows them."""
        rows = [trial_row(trial, self.limit_bytes) for trial in self.trials]
        return "\n".join([TRIAL_HEADER, *rows])

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Return memory over size as a matplotlib ``Figure`` of its own, written to ``path`` too.

        Args:
            path: A file that ends in .png, .svg or .pdf; written whole or not at all.

        Raises:
            ImportError: If matplotlib is not installed: ``pip install 'torch-autobatch[plot]'``.
            ValueError: If nothing can be written to ``path``.
        """
        figure = memory_over_size(self)
        if path is not None:
            save(figure, path)
        return figure

    def __str__(self) -> str:
        trials = [trial for trial in self.trials if not trial.repeated]
        failed, repeats = sum(not t.fits for t in trials), len(self.trials) - len(trials)
        peak = "" if self.peak_bytes is None else f", peak {format_bytes(self.peak_bytes)}"
        limit = f"{self.limited_by}{memory_unused(self)}"
        upper = self.upper.under(self.limit_bytes)
        return (
            f"tolerable batch {self.size} (limited by {limit}, {upper}{peak} of "
            f"{format_bytes(self.limit_bytes)}; {count(len(trials), 'trial')}, "
            f"{failed} failed{f', {repeats} repeated' * bool(repeats)})"
            + "".join(f"\nnote: {note}" for note in self.notes)
        )


_VERDICTS: Final = {
    Verdict.OUT_OF_MEMORY: "out of memory",
    Verdict.TOO_LARGE: "too large",
    Verdict.FATAL: "device lost",
    Verdict.SUSPECT: "perhaps memory",
    Verdict.TOO_SLOW: "too slow",
    Verdict.OTHER: "error",
}
TRIAL_HEADER: Final = (
    f"{'size':>7}   {'verdict':<14}   {'peak':>10}   {'of limit':>8}   {'seconds':>7}"
)


def memory_unused(search: SearchResult) -> str:
    """Return what a limit that is not memory's leaves of it, in words; ``""`` otherwise."""
    if search.limited_by not in ("kernel", "time") or search.breakdown is None:
        return ""
    return f" and not by memory: {format_bytes(search.breakdown.free_bytes)} unused"


def _share(part: float) -> str:
    return f"{part:.1%}" if part >= 0.0005 or not part else "<0.1%"


def trial_row(trial: Trial, limit_bytes: int) -> str:
    """Return the trial as a row below ``TRIAL_HEADER``."""
    verdict = "fits" if trial.failure is None else _VERDICTS[trial.failure]
    peak = share = "-"
    if trial.peak_bytes is not None:
        peak = format_bytes(trial.peak_bytes)
        share = _share(trial.peak_bytes / max(limit_bytes, 1))
    row = f"{trial.size:>7}   {verdict:<14}   {peak:>10}   {share:>8}   {trial.seconds:>7.1f}"
    return row + "  again" * trial.repeated
