"""Defer Ctrl-C and SIGTERM to the end of a block, or to a point between two steps."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Final, NoReturn

_Handler = Callable[[int, FrameType | None], object]
_STOPS: Final = (signal.SIGINT, signal.SIGTERM)


@dataclass(slots=True)
class GracefulStop:
    """The signal that requests this process to stop, if one has arrived.

    Attributes:
        signal: The first signal that arrived, or None.
    """

    signal: int | None = None

    def go(self, message: str = "") -> NoReturn:
        """Stop the process as the signal requires.

        Args:
            message: The message of the KeyboardInterrupt.

        Raises:
            KeyboardInterrupt: After Ctrl-C.
            SystemExit: After SIGTERM, with the exit status of shells, 128 + 15.
        """
        if self.signal == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
        raise KeyboardInterrupt(message) if message else KeyboardInterrupt


@contextmanager
def deferred_signals() -> Iterator[GracefulStop]:
    """Record the first Ctrl-C or SIGTERM instead of stopping; the second one stops at once.

    A recorded signal takes effect at the end of the block, unless the block calls ``go`` before.
    Only the main thread receives signals, so nothing is deferred in other threads.
    """
    stop = GracefulStop()

    def record(number: int, frame: FrameType | None) -> None:  # noqa: ARG001  # The signature of a signal handler.
        # Forked workers of a DataLoader inherit this handler, and Ctrl-C reaches all processes.
        if stop.signal is None:
            stop.signal = number
        else:
            stop.go()

    with _handled_by(record, _STOPS):
        yield stop
    if stop.signal is not None:
        stop.go()


@contextmanager
def deferred_interrupt() -> Iterator[None]:
    """Defer Ctrl-C to the end of the block, where the previous handler receives it.

    Only the main thread receives signals, so nothing is deferred in other threads.
    """
    held: list[FrameType | None] = []
    with _handled_by(lambda _, frame: held.append(frame), (signal.SIGINT,)) as before:
        yield
    outer = before.get(signal.SIGINT)
    if held and callable(outer):
        outer(signal.SIGINT, held[0])


@contextmanager
def _handled_by(
    handler: _Handler, numbers: tuple[signal.Signals, ...]
) -> Iterator[dict[signal.Signals, object]]:
    """Install a handler for the block; yield the previous handlers by signal."""
    if threading.current_thread() is not threading.main_thread():
        yield {}
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield dict(before)
    finally:
        for number, outer in before.items():
            # None: the handler was not installed from Python, so it cannot be restored.
            default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, default if outer is None else outer)
