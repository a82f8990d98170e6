"""``Guard``: who may use a client: one thread at a time, in the process that made it, while it is open.

Any thread.
"""

from __future__ import annotations

import os
import threading

from client_sdk.errors import ClosedClientError, ConcurrentUseError, ForkedClientError

# Between the first process and this one. gRPC survives none of them.
_forks = 0


def _count_fork() -> None:
    global _forks  # noqa: PLW0603
    _forks += 1


os.register_at_fork(after_in_child=_count_fork)


class Guard:
    """Lets one thread at a time in, and nobody after a fork or the end. Any thread.

    The lock is reentrant, for an interrupt (Ctrl-C) may strike between taking a lock and noting it:
    the same thread can then still go on, and close.

    Attributes:
        closed: Set once; nobody is let in afterwards.
    """

    __slots__ = ("_forks", "_lock", "_what", "closed", "take")

    def __init__(self, what: str) -> None:
        self._what = what
        self._lock = threading.RLock()
        self._forks = _forks
        self.closed = False
        self.take = self._lock.acquire

    @property
    def forked(self) -> bool:
        """Whether this process is a fork of the one that made it."""
        return self._forks != _forks

    def check(self) -> None:
        """Raise if nobody may come in any more.

        Raises:
            ForkedClientError: This is another process.
            ClosedClientError: It is closed.
        """
        if self._forks != _forks:
            raise ForkedClientError(
                f"this {self._what} was made before os.fork(), and its connection belongs to the "
                f"parent process; make a new {self._what} in this one"
            )
        if self.closed:
            raise ClosedClientError(f"this {self._what} is closed")

    def __enter__(self) -> None:
        if self._forks != _forks or self.closed:
            self.check()
        if not self._lock.acquire(blocking=False):
            raise ConcurrentUseError(
                f"another thread is inside this {self._what}, which is not thread-safe: "
                f"give each thread its own {self._what}, or take a lock around it"
            )

    def __exit__(self, *exception: object) -> None:
        self._lock.release()
