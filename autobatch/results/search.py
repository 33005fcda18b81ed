"""The result of a search: its trials, its speeds, and the tolerable batch."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from autobatch.results.memory import Breakdown
from autobatch.results.plot import memory_over_size, save
from autobatch.results.verdict import Verdict
from autobatch.units import count, format_bytes, format_share

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_AS_FAST: Final = 0.02  # A gain in throughput that is not worth more memory.
LimitedBy = Literal["memory", "ceiling", "data", "kernel", "time", "crash"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """The memory of one phase of a trial: a micro-batch, or the optimizer step.

    Attributes:
        floor_bytes: Bytes allocated when the phase starts.
        peak_bytes: The most bytes allocated at once during the phase.

    Example::

        phase = Phase(floor_bytes=100, peak_bytes=250)
        assert phase.peak_bytes - phase.floor_bytes == 150
    """

    floor_bytes: int
    peak_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherProcess:
    """Another process that uses the same device.

    Attributes:
        pid: The process number that the driver reports. In a container, it is the number outside
            the container.
        used_bytes: The memory of the process; None if the driver does not report it.
    """

    pid: int
    used_bytes: int | None

    def __str__(self) -> str:
        held = "memory" if self.used_bytes is None else format_bytes(self.used_bytes)
        return f"process {self.pid} holds {held}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """The trial of one size: a few micro-batches and an optimizer step ran, or failed.

    A trial is true if its size fits.

    Example::

        data = (torch.randn(64, 4), torch.randint(0, 2, (64,)))
        trial = check(nn.Linear(4, 2), data, size=32)
        if trial:
            print(trial.peak_bytes, "bytes in", trial.seconds, "seconds")
        else:
            print(trial.failure, trial.message)

    Attributes:
        size: Examples in each micro-batch.
        fits: Whether the whole trial ran within the memory limit.
        failure: Why the trial failed; None if the size fits.
        peak_bytes: The most bytes allocated at once; None for a failed trial.
        reserved_bytes: The most bytes that the caching allocator held; None for a failed trial, and
            on devices without a caching allocator.
        seconds: The duration of the trial.
        message: The text of the error; ``""`` if the size fits.
        phases: The memory of the first micro-batch, of the later micro-batches, and of the
            optimizer step. Empty for a failed trial, and if memory was not read.
        explained: For a failure, whether memory was near the limit when the trial failed.
        needed_bytes: For a failure, a lower bound on the bytes that the size needs; otherwise 0.
        repeated: Whether the size had been tried before in the same search.
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
    """Why no larger size is tolerable.

    Example::

        upper = Upper(reason="extrapolated", size=129, bytes=2**30)
        assert str(upper) == "129 would need at least 1.0 GiB"

    Attributes:
        reason: ``"ran out"``: a trial of the next larger size failed. ``"extrapolated"``: the next
            larger size would need more memory than the limit, by an estimate from the memory of
            smaller sizes. ``"ceiling"``: there is no larger size.
        size: The smallest size that is not tolerable; None at the ceiling.
        bytes: The fewest bytes that ``size`` would need; None unless extrapolated.
    """

    reason: Literal["ran out", "extrapolated", "ceiling"]
    size: int | None = None
    bytes: int | None = None

    def __str__(self) -> str:
        if self.size is None:
            return "at the ceiling"
        if self.bytes is None:
            return f"{self.size} failed"
        return f"{self.size} would need at least {format_bytes(self.bytes)}"

    def under(self, limit_bytes: int) -> str:
        """Return the reason in words; with the missing bytes if rounding would hide them."""
        needed = 0 if self.bytes is None else self.bytes
        if needed <= limit_bytes or format_bytes(needed) != format_bytes(limit_bytes):
            return str(self)
        short = format_bytes(needed - limit_bytes)
        return f"{self.size} would need at least {short} more than the limit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """The training throughput with micro-batches of one size.

    Example::

        speed = Speed(size=64, examples_per_second=1250.0, windows=5)
        assert str(speed) == "64: 1250 examples a second"

    Attributes:
        size: Examples in the largest micro-batch.
        examples_per_second: The median over the timed logical batches, without data loading.
        windows: The number of timed logical batches.
    """

    size: int
    examples_per_second: float
    windows: int

    def __str__(self) -> str:
        return f"{self.size}: {self.examples_per_second:.4g} examples a second"


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """The tolerable batch, and how it was found. It can be used as an ``int``.

    Example::

        data = (torch.randn(64, 4), torch.randint(0, 2, (64,)))
        search = find_batch_size(nn.Linear(4, 2), data)
        assert int(search) == search.size
        print(search.table())  # One line per trial.

    Attributes:
        size: The tolerable batch, in examples: the largest size that ran in a trial.
        trials: All trials, in order.
        ceiling: The largest size that the search considered, in examples.
        limit_bytes: The bytes that a trial was allowed to allocate.
        limited_by: What keeps ``size`` from being larger: ``"memory"``; ``"ceiling"``, the argument
            or the logical batch; ``"data"``, the number of examples; ``"kernel"``, the limit of an
            index or a kernel; ``"time"``, ``timeout_seconds``; ``"crash"``, the end of the process.
        upper: Why no larger size is tolerable.
        worst_case: Which examples the trials repeated, in words.
        speeds: The throughput of ``size`` and a few smaller sizes; empty unless
            ``prefer="fastest"``.
        others: Other processes on the device at the start of the search, if the driver lists them.
        breakdown: Where the memory goes at ``size``; None if it was not measured.
        notes: Remarks about the memory, such as fragmentation or a fallback of the driver.
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
        """The peak bytes of the last trial at ``size``; None if memory was not measured."""
        peaks = (t.peak_bytes for t in reversed(self.trials) if t.fits and t.size == self.size)
        return next(peaks, None)

    @property
    def fastest(self) -> int:
        """The smallest size within 2 % of the best throughput; ``size`` if none was timed."""
        if not self.speeds:
            return self.size
        enough = (1 - _AS_FAST) * max(speed.examples_per_second for speed in self.speeds)
        return min(s.size for s in self.speeds if s.examples_per_second >= enough)

    def table(self) -> str:
        """Return a table of all trials as text: a header, and one line per trial."""
        rows = [trial_row(trial, self.limit_bytes) for trial in self.trials]
        return "\n".join([TRIAL_HEADER, *rows])

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Return a plot of memory over size as a matplotlib ``Figure``.

        Args:
            path: A file to write the plot to, ending in .png, .svg or .pdf; None writes no file.

        Raises:
            ImportError: If matplotlib is not installed: ``pip install 'torch-autobatch[plot]'``.
            ValueError: If ``path`` cannot be written to.
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
    """Return how much memory is free if a kernel or the time limits the size; else ``""``."""
    if search.limited_by not in ("kernel", "time") or search.breakdown is None:
        return ""
    return f" and not by memory: {format_bytes(search.breakdown.free_bytes)} unused"


def trial_row(trial: Trial, limit_bytes: int) -> str:
    """Return the trial as a line of the table below ``TRIAL_HEADER``."""
    verdict = "fits" if trial.failure is None else _VERDICTS[trial.failure]
    peak = share = "-"
    if trial.peak_bytes is not None:
        peak = format_bytes(trial.peak_bytes)
        share = format_share(trial.peak_bytes / max(limit_bytes, 1))
    row = f"{trial.size:>7}   {verdict:<14}   {peak:>10}   {share:>8}   {trial.seconds:>7.1f}"
    return row + "  again" * trial.repeated
