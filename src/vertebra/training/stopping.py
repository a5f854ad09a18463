"""SIGTERM and Ctrl-C as requests: the loop finishes its step, writes a checkpoint and leaves."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):
    """Leaves a stretch that changes nothing, such as an evaluation, as soon as the signal arrives."""


class Stop:
    """Notes the signals while it is entered, in the main thread; elsewhere it notes nothing.

    A second Ctrl-C is a plain `KeyboardInterrupt`. The handlers found are put back on leaving.

    Attributes:
        requested: the signal that arrived, or None.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._raises = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number)
        if self._raises:
            self._raises = False
            raise Stopped

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within this block a signal raises `Stopped` where it finds the code."""
        self._raises = True
        try:
            if self.requested:
                raise Stopped
            yield
        finally:
            self._raises = False
