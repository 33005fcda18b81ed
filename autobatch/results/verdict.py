"""What an error means for the size that was tried."""

import enum


class Verdict(enum.Enum):
    """What an error says about the size that raised it."""

    OUT_OF_MEMORY = "out of memory"
    TOO_LARGE = "too large for an index or a kernel"
    FATAL = "the device's context is lost"
    SUSPECT = "perhaps memory"
    TOO_SLOW = "too slow"
    OTHER = "the user's error"
