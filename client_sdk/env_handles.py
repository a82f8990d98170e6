"""``EnvHandle``: the environments of one Make, their thread, their lease, and whoever watches them.

A simulator is touched by its own thread alone, from its making to its end, so that graphics
contexts and interpreters bound to a thread work. Everything else here may be used from any thread.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from client_sdk.env_thread import EnvThread, unknown_handle
from client_sdk.frame_tap import FrameTap
from client_sdk.hosted_env import EnvironmentFault, HostedEnv
from client_sdk.wire.faults import Fault, Reason

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


class EnvHandle:
    """The environments of one Make.

    Attributes:
        id: Unguessable, and the credential of whoever made it: never logged.
        number: What logs call it.
        hosted: What is hosted. Its thread only, but for what says otherwise.
        steps: How its steps are written and read.
        size: How many environments count against the host's limit.
        closed: Whether its end has begun.
        post: As ``EnvThread.post``: for the Drive that is attached.
        settle: As ``EnvThread.settle``.
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
        self.closed = False
        self._finished = threading.Event()
        self._taps: list[FrameTap] = []
        self._thread = EnvThread(f"environment-{number}")
        self.post = self._thread.post
        self.settle = self._thread.settle
        try:
            self.hosted: HostedEnv = self._thread.call(lambda: HostedEnv(make, num_envs))
            self.steps = self.hosted.messages(self.id)
        except BaseException:
            self._thread.end()
            raise

    # Any thread.

    @property
    def expired(self) -> bool:
        """Whether nothing was heard of it for longer than the lease."""
        return not self._driven and not self._busy.locked() and time.monotonic() > self._expires

    def attach(self) -> None:
        """Begin a Drive: from now on nobody else resets or steps.

        Raises:
            Fault: STEP_OUT_OF_ORDER; another client drives it.
        """
        self._enter()
        self._driven = True
        self._leave()

    def play(self, call: Callable[[HostedEnv], _T]) -> _T:
        """Reset or step, where no Drive is attached; one at a time.

        Args:
            call: Runs in the environment's thread.

        Raises:
            Fault: STEP_OUT_OF_ORDER, another call is under way; UNKNOWN_ENVIRONMENT, it is closed;
                and what ``call`` raises.
        """
        self._enter()
        try:
            return self._thread.call(lambda: self._then_show(call))
        finally:
            self._leave()

    def render(self, index: int) -> NDArray[np.uint8]:
        """What an environment looks like, once the step under way is over."""
        self._check_open()
        frame = self._thread.call(lambda: self.alive(self.hosted.render, index))
        self._renew()
        return frame

    def watch(self, tap: FrameTap) -> None:
        """Offer frames to that tap from now on, the first one at once."""

        def begin() -> None:
            if self.closed:
                tap.end()
                return
            self._taps.append(tap)
            if tap.due():
                self._show([tap])

        self._thread.post(begin)
        if self.closed:  # then it may have come too late
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
            if self.closed:
                return False
            self.closed = True
        self._thread.post(self._finish)
        self._thread.end()
        return True

    def abandon(self) -> None:
        """Release those who wait for it."""
        self._thread.abandon()

    def wait_finished(self, timeout_s: float) -> bool:
        """Whether the environments are closed, after so long at most."""
        return self._finished.wait(timeout_s)

    def _enter(self) -> None:
        """One call at a time, and none beside a Drive."""
        self._check_open()
        if not self._busy.acquire(blocking=False):
            raise _busy("another call is under way for")
        if self._driven:
            self._busy.release()
            raise _busy("another client drives")

    def _leave(self) -> None:
        self._renew()
        self._busy.release()

    def _check_open(self) -> None:
        if self.closed:
            raise unknown_handle()

    def _renew(self) -> None:
        self._expires = time.monotonic() + self.lease_s

    # The environment's thread.

    def alive(self, call: Callable[..., _T], *arguments: Any) -> _T:
        """What comes of that call; the end of the environments, where it is their failure.

        Raises:
            Fault: UNKNOWN_ENVIRONMENT, they are closed; and what ``call`` raises.
        """
        self._check_open()
        try:
            return call(*arguments)
        except EnvironmentFault as fault:
            logger.warning(
                "environment %d: %s; it is closed", self.number, fault, exc_info=fault.__cause__
            )
            self.close()
            raise

    def show(self) -> None:
        """Offer a frame to whoever watches and is due one."""
        if self._taps and not self.closed:
            self._show([tap for tap in self._taps if tap.due()])

    def _then_show(self, call: Callable[[HostedEnv], _T]) -> _T:
        result = self.alive(call, self.hosted)
        self.show()
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


def _busy(what: str) -> Fault:
    return Fault(
        Reason.STEP_OUT_OF_ORDER,
        f"{what} these environments: one call at a time per handle. Make environments of your own",
        "env_handle",
    )
