"""SIGTERM as a request that the training loop answers after the current step."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class StopRequest:
    """Context manager: inside, SIGTERM only sets `received`; afterwards the former handler is back.

    Outside the main thread, where Python allows no handlers, nothing is changed.
    """

    def __init__(self) -> None:
        self.received = False
        self._former: object = None
        self._active = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._former = signal.signal(signal.SIGTERM, self._handle)
            self._active = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._active:
            signal.signal(signal.SIGTERM, self._former if self._former is not None else signal.SIG_DFL)
            if self.received and kind is None:  # it came after the last step had looked
                signal.raise_signal(signal.SIGTERM)
