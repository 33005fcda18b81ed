"""The options of a search, checked when they are made."""

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
    """Options of the search for the tolerable batch.

    Example::

        options = SearchOptions(multiple_of=8, confirm="failed", budget_seconds=60)

    Attributes:
        confirm: What must exclude the next larger size. ``"failed"``: a trial of it that ran out of
            memory. ``"extrapolated"``: such a trial, or an estimate from the memory of smaller
            sizes that is above the limit.
        multiple_of: Tried sizes and the micro-batches of training are multiples of this, which
            tensor cores prefer. With 8, 256 examples of which 100 fit are cut into 88 + 88 + 80.
            The undivided batch is tried even if it is no multiple.
        timeout_seconds: A size whose trial takes longer is not tolerable; None sets no timeout. The
            time is checked between micro-batches, so a trial that hangs is not stopped. With
            ``isolate=True`` its process is stopped after twice this time. The first step of the
            search, which may load kernels and compile, has no timeout.
        budget_seconds: No trial starts later than this many seconds after the first; None sets no
            budget.
        worst_case: The examples that trials repeat. ``"longest"``: the longest example of the
            first batch, or a longer one if some is found among up to 256 examples of a Dataset or
            a DataLoader without workers. ``"first"``: the first batch. A batch: that batch.
        isolate: Run the trials in another process, which takes some seconds to start. This process
            then uses no GPU and its objects do not change. A size at which the other process dies,
            loses its device or hangs is not tolerable; the search continues in a new process.
        prior: A first guess of the answer: a number of examples, or a ``Prediction`` for this
            device, whose ``tolerable`` is used. The guess is tried after one small size, unless
            the memory of that size shows that more fits. The memory of the small size and the
            limit of the device correct a prediction. A wrong guess costs one trial, seldom two.
            None: no guess.
        floor: The smallest size to try, in examples. ``DoesNotFitError`` is raised if it does not
            fit. The undivided batch is tried even if it is smaller. Training may still use smaller
            micro-batches after it runs out of memory.
        forget_errors: Delete the last error, which a notebook or a Python prompt keeps in
            ``sys.last_exc``, before the search. Its traceback keeps the tensors of the failed code
            in memory.

    Raises:
        TypeError, ValueError: If an option is invalid. The message names the valid values.
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
        prior = as_prior(self.prior)  # A Prior is kept: a Prediction would keep its model alive.
        if prior is not None:
            object.__setattr__(self, "prior", prior if prior.peaks else prior.tolerable)

    @property
    def first_guess(self) -> Prior | None:
        """The prior as a ``Prior``, or None."""
        return as_prior(self.prior)

    @property
    def patience_seconds(self) -> float | None:
        """Seconds until the process of a trial that hangs is stopped; a trial may run twice."""
        return None if self.timeout_seconds is None else 2 * self.timeout_seconds

    def candidates(self, largest: int) -> range:
        """Return the sizes up to ``largest`` that may be tried.

        Raises:
            ValueError: If no size is left.
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
        """Return the sizes, which ascend, from ``floor`` on; the last size is always kept."""
        return [size for size in sizes if size >= self.floor] or sizes[-1:]


def check_search(search: object) -> None:
    """Raise unless ``search`` is a ``SearchOptions``.

    Raises:
        TypeError: With the invalid value.
    """
    if not isinstance(search, SearchOptions):
        raise TypeError(f"search must be SearchOptions(...), got {search!r}")


STANDARD_SEARCH: Final = SearchOptions()
