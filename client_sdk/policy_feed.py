"""``PolicyFeed``: the newest policy, fetched in the background and swapped in as one reference.

A thread of its own asks the server, verifies what comes and loads it; whoever acts reads ``policy``
and never waits for that.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from client_sdk.attempts import Backoff
from client_sdk.call_errors import Disconnected
from client_sdk.errors import (
    ClosedClientError,
    PolicyClientError,
    UnavailableError,
    UnknownSessionError,
)
from client_sdk.link import Link
from client_sdk.loaded_policy import LoadedPolicy, import_onnx_policy
from client_sdk.log import logger
from client_sdk.policy_cache import PolicyCache
from client_sdk.transport import Connection
from client_sdk.wire import policyserver_pb2 as pb

if TYPE_CHECKING:
    from client_sdk.noise_pool import NoisePool
    from client_sdk.onnx_policy import OnnxPolicy

_MOST_BYTES: Final = 2**31
"""Of a policy file; ONNX itself knows no larger ones."""
_LONGEST_S: Final = 3600.0


class DamagedPolicyError(Exception):
    """What came is not the file that was announced. Never leaves the package."""


class PolicyFeed:
    """Keeps ``policy`` the newest there is, as far as ``interval_s`` lets it.

    Attributes:
        policy: The newest; None before the first. Read it once per step.
        has_changed: Called by the feed's threads after each swap.
    """

    def __init__(
        self,
        link: Link,
        cache: PolicyCache,
        interval_s: float | None,
        has_changed: Callable[[], None],
    ) -> None:
        """Nothing is fetched yet.

        Args:
            link: The session.
            cache: Of files that need not be fetched.
            interval_s: At least so many seconds between fetches; 0: another file is fetched as soon
                as there is one; None: only ``fetch_now`` fetches, but for the first.
            has_changed: See above.
        """
        self.policy: LoadedPolicy | None = None
        self.has_changed = has_changed
        self._link = link
        self._cache = cache
        self._interval_s = interval_s
        self._onnx = import_onnx_policy()
        self._noise: NoisePool | None = None
        self._swapping = threading.Lock()
        self._wanted = False
        self._due = 0.0
        self._thread = threading.Thread(target=self._run, name="client_sdk policies", daemon=True)

    def start(self) -> None:
        """Fetch from now on."""
        self._thread.start()

    def join(self, timeout_s: float) -> None:
        """Wait for the thread, once the link is closed."""
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(max(timeout_s, 0.0))

    def fetch_soon(self) -> None:
        """Fetch without waiting for the interval's end."""
        self._wanted = True
        self._link.notify()

    def fetch_now(self, timeout_s: float) -> None:
        """Take the newest file there is; in the caller's thread.

        Raises:
            PolicyTimeout: There was no answer in time.
            ClosedClientError: The client was closed meanwhile.
            PolicyClientError: The server refuses.
        """
        link, backoff = self._link, Backoff()
        deadline = time.monotonic() + timeout_s
        while True:
            link.check()
            left_s = deadline - time.monotonic()
            if left_s <= 0.0 or (connection := link.await_connection(left_s)) is None:
                link.check()
                raise link.overdue("policy", timeout_s)
            try:
                self._fetch(connection, 0.0, max(deadline - time.monotonic(), 0.05))
                return
            except (Disconnected, UnknownSessionError) as lost:
                link.lost(connection, str(lost))
            except (UnavailableError, DamagedPolicyError) as error:
                asked_s = getattr(error, "retry_after_s", None) or backoff.delay_s()
                link.pause(min(asked_s, max(deadline - time.monotonic(), 0.0)))

    # -- the feed's thread ---------------------------------------------------------------------

    def _run(self) -> None:
        with contextlib.suppress(ClosedClientError):
            while not self._link.closing and self._link.failure is None:
                try:
                    self._follow()
                except ClosedClientError:
                    return
                except Exception:  # else the policy would never change again
                    logger.exception("a bug of the client")
                    self._link.pause(1.0)

    def _follow(self) -> None:
        """Fetch, time and again, over one connection."""
        link = self._link
        connection = link.await_connection()
        if connection is None:
            return
        backoff = Backoff()
        # Often enough for the lease, whatever else is going on.
        beat_s = link.session.lease_s / 3.0 or 10.0
        while connection is link.connection:
            try:
                if self.policy is None or self._interval_s == 0.0:
                    # Held until there is another: the call also keeps the lease.
                    self._fetch(connection, beat_s, beat_s + 30.0)
                elif self._is_due(beat_s):
                    self._fetch(connection, 0.0, _LONGEST_S)
                else:
                    connection.act(pb.ActRequest(session_id=link.session.id), 30.0)
                backoff = Backoff()
            except (Disconnected, UnknownSessionError) as lost:
                link.lost(connection, str(lost))
            except ClosedClientError:
                raise
            except DamagedPolicyError as error:
                logger.warning("a policy did not arrive whole (%s); fetching it again", error)
                link.pause(backoff.delay_s())
            except UnavailableError as error:
                link.pause(
                    backoff.delay_s() if error.retry_after_s is None else error.retry_after_s
                )
            except PolicyClientError as error:
                if self.policy is None and error.retry_after_s is None:
                    link.failure = error
                    self.has_changed()
                    return
                logger.warning("the server gives no policy: %s", error)
                link.pause(max(backoff.delay_s(), error.retry_after_s or 0.0))

    def _is_due(self, within_s: float) -> bool:
        """Wait until the next fetch is due; False: not so soon."""
        link = self._link
        until = time.monotonic() + within_s
        with link.changed:
            while not self._wanted:
                if link.closing:
                    raise ClosedClientError("the client was closed meanwhile")
                now = time.monotonic()
                if self._interval_s is not None and now >= self._due:
                    return True
                if now >= until or link.connection is None:
                    return False
                wake = until if self._interval_s is None else min(until, self._due)
                link.changed.wait(max(wake - now, 0.001))
        self._wanted = False
        return True

    # -- one fetch: the feed's thread, or the caller's -----------------------------------------

    def _fetch(self, connection: Connection, wait_s: float, timeout_s: float) -> None:
        """Ask once, and take over what comes."""
        link, have = self._link, self.policy
        session = link.number
        self._due = time.monotonic() + (self._interval_s or 0.0)
        request = pb.GetPolicyRequest(
            session_id=link.session.id, have_sha256=have.sha256 if have else b""
        )
        request.wait.FromMicroseconds(int(wait_s * 1e6))
        parts: Any = connection.get_policy(request, min(timeout_s, _LONGEST_S))
        with contextlib.closing(parts):
            first = next(parts, None)
            if first is None or not first.HasField("header"):
                raise DamagedPolicyError("no header")
            header = first.header
            if not header.size_bytes:
                return
            model = self._cache.get(header.sha256)
            cached = model is not None
            if model is None:
                model = _body(header, parts)
        self._take_over(header, model, session)
        if not cached:
            self._cache.put(header.sha256, model)

    def _take_over(self, header: pb.PolicyHeader, model: bytes, session: int) -> None:
        """Load a file, try it, and swap."""
        with self._swapping:
            current = self.policy
            if current is not None and (
                current.sha256 == header.sha256
                # Two fetches overtook each other.
                or (current.session == session and current.version > header.policy_version)
            ):
                return
            try:
                onnx: OnnxPolicy = self._onnx.OnnxPolicy(model, self._noise)
                if onnx.noise.spec != onnx.spec.noise:
                    onnx = self._onnx.OnnxPolicy(model)
                # What cannot run must not be swapped in; and the first run is the slow one.
                zeros = self._link.handshake.observation_codec.zeros(1)
                noise = np.zeros((1, onnx.spec.noise.size), np.float32)
                onnx.run(zeros, noise, ("actions", *onnx.spec.recorded))
            except Exception as error:  # onnxruntime's errors have no common base but Exception
                raise DamagedPolicyError(str(error)) from error
            self._noise = onnx.noise
            self.policy = LoadedPolicy(header, onnx, session)
            self._link.handshake.stats.policies_loaded += 1
        self.has_changed()


def _body(header: pb.PolicyHeader, parts: Any) -> bytes:
    """The file behind a header, verified."""
    size = header.size_bytes
    if size > _MOST_BYTES:
        raise DamagedPolicyError(f"expected at most {_MOST_BYTES} bytes, got {size}")
    model = bytearray()
    for part in parts:
        model += part.piece
        if len(model) > size:
            raise DamagedPolicyError(f"expected {size} bytes, got more")
    if len(model) != size:
        raise DamagedPolicyError(f"expected {size} bytes, got {len(model)}")
    if hashlib.sha256(model).digest() != header.sha256:
        raise DamagedPolicyError("its SHA-256 is not the announced one")
    return bytes(model)
