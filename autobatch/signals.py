"""Ctrl-C and SIGTERM that take effect later: at the end of a block, or between two steps."""

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
    """Whether a signal has asked the process to stop.

    Attributes:
        signal: The first signal that arrived, or None.
    """

    signal: int | None = None

    def go(self, message: str = "") -> NoReturn:
        """Stop as the signal demands.

        Args:
            message: What the user who pressed Ctrl-C should know.

        Raises:
            KeyboardInterrupt: After Ctrl-C.
            SystemExit: After SIGTERM, with the status that a shell shows for SIGTERM.
        """
        if self.signal == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
        raise KeyboardInterrupt(message) if message else KeyboardInterrupt


@contextmanager
def deferred_signals() -> Iterator[GracefulStop]:
    """Record the first Ctrl-C or SIGTERM instead of stopping; the second one stops at once.

    A recorded signal that the block has not acted on takes effect at the end of the block. In any
    thread but the main one, which alone receives signals, nothing is deferred.
    """
    stop = GracefulStop()

    def record(number: int, frame: FrameType | None) -> None:  # noqa: ARG001  # As signal calls it.
        # A loader's worker that was forked has this handler too: Ctrl-C reaches all processes.
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
    """Let Ctrl-C take effect at the end of the block, by the handler that was there before.

    In any thread but the main one, which alone receives signals, nothing is deferred.
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
    """Install a handler inside the block; give the handlers that it replaces, by their signals."""
    if threading.current_thread() is not threading.main_thread():
        yield {}
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield dict(before)
    finally:
        for number, outer in before.items():
            # None: a handler that was not installed from Python, and cannot be from here.
            default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, default if outer is None else outer)
