"""Every deliberate error.

    AutobatchError
    ├── DeviceUnavailableError    the device asked for is not here
    ├── DoesNotFitError           not even one example fits
    ├── InexactStepError          splitting this step changes its result
    └── StepInterruptedError      memory ran out with an optimizer step half done

``ValueError`` and ``TypeError`` are for bad arguments; errors of the user's own code pass through.
"""

from collections.abc import Mapping

from autobatch.units import format_bytes


class AutobatchError(Exception):
    """The root of every error that autobatch raises on purpose, bad arguments apart."""


class DeviceUnavailableError(AutobatchError):
    """The device that was asked for is not here."""


class DoesNotFitError(AutobatchError):
    """Not even ``size`` examples fit inside ``limit_bytes``.

    Attributes:
        size: The smallest size of interest.
        limit_bytes: What was allowed; None where no limit was known.
        breakdown_bytes: What needs how many bytes, by name.
        message: What the last failure said.
    """

    def __init__(
        self,
        size: int,
        limit_bytes: int | None,
        breakdown_bytes: Mapping[str, int] | None = None,
        message: str = "",
    ) -> None:
        super().__init__(size, limit_bytes, breakdown_bytes, message)
        self.size = size
        self.limit_bytes = limit_bytes
        self.breakdown_bytes = dict(breakdown_bytes or {})
        self.message = message

    def __str__(self) -> str:
        where = "here" if self.limit_bytes is None else f"in {format_bytes(self.limit_bytes)}"
        needs = ", ".join(f"{name} {format_bytes(n)}" for name, n in self.breakdown_bytes.items())
        return (
            f"a batch of {self.size} does not fit {where}"
            + (f" ({needs})" if needs else "")
            + (f"; the last failure said: {self.message}" if self.message else "")
            + "; raise the limit, shrink the model or its inputs, checkpoint activations, or "
            "choose an optimizer with less state"
        )


class InexactStepError(AutobatchError):
    """Splitting this step changes its result, so autobatch refuses to take it."""


class StepInterruptedError(AutobatchError):
    """Memory ran out with an optimizer step half done: parameters or its state have moved."""
