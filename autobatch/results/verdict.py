"""Verdicts: how an error is classified."""

import enum


class Verdict(enum.Enum):
    """The meaning of an error for the batch size that raised it.

    Attributes:
        OUT_OF_MEMORY: Memory ran out. A smaller size may fit.
        TOO_LARGE: The size exceeds a limit of an index or a kernel. A smaller size may run.
        FATAL: The context of the device is lost. This process cannot use the device any more.
        SUSPECT: The error may come from a lack of memory. A search decides by a second trial.
        TOO_SLOW: The trial took longer than ``timeout_seconds``.
        OTHER: The error has nothing to do with the size, such as an error of the user's code.

    Example::

        verdict = verdict_of(RuntimeError("CUDA error: out of memory"))
        assert verdict is Verdict.OUT_OF_MEMORY
    """

    OUT_OF_MEMORY = "out of memory"
    TOO_LARGE = "too large for an index or a kernel"
    FATAL = "the device's context is lost"
    SUSPECT = "perhaps memory"
    TOO_SLOW = "too slow"
    OTHER = "the user's error"
