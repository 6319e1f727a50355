"""Notices to stop: SIGTERM from the machine, SIGINT from the user."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any


class StopNotice:
    """Remembers the first SIGTERM or SIGINT; the loop asks between two steps.

    Use as a context manager in the main thread. A second SIGINT raises KeyboardInterrupt at once.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def wanted(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> StopNotice:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.signal == signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or signal.Signals(number)
