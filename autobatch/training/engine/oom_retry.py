"""Decide whether a logical batch runs again after an out-of-memory error, and in which size."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from autobatch.data.tree import BatchTree, describe, size_of
from autobatch.devices.base import MemoryDevice
from autobatch.devices.oom import MEMORY_VERDICTS, verdict_of
from autobatch.errors import DoesNotFitError, ReplayLimitError
from autobatch.results.verdict import Verdict
from autobatch.training.engine.micro_batch_size import MicroBatchSize

MOST_RETRIES: Final = 16  # For one logical batch: by then it is cut into 65536 times as many parts.


@dataclass(slots=True, kw_only=True)
class OomRetry:
    """The retries of one logical batch.

    Attributes:
        batch: The logical batch.
        micro_batch_size: The micro-batch size in use; it becomes smaller with each failure.
        device: Its memory is read after each failure, for the message of ``ReplayLimitError``.
        limit_bytes: The memory limit of a step, or None.
        failures: The device's memory after each failure, oldest first.
    """

    batch: BatchTree
    micro_batch_size: MicroBatchSize
    device: MemoryDevice
    limit_bytes: int | None
    failures: list[dict[str, int]] = field(default_factory=list)

    def is_memory_error(self, error: Exception, sizes: Sequence[int]) -> bool:
        """Return whether smaller micro-batches may avoid ``error``.

        Args:
            error: Raised while micro-batches of ``sizes`` ran.
            sizes: Examples in each micro-batch.
        """
        verdict = verdict_of(error)
        if (
            verdict is Verdict.SUSPECT
        ):  # If it occurs with one example too, memory is not the cause.
            return max(sizes) > 1
        # BatchNorm refuses a single example. After a retry the cause of that is missing memory.
        cut_to_one = bool(self.failures) and min(sizes) == 1 and isinstance(error, ValueError)
        return verdict in MEMORY_VERDICTS or cut_to_one

    def smaller_size(self, failed: int, message: str) -> int:
        """Record a failure, and return the micro-batch size to try next.

        Call it after the memory of the failed attempt was released.

        Args:
            failed: Examples in the largest micro-batch of the failed attempt.
            message: The text of its error.

        Raises:
            DoesNotFitError: If a micro-batch of one example failed twice.
            ReplayLimitError: If the logical batch has failed more than ``MOST_RETRIES`` times.
        """
        twice_with_one = (
            failed == 1 and bool(self.failures) and self.failures[-1]["micro_batch"] == 1
        )
        reading = self.device.read()
        self.failures.append(
            {
                "micro_batch": failed,
                "allocated": reading.allocated_bytes,
                "reserved": reading.reserved_bytes,
                "free": reading.free_bytes,
            }
        )
        if twice_with_one:
            raise DoesNotFitError(1, self.limit_bytes, message=message)
        if len(self.failures) > MOST_RETRIES:
            raise ReplayLimitError(describe(self.batch), self.failures, message)
        return self.micro_batch_size.failed(size_of(self.batch), failed, len(self.failures))
