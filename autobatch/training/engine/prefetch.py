"""The micro-batches of a window on the device: one is copied while another computes."""

import functools
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from autobatch.data.tree import BatchTree, map_tensors, unwrapped
from autobatch.devices.base import MemoryDevice


class Prefetcher:
    """Moves host batches to one device.

    Where the device copies ahead, one more micro-batch than computes is there at any time. On any
    other GPU each is copied when it is needed, and on the CPU there is one place for all.

    Args:
        device: Where micro-batches go.
    """

    def __init__(self, device: MemoryDevice) -> None:
        self._device = device
        self._place = device.torch_device

    @property
    def copies_ahead(self) -> bool:
        """Whether the next micro-batch is on the device while the current one computes."""
        return self._device.copies_ahead

    def move(self, nest: BatchTree, *, targets_are_read: bool = False) -> BatchTree:
        """Return a copy on the device: a model that works in place must not reach the original.

        Args:
            nest: On the host, or wherever it is.
            targets_are_read: Whether nobody writes to the last item of a tuple. Such an item is not
                copied if it lies on the device already.
        """
        if type(nest) is tuple and all(map(self._is_here, nest)):  # The short way on the CPU.
            copied = len(nest) - targets_are_read
            return (*(tensor.clone() for tensor in nest[:copied]), *nest[copied:])
        return unwrapped(map_tensors(self._moved, nest))

    def _is_here(self, item: object) -> bool:
        return type(item) is Tensor and item.device == self._place

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.clone() if tensor.device == self._place else self._device.copied(tensor)

    def __call__(
        self,
        parts: Sequence[BatchTree],
        *,
        targets_are_read: bool = False,
        more_follow: bool = False,
    ) -> Iterator[BatchTree]:
        """Return the parts, on the device, in order.

        Args:
            parts: On the host, or wherever they are.
            targets_are_read: As for ``move``.
            more_follow: Whether the parts stand for a longer window, so that another one is on its
                way behind the last one: a trial's memory must be that of training.
        """
        if not self.copies_ahead:
            return map(functools.partial(self.move, targets_are_read=targets_are_read), parts)
        return self._ahead(parts, more_follow=more_follow)

    def _ahead(self, parts: Sequence[BatchTree], *, more_follow: bool) -> Iterator[BatchTree]:
        ahead = self._sent(parts[0])
        for part in (*parts[1:], *(parts[-1:] if more_follow else ())):
            current, ahead = ahead, self._sent(part)
            yield self._arrived(*current)
            del current
        if not more_follow:
            yield self._arrived(*ahead)

    def _sent(self, part: BatchTree) -> tuple[BatchTree, Callable[[], None]]:
        """Begin to copy one; with what must be called before it is used."""
        return self._device.start_copy(lambda copied: map_tensors(copied, part))

    def _arrived(self, nest: BatchTree, wait: Callable[[], None]) -> BatchTree:
        wait()
        return unwrapped(nest)
