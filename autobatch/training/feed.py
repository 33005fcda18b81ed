"""The micro-batches of a window on the device: the next one moves while the current computes."""

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from autobatch.batches.nest import Nest, map_tensors, unwrapped


class Feed:
    """Moves host batches to one device.

    On CUDA the next micro-batch is copied from pinned memory on a stream of its own, so one more
    than computes is there at any time. On any other GPU each is copied when it is asked for, and
    on the CPU nothing moves: there is one.

    Args:
        device: Where micro-batches go.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_cpu = device.type == "cpu"
        self._stream: torch.cuda.Stream | None = None

    @property
    def sends_ahead(self) -> bool:
        """Whether the next micro-batch is on the device while the current one computes."""
        return self._device.type == "cuda"

    def move(self, nest: Nest, *, targets_are_read: bool = False) -> Nest:
        """Return a copy on the device: a model that works in place must not reach the original.

        Args:
            nest: On the host, or wherever it is.
            targets_are_read: Whether nobody writes to the last of a tuple, which then need not be
                copied where it does not move.
        """
        if type(nest) is tuple and self._on_cpu:  # The short way, for every micro-batch.
            kept = (
                nest[-1:]
                if targets_are_read and type(nest[-1]) is Tensor and nest[-1].is_cpu
                else ()
            )
            own = nest[: len(nest) - len(kept)]
            copies = [t.clone() for t in own if type(t) is Tensor and t.is_cpu]
            if len(copies) == len(own):
                return (*copies, *kept)
        return unwrapped(map_tensors(self._moved, nest))

    def _moved(self, tensor: Tensor) -> Tensor:
        if tensor.device == self._device:
            return tensor.clone()
        # Only CUDA is sure to have read memory that is not pinned before the call returns.
        return tensor.to(self._device, non_blocking=self._device.type == "cuda", copy=True)

    def __call__(
        self, parts: Sequence[Nest], *, targets_are_read: bool = False, more_follow: bool = False
    ) -> Iterator[Nest]:
        """Return the parts, on the device, in order.

        Args:
            parts: On the host, or wherever they are.
            targets_are_read: As ``move`` takes it.
            more_follow: Whether these stand for a longer window, so that behind the last one
                another is on its way: a trial's memory must be that of training.
        """
        if not self.sends_ahead:
            return map(functools.partial(self.move, targets_are_read=targets_are_read), parts)
        return self._ahead(parts, more_follow=more_follow)

    def _ahead(self, parts: Sequence[Nest], *, more_follow: bool) -> Iterator[Nest]:
        ahead = self._sent(parts[0])
        for part in (*parts[1:], *(parts[-1:] if more_follow else ())):
            current, ahead = ahead, self._sent(part)
            yield self._arrived(*current)
            del current
        if not more_follow:
            yield self._arrived(*ahead)

    def _sent(self, part: Nest) -> tuple[Nest, torch.cuda.Event]:
        """Begin to copy one on the side stream; with what happens when it is there."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        # The copy may take the memory of the last but one, whose work is on the current stream.
        # So no record_stream is needed, which would hold memory for as long as the host runs ahead.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            copy = map_tensors(self._copied, part)
        return copy, self._stream.record_event()

    def _copied(self, tensor: Tensor) -> Tensor:
        if 0 in tensor.stride():  # Expanded: several elements in one place cannot be written to.
            tensor = tensor.contiguous()
        if (
            tensor.device.type == "cpu"
            and not tensor.is_pinned()
            and tensor.layout is torch.strided
        ):
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True, copy=True)

    def _arrived(self, nest: Nest, copied: torch.cuda.Event) -> Nest:
        """Let the current stream wait for the copy."""
        torch.cuda.current_stream(self._device).wait_event(copied)
        return unwrapped(nest)
