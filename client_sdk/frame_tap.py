"""``FrameTap``: frames on their way from the thread that draws them to whoever watches."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from client_sdk.wire.faults import Fault


class FrameTap:
    """One watcher's newest frame: older ones that it did not take are gone."""

    def __init__(self, index: int, max_per_s: float) -> None:
        self.index = index
        self._pause_s = 1.0 / max_per_s if max_per_s > 0 else 0.0
        self._due = 0.0
        self._changed = threading.Condition()
        self._frame: NDArray[np.uint8] | None = None
        self._fault: Fault | None = None
        self._ended = False

    def due(self) -> bool:
        """Whether it is time for another frame. The environment's thread."""
        now = time.monotonic()
        if now < self._due:
            return False
        # A little late is made up for, a long pause is not.
        self._due = max(self._due, now - self._pause_s) + self._pause_s
        return True

    def offer(self, frame: NDArray[np.uint8]) -> None:
        """Give it a frame. The environment's thread."""
        with self._changed:
            self._frame = frame
            self._changed.notify()

    def end(self, fault: Fault | None = None) -> None:
        """There are no more. Any thread."""
        with self._changed:
            self._ended = True
            self._fault = self._fault or fault
            self._changed.notify()

    def frames(self) -> Iterator[NDArray[np.uint8]]:
        """Frames as they come; ends with the environment or the watcher.

        Raises:
            Fault: It cannot be watched.
        """
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ended or self._frame is not None)
                frame, self._frame = self._frame, None
                if frame is None:
                    if self._fault is not None:
                        raise self._fault
                    return
            yield frame
