"""``EnvRegistry``: all handles of one host, how many there may be, and when they end. Any thread."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import gymnasium as gym

from client_sdk.env_handles import EnvHandle
from client_sdk.env_thread import host_stopping, unknown_handle
from client_sdk.hosted_env import EnvironmentFault
from client_sdk.wire.faults import Fault, Reason

logger = logging.getLogger(__name__)


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
                raise host_stopping()
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
        except EnvironmentFault as fault:
            logger.warning("environment %d: %s", number, fault, exc_info=fault.__cause__)
            raise
        finally:
            with self._lock:
                self._reserved -= size
        with self._changed:
            if self._ended:
                handle.close()
                raise host_stopping()
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
        """Whichever was made last and is open, of those that render if any does.

        None: none was made in time.
        """

        def open_ones() -> list[EnvHandle]:
            return [handle for handle in self._handles.values() if not handle.closed]

        with self._changed:
            self._changed.wait_for(lambda: self._ended or bool(open_ones()), timeout_s)
            found = open_ones()
            found = [handle for handle in found if handle.hosted.renders] or found
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
