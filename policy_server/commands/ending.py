"""Ends the training process within a bound after SIGINT or SIGTERM, whatever it is doing.

The signal becomes a ``KeyboardInterrupt`` in the main thread, the one exception that Ray lets
through its blocking calls. A watcher thread sees the signal even while the main thread sits in
native code, and ends the process when the orderly way takes too long.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

GRACE_S = 4.0
"""From the signal to the end of the process; a second less than promised, for a busy machine."""

SIGNALS = (signal.SIGINT, signal.SIGTERM)

_SHOW_CURSOR = "\x1b[?25h"


class Ending:
    """A context in which signals end the process in time. Main thread only.

    Example::

        with Ending() as ending:
            try:
                work()
            except KeyboardInterrupt:
                clean_up()
        sys.exit(ending.exit_code)

    Attributes:
        signal: The first signal that came; None so far.
    """

    def __init__(self, grace_s: float = GRACE_S) -> None:
        self.signal: int | None = None
        self._grace_s = grace_s
        self._at_once = False
        self._over = threading.Event()
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._previous: dict[int, Any] = {}
        self._previous_fd = -1

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells say it; 0 if none came."""
        return 128 + self.signal if self.signal else 0

    def __enter__(self) -> Self:
        self._previous = {number: signal.getsignal(number) for number in SIGNALS}
        self._previous_fd = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self.install()
        threading.Thread(target=self._watch, name="ending", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.signal is None:  # else the watcher stays: the interpreter's own end takes time, too
            self._over.set()
        signal.set_wakeup_fd(self._previous_fd)
        for number, handler in self._previous.items():
            # Once one came the process is on its last lines, which a second must not spoil.
            signal.signal(number, handler if self.signal is None else signal.SIG_IGN)
        os.close(self._writer)  # lets the watcher go, which closes the other end

    def leave(self, code: int) -> None:
        """End the process with that code, if a signal came; all is cleaned up and said.

        The interpreter's own end has no bound, for the watcher stops with it: where much is loaded
        and the machine is busy, it takes seconds.
        """
        if self.signal is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def install(self) -> None:
        """Take the signals (again), from whoever has taken them meanwhile."""
        for number in SIGNALS:
            signal.signal(number, self._interrupt)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a signal ends the process at once, and nothing is interrupted before.

        For native code with nothing to clean up yet, such as the start of Ray, which ends in a
        segmentation fault where an exception has torn it apart.
        """

        def install(number: int, handler: Any) -> Any:
            # Ray would have SIGTERM raise SystemExit in the midst of its own start.
            return signal.getsignal(number) if number in SIGNALS else real(number, handler)

        real = signal.signal
        signal.signal = install  # type: ignore[assignment]
        self._at_once = True
        try:
            yield
        finally:
            signal.signal = real
            self._at_once = False
            if self.signal is not None:  # it came so late that there is something to clean up
                raise KeyboardInterrupt

    def _interrupt(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is None:  # later ones must not disturb the cleaning up
            self.signal = number
            if not self._at_once:
                raise KeyboardInterrupt

    def _watch(self) -> None:
        with contextlib.closing(os.fdopen(self._reader, "rb", buffering=0)) as pipe:
            while received := pipe.read(1):
                if received[0] in SIGNALS:
                    break
            else:
                return
            if self._at_once:
                print(f"stopped by {signal.Signals(received[0]).name}")
            elif self._over.wait(self._grace_s):
                return
            else:
                late = f"not ended {self._grace_s:g} s after the signal: ending now"
                print(late, file=sys.stderr)
        if sys.stdout.isatty():
            print(_SHOW_CURSOR, end="")  # a live display has hidden it
        sys.stdout.flush()
        sys.stderr.flush()
        # The kernel would have the node follow, but some of Ray's helpers take their time.
        for child in _children("self"):
            _kill_tree(child)
        os._exit(128 + received[0])


def _children(pid: int | str) -> list[int]:
    found: list[int] = []
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread is gone
            found += map(int, listed.read_text(encoding="ascii").split())
    return found


def _kill_tree(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGSTOP)  # so that it starts no more of them meanwhile
        for child in _children(pid):
            _kill_tree(child)
        os.kill(pid, signal.SIGKILL)
