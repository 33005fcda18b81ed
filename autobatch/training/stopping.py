"""Ctrl-C and SIGTERM, held back until the step that runs is done."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Final, NoReturn

_HELD: Final = (signal.SIGINT, signal.SIGTERM)


@dataclass(slots=True)
class Stop:
    """Whether the process was asked to stop.

    Attributes:
        signal: The first that came, or None.
    """

    signal: int | None = None

    def go(self, told: str = "") -> NoReturn:
        """Do now what the signal asks for.

        Args:
            told: What whoever pressed Ctrl-C should know.

        Raises:
            KeyboardInterrupt: After Ctrl-C.
            SystemExit: After SIGTERM, with the status that a shell shows for it.
        """
        if self.signal == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
        raise KeyboardInterrupt(told) if told else KeyboardInterrupt


@contextmanager
def held_back() -> Iterator[Stop]:
    """Note the first signal instead of obeying it; the second one is obeyed at once.

    One that nobody has asked for is obeyed at the end. Only the main thread receives signals: in
    any other this does nothing.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(number: int, frame: FrameType | None) -> None:  # noqa: ARG001  # As signal calls it.
        # Also in a loader's worker that was forked with it: Ctrl-C reaches all processes.
        if stop.signal is None:
            stop.signal = number
        else:
            stop.go()

    before = {number: signal.signal(number, note) for number in _HELD}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
    if stop.signal is not None:
        stop.go()
