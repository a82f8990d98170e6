"""``LoopStream``: a stream on ``grpc.aio`` whose caller runs the event loop while it waits.

For blocking callers to whom each message counts: ``channel.Stream`` hands every message through
three more threads. One thread at a time, whichever; ``close`` from any.
"""

from __future__ import annotations

# What ``signal`` wraps in enums, which would take a tenth of a step.
import _signal  # type: ignore[import-not-found]
import asyncio
import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future
from signal import SIGINT, default_int_handler
from typing import Any, TypeVar

from client_sdk.aio_channel import AioChannel, AioStream
from client_sdk.call_errors import Disconnected, Overdue
from client_sdk.endpoint import Endpoint

_T = TypeVar("_T")

_END_TIMEOUT_S = 2.0

# Kept until they are closed, so that a fork, which has no right to, does not end its copies.
_open: set[LoopStream] = set()


class LoopStream:
    """A bidirectional rpc on a channel of its own: a message out, one back, with deadlines.

    The loop is private, and runs inside ``receive`` alone, in the thread that calls it; where that
    thread runs a loop already, which forbids another, in a thread made for it.

    Args:
        endpoint: The server.
        service: Its full name.
        name: Of the rpc.
        timeout_s: Give up connecting after this long.

    Raises:
        Disconnected: The server cannot be reached.
        PolicyClientError: It refuses.
    """

    def __init__(self, endpoint: Endpoint, service: str, name: str, timeout_s: float) -> None:
        self._request = b""
        self._channel: AioChannel | None = None
        self._stream: AioStream | None = None
        self._task: asyncio.Task[Any] | None = None  # what the loop runs for
        self._deadline = 0.0  # in the loop's time
        self._alarm: asyncio.TimerHandle | None = None
        self._closing = False
        self._running = threading.Lock()
        self._loop = asyncio.SelectorEventLoop()
        self._interrupts = _Interrupts(self._loop)
        self._loop.set_exception_handler(_report)
        _open.add(self)
        try:
            with self._running, self._interrupts:
                connecting = self._connect(endpoint, service, name, timeout_s)
                self._task = self._loop.create_task(connecting)
                self._loop.run_until_complete(self._task)
        except BaseException:
            self.close()
            raise

    async def _connect(self, endpoint: Endpoint, service: str, name: str, timeout_s: float) -> None:
        # Made here, for gRPC binds both to the loop that runs.
        self._channel = AioChannel(endpoint, service)
        self._stream = self._channel.stream(name)
        try:
            async with asyncio.timeout(timeout_s):
                await self._stream.open()
        except TimeoutError:
            raise Disconnected(f"{name} did not begin within {timeout_s:g} s") from None

    def send(self, data: bytes) -> None:
        """Have it sent by the next ``receive``."""
        self._request = data

    def receive(self, timeout_s: float) -> bytes:
        """Send, and wait for the answer.

        Raises:
            Overdue: None came so soon. The stream is of no use any more.
            Disconnected: The stream has ended.
            PolicyClientError: The server ended it with a refusal.
        """
        if is_loop_running():
            return _without_loop(lambda: self._receive(timeout_s))
        return self._receive(timeout_s)

    def _receive(self, timeout_s: float) -> bytes:
        try:
            with self._running, self._interrupts:
                stream = self._stream
                if self._closing or stream is None:
                    raise Disconnected("the stream was closed")
                self._set_deadline(timeout_s)
                # Not run_until_complete, which goes round the loop once more.
                self._task = task = self._loop.create_task(self._exchange(stream))
                self._loop.run_forever()
        finally:
            if self._closing:  # meanwhile, by another thread, which leaves the rest to this one
                self._end()
        if not task.done():
            raise Overdue
        answer: bytes = task.result()
        return answer

    async def _exchange(self, stream: AioStream) -> bytes:
        try:
            await stream.send(self._request)
            answer = await stream.receive()
        except Exception:
            self._loop.stop()
            raise
        self._loop.stop()
        return answer

    def _set_deadline(self, timeout_s: float) -> None:
        self._deadline = self._loop.time() + timeout_s
        if self._alarm is None or self._alarm.when() > self._deadline:
            self._stop_when_overdue()

    def _stop_when_overdue(self) -> None:
        # Each message moves the deadline, and leaves the timer alone until it rings.
        if self._loop.time() >= self._deadline:
            self._loop.stop()
        else:
            self._alarm = self._loop.call_at(self._deadline, self._stop_when_overdue)

    def close(self) -> None:
        """Give up the stream; whoever waits on it is told so. Any thread."""
        self._closing = True
        if not self._running.locked():
            _without_loop(self._end)
        elif self._stream is not None:
            with contextlib.suppress(RuntimeError):  # that thread has closed the loop by now
                self._loop.call_soon_threadsafe(self._stream.close)

    def _end(self) -> None:
        """Close the loop, once nothing of gRPC's can come back to it."""
        with self._running, _Interrupts(None):
            if self._loop.is_closed():
                return
            try:
                if self._alarm is not None:
                    self._alarm.cancel()
                winding_up = self._loop.create_task(self._wind_up())
                winding_up.add_done_callback(lambda _: self._loop.stop())
                while not winding_up.done():  # a late stop of an interrupt's may come before
                    self._loop.run_forever()
            finally:
                self._loop.close()
                _open.discard(self)

    async def _wind_up(self) -> None:
        if self._task is not None:
            self._task.cancel()
        if self._stream is not None:
            self._stream.close()
        if self._channel is not None:
            await self._channel.close()
        self._task = self._stream = self._channel = None
        if others := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(others, timeout=_END_TIMEOUT_S)


class _Interrupts:
    """Holds Ctrl-C back while a loop runs, and stops the loop; where none is given, only that.

    Raised amid gRPC's callbacks, ``KeyboardInterrupt`` would be swallowed, and with it what they
    were about to tell: so asyncio's own runner holds it back as well.
    """

    __slots__ = ("_held", "_loop", "_noted")

    def __init__(self, loop: asyncio.AbstractEventLoop | None) -> None:
        self._loop = loop
        self._held = self._noted = False

    def __enter__(self) -> None:
        self._held = self._noted = False
        if (
            threading.current_thread() is threading.main_thread()  # no other is interrupted
            and _signal.getsignal(SIGINT) is default_int_handler
        ):
            self._held = True
            _signal.signal(SIGINT, self._note)

    def __exit__(self, *exception: object) -> None:
        if self._held:
            _signal.signal(SIGINT, default_int_handler)
            if self._noted:
                raise KeyboardInterrupt

    def _note(self, _number: int, _frame: object) -> None:
        self._noted = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)


def is_loop_running() -> bool:
    """Whether an event loop runs in this thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _without_loop(work: Callable[[], _T]) -> _T:
    """Do it in this thread, or, where an event loop runs in it, in one made for the purpose."""
    if not is_loop_running():
        return work()
    outcome: Future[_T] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name="client_sdk loop", daemon=True).start()
    return outcome.result()


def _report(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log what nobody caught, unless it tells nothing."""
    # gRPC wakes all loops of the process for each of its events, and another one was faster. An
    # interrupt has risen already.
    known = (BlockingIOError, KeyboardInterrupt, SystemExit)
    if not isinstance(context.get("exception"), known):
        loop.default_exception_handler(context)
