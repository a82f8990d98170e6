"""``EnvThread``: runs calls in a thread of its own, for simulators that are bound to one.

Its methods may be called from any thread.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar, cast

from client_sdk.wire.faults import Fault, Reason

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_Outbox = queue.SimpleQueue[Any]
_Work = tuple[Callable[[], Any], "_Outbox | None"]


class EnvThread:
    """Runs one call after the other, in a thread of its own that keeps no process alive."""

    def __init__(self, name: str) -> None:
        self._inbox: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._waiting: set[_Outbox] = set()
        self._abandoned = False
        self._ended = False
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def call(self, function: Callable[[], _T]) -> _T:
        """Run it there, and wait for what comes of it.

        Raises:
            Fault: DRAINING; nobody waits any more. And whatever ``function`` raises.
        """
        outbox: _Outbox = queue.SimpleQueue()
        self._waiting.add(outbox)
        try:
            if self._abandoned:
                raise host_stopping()
            self._inbox.put((function, outbox))
            if self._ended:  # nobody may ever look into the inbox again
                outbox.put(unknown_handle())
            result = outbox.get()
        finally:
            self._waiting.discard(outbox)
        if isinstance(result, BaseException):
            raise result
        return cast("_T", result)

    def post(self, function: Callable[[], object]) -> None:
        """Run it there, some time; nobody waits."""
        self._inbox.put((function, None))

    def end(self) -> None:
        """No more calls after those that are there."""
        self._inbox.put(None)

    def abandon(self) -> None:
        """Release those who wait: the environment may hang, the host must not."""
        self._abandoned = True
        for outbox in list(self._waiting):
            outbox.put(host_stopping())

    def _run(self) -> None:
        for work in iter(self._inbox.get, None):
            function, outbox = work
            result: Any
            try:
                result = function()
            except BaseException as error:  # whoever waits is told; this thread goes on
                result = error
                if outbox is None:
                    logger.exception("an environment's thread met an error nobody waits for")
            if outbox is not None:
                outbox.put(result)
            # Else the last result would stay alive until the next call.
            del work, function, outbox, result
        self._ended = True
        with contextlib.suppress(queue.Empty):
            while True:
                late = self._inbox.get_nowait()
                if late is not None and late[1] is not None:
                    late[1].put(unknown_handle())


def host_stopping() -> Fault:
    """The fault of a host that stops."""
    return Fault(Reason.DRAINING, "the host of environments is stopping", retry_after_s=1.0)


def unknown_handle() -> Fault:
    """The fault of a handle that is not, or no longer, known."""
    return Fault(
        Reason.UNKNOWN_ENVIRONMENT,
        "unknown handle: these environments were closed, failed, were not heard of for a lease, or "
        "the host has restarted. Make others",
        "env_handle",
    )
