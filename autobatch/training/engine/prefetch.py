"""Copy micro-batches to the device, the next one while the current one computes."""

import functools
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from autobatch.data.tree import BatchTree, map_tensors, unwrapped
from autobatch.devices.base import MemoryDevice


class Prefetcher:
    """Copies batches to one device.

    If the device copies ahead, the next micro-batch is on it while the current one computes. On any
    other device each micro-batch is copied when it is needed.

    Args:
        device: The device of the model.
    """

    def __init__(self, device: MemoryDevice) -> None:
        self._device = device
        self._torch_device = device.torch_device

    @property
    def copies_ahead(self) -> bool:
        """True if the next micro-batch is on the device while the current one computes."""
        return self._device.copies_ahead

    def move(self, batch: BatchTree, *, only_reads_targets: bool = False) -> BatchTree:
        """Return a copy on the device, because a model may work in place on its inputs.

        Args:
            batch: On the host or on any device.
            only_reads_targets: True if nothing writes to the last item of a tuple. If that item is
                on the device already, it is not copied.
        """
        if type(batch) is tuple and all(map(self._is_on_device, batch)):  # A shortcut on the CPU.
            copied = len(batch) - only_reads_targets
            return (*(tensor.clone() for tensor in batch[:copied]), *batch[copied:])
        return unwrapped(map_tensors(self._copied, batch))

    def _is_on_device(self, item: object) -> bool:
        return type(item) is Tensor and item.device == self._torch_device

    def _copied(self, tensor: Tensor) -> Tensor:
        if tensor.device == self._torch_device:
            return tensor.clone()
        return self._device.copied(tensor)

    def __call__(
        self,
        micro_batches: Sequence[BatchTree],
        *,
        only_reads_targets: bool = False,
        more_follow: bool = False,
    ) -> Iterator[BatchTree]:
        """Return the micro-batches on the device, in order.

        Args:
            micro_batches: On the host or on any device.
            only_reads_targets: As for ``move``.
            more_follow: True if these are the first micro-batches of a longer logical batch. Then
                one more copy is made behind the last one, so that a trial needs as much memory as
                training.
        """
        if not self.copies_ahead:
            move = functools.partial(self.move, only_reads_targets=only_reads_targets)
            return map(move, micro_batches)
        return self._copy_ahead(micro_batches, more_follow=more_follow)

    def _copy_ahead(
        self, micro_batches: Sequence[BatchTree], *, more_follow: bool
    ) -> Iterator[BatchTree]:
        following = self._start_copy(micro_batches[0])
        for micro_batch in (*micro_batches[1:], *(micro_batches[-1:] if more_follow else ())):
            current, following = following, self._start_copy(micro_batch)
            yield self._finish_copy(*current)
            del current
        if not more_follow:
            yield self._finish_copy(*following)

    def _start_copy(self, micro_batch: BatchTree) -> tuple[BatchTree, Callable[[], None]]:
        """Begin to copy a micro-batch; return it with a function that waits for the copy."""
        return self._device.start_copy(lambda copied: map_tensors(copied, micro_batch))

    def _finish_copy(self, micro_batch: BatchTree, wait: Callable[[], None]) -> BatchTree:
        wait()
        return unwrapped(micro_batch)
