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
_Work = tuple[Callable[..., object], tuple[Any, ...]]


class EnvThread:
    """Runs one call after the other, in a thread of its own that keeps no process alive.

    What is still to run when it ends runs all the same, in whichever thread finds it: calls have to
    look whether there is an environment left.
    """

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
            self.post(_call, function, outbox)
            self.settle()
            result = outbox.get()
        finally:
            self._waiting.discard(outbox)
        if isinstance(result, BaseException):
            raise result
        return cast("_T", result)

    def post(self, function: Callable[..., object], *arguments: Any) -> bool:
        """Run it there, some time; it must not raise. Never blocks.

        Returns:
            False: the thread has ended, and whoever waits for what comes of it calls ``settle``.
        """
        self._inbox.put((function, arguments))
        return not self._ended

    def settle(self) -> None:
        """Run what was posted after the end: nobody else would."""
        if not self._ended:
            return
        with contextlib.suppress(queue.Empty):
            while True:
                self._do(self._inbox.get_nowait())

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
            self._do(work)
            # Else what it holds would stay alive until the next call.
            del work
        self._ended = True
        self.settle()

    @staticmethod
    def _do(work: _Work | None) -> None:
        if work is None:
            return
        function, arguments = work
        try:
            function(*arguments)
        except BaseException:  # this thread goes on
            logger.exception("an environment's thread met an error nobody waits for")


def _call(function: Callable[[], object], outbox: _Outbox) -> None:
    result: object
    try:
        result = function()
    except BaseException as error:  # whoever waits is told
        result = error
    outbox.put(result)


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
