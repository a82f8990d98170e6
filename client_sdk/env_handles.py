"""Hosted environments by handle: each with a thread of its own, a lease, and whoever watches it.

A simulator is touched by its own thread alone, from its making to its end, so that graphics
contexts and interpreters bound to a thread work. Everything else here may be used from any thread.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from client_sdk.hosted_env import EnvironmentFault, HostedEnv
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
                raise _stopping()
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
            outbox.put(_stopping())

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


def _stopping() -> Fault:
    return Fault(Reason.DRAINING, "the host of environments is stopping", retry_after_s=1.0)


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


class EnvHandle:
    """The environments of one Make.

    Attributes:
        id: Unguessable, and the credential of whoever made it: never logged.
        number: What logs call it.
        hosted: What is hosted. Its thread only.
        size: How many environments count against the host's limit.
    """

    def __init__(
        self, number: int, make: Callable[[], gym.Env[Any, Any]], num_envs: int, lease_s: float
    ) -> None:
        """Make the environments, in a thread of their own.

        Raises:
            Fault: They could not be made.
        """
        self.id = secrets.token_hex(16)
        self.number = number
        self.size = num_envs or 1
        self.lease_s = lease_s
        self._expires = time.monotonic() + lease_s
        self._busy = threading.Lock()
        self._driven = False
        self._closed = threading.Event()
        self._finished = threading.Event()
        self._taps: list[FrameTap] = []
        self._thread = EnvThread(f"environment-{number}")
        try:
            self.hosted: HostedEnv = self._thread.call(lambda: HostedEnv(make, num_envs))
        except BaseException:
            self._thread.end()
            raise

    # Any thread.

    @property
    def expired(self) -> bool:
        """Whether nothing was heard of it for longer than the lease."""
        return not self._driven and not self._busy.locked() and time.monotonic() > self._expires

    @property
    def closed(self) -> bool:
        """Whether its end has begun."""
        return self._closed.is_set()

    def attach(self) -> None:
        """Begin a Drive.

        Raises:
            Fault: STEP_OUT_OF_ORDER; another client drives it.
        """
        with _Exclusive(self, driving=False):
            self._driven = True

    def play(self, call: Callable[[HostedEnv], _T], *, driving: bool = False) -> _T:
        """Reset or step; one at a time.

        Args:
            call: Runs in the environment's thread.
            driving: From the Drive that is attached.

        Raises:
            Fault: STEP_OUT_OF_ORDER, another call is under way; UNKNOWN_ENVIRONMENT, it is closed;
                and what ``call`` raises.
        """
        with _Exclusive(self, driving=driving):
            return self._thread.call(lambda: self._then_show(call))

    def render(self, index: int) -> NDArray[np.uint8]:
        """What an environment looks like, once the step under way is over."""
        self._check_open()
        frame = self._thread.call(lambda: self._alive(lambda hosted: hosted.render(index)))
        self._renew()
        return frame

    def watch(self, tap: FrameTap) -> None:
        """Offer frames to that tap from now on, the first one at once."""

        def begin() -> None:
            if self._closed.is_set():
                tap.end()
                return
            self._taps.append(tap)
            if tap.due():
                self._show([tap])

        self._thread.post(begin)
        if self._closed.is_set():  # then it may have come too late
            tap.end()

    def unwatch(self, tap: FrameTap) -> None:
        """No more frames to that tap."""

        def end() -> None:
            if tap in self._taps:
                self._taps.remove(tap)

        self._thread.post(end)

    def close(self) -> bool:
        """Begin the end: no more calls, and the environments are closed once the last is over.

        Returns:
            Whether this call was the first.
        """
        with _CLOSING:
            if self._closed.is_set():
                return False
            self._closed.set()
        self._thread.post(self._finish)
        self._thread.end()
        return True

    def abandon(self) -> None:
        """Release those who wait for it."""
        self._thread.abandon()

    def wait_finished(self, timeout_s: float) -> bool:
        """Whether the environments are closed, after so long at most."""
        return self._finished.wait(timeout_s)

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise unknown_handle()

    def _renew(self) -> None:
        self._expires = time.monotonic() + self.lease_s

    # The environment's thread.

    def _alive(self, call: Callable[[HostedEnv], _T]) -> _T:
        self._check_open()
        try:
            return call(self.hosted)
        except EnvironmentFault as fault:
            logger.warning(
                "environment %d: %s; it is closed", self.number, fault, exc_info=fault.__cause__
            )
            self.close()
            raise

    def _then_show(self, call: Callable[[HostedEnv], _T]) -> _T:
        result = self._alive(call)
        if self._taps:
            self._show([tap for tap in self._taps if tap.due()])
        return result

    def _show(self, taps: list[FrameTap]) -> None:
        frames: dict[int, NDArray[np.uint8]] = {}
        for tap in taps:
            try:
                if tap.index not in frames:
                    frames[tap.index] = self.hosted.render(tap.index)
            except Fault as fault:
                # A watcher must not end what it watches; before the first reset there is nothing
                # to see yet.
                if fault.reason is not Reason.STEP_OUT_OF_ORDER:
                    self._taps.remove(tap)
                    tap.end(fault)
                continue
            tap.offer(frames[tap.index])

    def _finish(self) -> None:
        self.hosted.close()
        self._finished.set()
        for tap in self._taps:
            tap.end()
        self._taps.clear()


_CLOSING = threading.Lock()
"""Taken for an instant, where a handle's end begins."""


class _Exclusive:
    """One call at a time per handle, and none beside a Drive but its own."""

    __slots__ = ("_driving", "_handle")

    def __init__(self, handle: EnvHandle, *, driving: bool) -> None:
        self._handle = handle
        self._driving = driving

    def __enter__(self) -> None:
        handle = self._handle
        handle._check_open()
        if not handle._busy.acquire(blocking=False):
            raise _busy("another call is under way for")
        if handle._driven and not self._driving:
            handle._busy.release()
            raise _busy("another client drives")

    def __exit__(self, *exception: object) -> None:
        self._handle._renew()
        self._handle._busy.release()


def _busy(what: str) -> Fault:
    return Fault(
        Reason.STEP_OUT_OF_ORDER,
        f"{what} these environments: one call at a time per handle. Make environments of your own",
        "env_handle",
    )


def unknown_handle() -> Fault:
    """The fault of a handle that is not, or no longer, known."""
    return Fault(
        Reason.UNKNOWN_ENVIRONMENT,
        "unknown handle: these environments were closed, failed, were not heard of for a lease, or "
        "the host has restarted. Make others",
        "env_handle",
    )


class EnvRegistry:
    """All handles of one host.

    Attributes:
        made: Handles so far.
    """

    def __init__(self, *, max_envs: int, lease_s: float) -> None:
        self._max_envs = max_envs
        self._lease_s = lease_s
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._handles: dict[str, EnvHandle] = {}
        self._reserved = 0
        self._ended = False
        self.made = 0

    def __len__(self) -> int:
        """Environments that are open."""
        with self._lock:
            return self._taken()

    def _taken(self) -> int:
        return sum(handle.size for handle in self._handles.values() if not handle.closed)

    def make(self, make: Callable[[], gym.Env[Any, Any]], num_envs: int) -> EnvHandle:
        """Environments of their own under a new handle.

        Raises:
            Fault: LIMIT_EXCEEDED, or they could not be made.
        """
        size = num_envs or 1
        with self._lock:
            if self._ended:
                raise _stopping()
            taken = self._reserved + self._taken()
            if taken + size > self._max_envs:
                raise Fault(
                    Reason.LIMIT_EXCEEDED,
                    f"{taken} environments are open and {size} more were asked for, but the host "
                    f"allows max_envs={self._max_envs}. Close some, or raise that setting "
                    "(--max-envs)",
                    retry_after_s=None if size > self._max_envs else 1.0,
                )
            self._reserved += size
            self.made += 1
            number = self.made
        try:
            handle = EnvHandle(number, make, num_envs, self._lease_s)
        finally:
            with self._lock:
                self._reserved -= size
        with self._changed:
            if self._ended:
                handle.close()
                raise _stopping()
            self._handles[handle.id] = handle
            self._changed.notify_all()
        return handle

    def find(self, handle_id: str) -> EnvHandle:
        """The handle of that id.

        Raises:
            Fault: UNKNOWN_ENVIRONMENT.
        """
        # A dict lookup is atomic, and a timing of hashes tells nothing of 128 random bits.
        handle = self._handles.get(handle_id)
        if handle is None or handle.closed:
            raise unknown_handle()
        return handle

    def newest(self, timeout_s: float) -> EnvHandle | None:
        """Whichever was made last and is open; None: none was made in time."""

        def open_ones() -> list[EnvHandle]:
            return [handle for handle in self._handles.values() if not handle.closed]

        with self._changed:
            self._changed.wait_for(lambda: self._ended or bool(open_ones()), timeout_s)
            found = open_ones()
            return found[-1] if found else None

    def close(self, handle_id: str) -> None:
        """Close that handle; one that is not there is closed already."""
        with self._lock:
            handle = self._handles.pop(handle_id, None)
        if handle is not None:
            handle.close()

    def expire(self) -> None:
        """Close what was not heard of for a lease, and forget what is closed."""
        with self._lock:
            handles = list(self._handles.values())
        for handle in handles:
            if handle.expired:
                logger.info(
                    "environment %d: nothing heard for %g s; closed", handle.number, self._lease_s
                )
                self.close(handle.id)
            elif handle.closed:
                self.close(handle.id)

    def end(self, timeout_s: float) -> None:
        """Close all, and let nobody wait for any of them.

        Simulators get so long to end what they have started; whoever hangs is left behind.
        """
        with self._changed:
            self._ended = True
            handles = list(self._handles.values())
            self._handles.clear()
            self._changed.notify_all()
        for handle in handles:
            handle.close()
            handle.abandon()
        until = time.monotonic() + timeout_s
        for handle in handles:
            if not handle.wait_finished(max(until - time.monotonic(), 0.0)):
                logger.warning("environment %d: did not close in time", handle.number)
