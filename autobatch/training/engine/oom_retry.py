"""What happens when memory runs out in a logical batch: whether it runs again, and how small."""

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
    """Decides for one logical batch.

    Attributes:
        batch: The logical batch.
        size: The micro-batch size in use, which becomes smaller.
        device: Read after each failure, for the error that names them all.
        limit_bytes: What a step may allocate, or None.
        failures: What the device held after each failure, oldest first.
    """

    batch: BatchTree
    size: MicroBatchSize
    device: MemoryDevice
    limit_bytes: int | None
    failures: list[dict[str, int]] = field(default_factory=list)

    def is_memory_error(self, error: Exception, sizes: Sequence[int]) -> bool:
        """Return whether smaller micro-batches may be the answer to ``error``.

        Args:
            error: Raised while micro-batches of ``sizes`` ran.
            sizes: Examples in each micro-batch.
        """
        verdict = verdict_of(error)
        if verdict is Verdict.SUSPECT:  # Perhaps memory. If one example fails as well, it is not.
            return max(sizes) > 1
        # BatchNorm refuses a single example. Where a retry has come to that, memory is the reason.
        cut_to_one = bool(self.failures) and min(sizes) == 1 and isinstance(error, ValueError)
        return verdict in MEMORY_VERDICTS or cut_to_one

    def smaller_size(self, failed: int, message: str) -> int:
        """Return the micro-batch size to try next, after the failed one was released.

        Args:
            failed: The largest micro-batch of the attempt that failed.
            message: What its error said.

        Raises:
            DoesNotFitError: If one example failed twice.
            ReplayLimitError: If the logical batch has failed too often.
        """
        twice_alone = failed == 1 and bool(self.failures) and self.failures[-1]["micro_batch"] == 1
        reading = self.device.read()
        self.failures.append(
            {
                "micro_batch": failed,
                "allocated": reading.allocated_bytes,
                "reserved": reading.reserved_bytes,
                "free": reading.free_bytes,
            }
        )
        if twice_alone:
            raise DoesNotFitError(1, self.limit_bytes, message=message)
        if len(self.failures) > MOST_RETRIES:
            raise ReplayLimitError(describe(self.batch), self.failures, message)
        return self.size.failed(size_of(self.batch), failed, len(self.failures))
