"""Handling of Ctrl-C and SIGTERM: they end a run after the current step."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

__all__ = ["StopSignals"]


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """Context that notices the first interrupt; a second one acts as usual.

    Only the main thread can handle signals, so other threads notice none.
    """

    def __init__(self) -> None:
        self.noticed = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._notice) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self.noticed = True
        self.__exit__()
