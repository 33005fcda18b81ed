"""How a search is to be made: the user's options, checked before anything is touched."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, get_args

from autobatch.data.worst_case import WorstCase, check_worst_case
from autobatch.search.bracketing import Confirm
from autobatch.search.prior import HasTolerable, Prior, as_prior
from autobatch.validation import check_positive, check_size

_CONFIRM: Final = get_args(Confirm)


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchOptions:
    """How the tolerable batch is searched for.

    Attributes:
        confirm: Why nothing larger is taken. ``"extrapolated"``: the next larger size has run out,
            or what smaller ones used leaves no room for it. ``"failed"``: it has run out.
        multiple_of: Only multiples of this are tried, as tensor cores like them, and training cuts
            in them: 256 by 100 in eights is 88 + 88 + 80. The undivided batch is tried as it is.
        timeout_seconds: A size whose trial takes longer is not tolerable; None waits. It is looked
            at between micro-batches, so a trial that never returns is not ended, unless it is
            isolated: then its process is, after twice as long. The first step of all, which may
            load kernels and compile, is not timed.
        budget_seconds: No trial begins later; None sets no end.
        worst_case: What trials repeat. ``"longest"``: the longest example of the first batch or, if
            a Dataset or a DataLoader without workers has longer ones, of some that are looked at.
            ``"first"``: that of the first batch. Or a batch to use instead.
        isolate: Trials run in a process of their own, which takes some seconds to start. Here
            nothing is touched, and no GPU is. A size at which that process dies, loses its device
            or never returns is not tolerable, and the search goes on in a fresh one.
        prior: A first guess of the answer, in examples: a number, or a prediction for the device at
            hand, of which the safe end counts. It is tried after one small size, unless that has
            shown that more fits; a prediction is corrected by what that size used, and by the
            memory that is there. A wrong one costs a trial, seldom two. None guesses from the small
            size.
        floor: The smallest size of interest: where not even that fits, ``DoesNotFitError`` says so.
            The undivided batch is tried though it be smaller, and a replay in training may take
            less.
        forget_errors: Let go first of the error that a notebook or a prompt keeps in ``sys.last_*``
            to show its traceback: the tensors of what failed there stay alive with it.

    Raises:
        TypeError, ValueError: With the value that came and the way out.
    """

    confirm: Confirm = "extrapolated"
    multiple_of: int = 1
    timeout_seconds: float | None = None
    budget_seconds: float | None = None
    worst_case: WorstCase = "longest"
    isolate: bool = False
    prior: int | HasTolerable | None = None
    floor: int = 1
    forget_errors: bool = False

    def __post_init__(self) -> None:
        if self.confirm not in _CONFIRM:
            raise ValueError(f"confirm must be one of {_CONFIRM}, got {self.confirm!r}")
        for name in ("isolate", "forget_errors"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name in ("multiple_of", "floor"):
            object.__setattr__(self, name, check_size(name, getattr(self, name)))
        check_worst_case(self.worst_case)
        for name in ("timeout_seconds", "budget_seconds"):
            object.__setattr__(self, name, check_positive(name, getattr(self, name)))
        prior = as_prior(self.prior)  # A prediction holds a model, which need not be kept.
        if prior is not None:
            object.__setattr__(self, "prior", prior if prior.peaks else prior.tolerable)

    @property
    def first_guess(self) -> Prior | None:
        """The prior as a search goes by it."""
        return as_prior(self.prior)

    @property
    def patience_seconds(self) -> float | None:
        """When to end the process of a trial that does not look at its time: it may run twice."""
        return None if self.timeout_seconds is None else 2 * self.timeout_seconds

    def candidates(self, largest: int) -> range:
        """Return the sizes up to ``largest`` that may be tried.

        Raises:
            ValueError: If there is none.
        """
        step = self.multiple_of
        if largest < step:
            raise ValueError(f"no multiple of {step} is at most {largest}: lower multiple_of")
        first = -(-self.floor // step) * step
        if first > largest:
            raise ValueError(
                f"no multiple of {step} lies between {self.floor} and {largest}: lower floor"
            )
        return range(first, largest + 1, step)

    def not_below_floor(self, sizes: Sequence[int]) -> Sequence[int]:
        """Return those of ascending sizes that are of interest; the last one always is."""
        return [size for size in sizes if size >= self.floor] or sizes[-1:]


def check_search(search: object) -> None:
    """Refuse what are no options of a search.

    Raises:
        TypeError: With the value that came.
    """
    if not isinstance(search, SearchOptions):
        raise TypeError(f"search must be SearchOptions(...), got {search!r}")


STANDARD_SEARCH: Final = SearchOptions()
