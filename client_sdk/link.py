"""``Link``: the session of local inference, held by background threads while the application acts.

One thread opens and reopens it, others use its connection; everything else that they tell each
other goes through ``changed``, one condition for all.
"""

from __future__ import annotations

import copy
import math
import threading
import time
from collections.abc import Callable

from client_sdk.call_errors import Disconnected
from client_sdk.config import Timeouts
from client_sdk.connecting import keep_trying, open_session
from client_sdk.endpoint import Endpoint
from client_sdk.errors import (
    ClosedClientError,
    ConnectError,
    PolicyClientError,
    PolicyTimeout,
    UnavailableError,
    UnknownSessionError,
)
from client_sdk.log import logger
from client_sdk.session import Handshake, Session
from client_sdk.transport import Connection
from client_sdk.wire import policyserver_pb2 as pb

_LONGEST_WAIT_S = threading.TIMEOUT_MAX


class Link:
    """A connection that comes back by itself.

    Attributes:
        changed: Notified whenever anything that somebody waits for may have changed.
        connection: None while there is none. Any thread may call on it.
        number: Of the session, from 1: another one for another session.
        failure: Why it will not come back.
        trouble: Why it is not there right now; empty while it is.
        closing: Nobody waits any more.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        handshake: Handshake,
        timeouts: Timeouts,
        another_session: Callable[[int], None],
    ) -> None:
        """Nothing is opened yet.

        Args:
            endpoint: The server.
            handshake: What is agreed with it.
            timeouts: How long to wait for what.
            another_session: Called by the thread that reopens when the session was gone, with what
                the server delivered of the one before, ahead of anybody's use of the new one.
        """
        self.changed = threading.Condition()
        self.connection: Connection | None = None
        self.number = 0
        self.failure: PolicyClientError | None = None
        self.trouble = ""
        self.closing = False
        self.handshake = handshake
        self._endpoint = endpoint
        self._timeouts = timeouts
        self._another_session = another_session
        self._listener: Callable[[], None] | None = None

    @property
    def session(self) -> Session:
        """What was agreed."""
        return self.handshake.opened

    def listen(self, listener: Callable[[], None]) -> None:
        """Call that as well whenever something has changed, from whichever thread."""
        self._listener = listener

    def notify(self) -> None:
        """Something has changed."""
        with self.changed:
            self.changed.notify_all()
        if self._listener is not None:
            self._listener()

    # -- opening: one thread -------------------------------------------------------------------

    def open(self) -> None:
        """Open the session for the first time.

        Raises:
            ConnectError: Nobody answered within ``Timeouts.connect_s``; the class says how.
            PolicyClientError: The server refuses this client.
        """
        self._keep_trying(self._timeouts.connect_s)

    def reopen(self) -> bool:
        """Open it again, however long that takes; False: it was closed, or refused for good."""
        try:
            self._keep_trying(math.inf)
        except ClosedClientError:
            return False
        except PolicyClientError as error:
            logger.error("gave up connecting to %s: %s", self._endpoint.address, error)
            self.failure = error
            self.notify()
            return False
        self.handshake.stats.reconnects += 1
        logger.info("connected to %s again", self._endpoint.address)
        return True

    def _keep_trying(self, budget_s: float) -> None:
        attempts = self.handshake.attempts(budget_s, self._timeouts)
        keep_trying(self._endpoint, attempts, self._attempt, self.pause)

    def _attempt(self, timeout_s: float) -> None:
        handshake = self.handshake
        connection, _, response = open_session(self._endpoint, handshake.hello(), timeout_s)
        try:
            if handshake.agree(response):
                self.number += 1
                if self.number > 1:
                    handshake.stats.sessions_lost += 1
                    self._another_session(response.delivered_sequence)
        except BaseException:
            connection.close()
            raise
        with self.changed:
            self.connection, self.trouble = connection, ""
            if self.closing:
                self._drop()
                raise ClosedClientError("the client was closed meanwhile")
        self.notify()

    # -- using: any thread ---------------------------------------------------------------------

    def lost(self, connection: Connection, why: str) -> None:
        """That connection is gone."""
        with self.changed:
            if connection is not self.connection:
                return
            self._drop()
            self.trouble = why
            if not self.closing:
                logger.warning(
                    "connection to %s lost (%s); connecting again, acting on meanwhile",
                    self._endpoint.address,
                    why,
                )
        self.notify()

    def await_connection(self, timeout_s: float = _LONGEST_WAIT_S) -> Connection | None:
        """The connection, once there is one; None: not so soon, or never."""
        deadline = time.monotonic() + timeout_s
        with self.changed:
            while self.connection is None and not self.closing and self.failure is None:
                left_s = deadline - time.monotonic()
                if left_s <= 0.0:
                    return None
                self.changed.wait(min(left_s, _LONGEST_WAIT_S))
            return None if self.closing else self.connection

    def wait(self, ready: Callable[[], bool], timeout_s: float, what: str) -> None:
        """Wait for the background to bring something about.

        Args:
            ready: Whether it has.
            timeout_s: Give up after this long.
            what: It is, in words.

        Raises:
            PolicyTimeout: It has not.
            ClosedClientError: The client was closed meanwhile.
            PolicyClientError: It never will.
        """
        deadline = time.monotonic() + timeout_s
        with self.changed:
            while not ready():
                self.check()
                left_s = deadline - time.monotonic()
                if left_s <= 0.0:
                    raise self.overdue(what, timeout_s)
                self.changed.wait(min(left_s, _LONGEST_WAIT_S))

    def check(self) -> None:
        """Raise if nothing will come any more.

        Raises:
            ClosedClientError: The client was closed.
            PolicyClientError: The server refuses this client.
        """
        if self.closing:
            raise ClosedClientError("the client was closed meanwhile")
        if self.failure is not None:
            raise copy.copy(self.failure)

    def overdue(self, what: str, timeout_s: float) -> PolicyTimeout:
        """The error for something that did not come in time."""
        state = f" (connection lost: {self.trouble})" if self.trouble else ""
        return PolicyTimeout(
            f"no {what} from {self._endpoint.address} within {timeout_s:.3g} s "
            f"(Timeouts.action_s){state}. Calling again asks for the same step."
        )

    def ping(self, timeout_s: float) -> float:
        """Seconds that a round trip takes.

        Raises:
            ConnectError: The connection is lost.
            PolicyClientError: The server refuses.
        """
        connection, address = self.connection, self._endpoint.address
        if connection is None:
            raise ConnectError(f"connection to {address} lost: {self.trouble}")
        request = pb.ActRequest(session_id=self.session.id)
        start = time.perf_counter()
        try:
            connection.act(request, min(timeout_s, 3600.0))
        except (Disconnected, UnavailableError, UnknownSessionError) as lost:
            self.lost(connection, str(lost))
            raise ConnectError(f"connection to {address} lost: {lost}") from None
        return time.perf_counter() - start

    def pause(self, seconds: float) -> None:
        """Let time pass, unless the client is closed.

        Raises:
            ClosedClientError: It was.
        """
        deadline = time.monotonic() + seconds
        with self.changed:
            while not self.closing and (left_s := deadline - time.monotonic()) > 0.0:
                self.changed.wait(min(left_s, _LONGEST_WAIT_S))
            if self.closing:
                raise ClosedClientError("the client was closed meanwhile")

    def say_goodbye(self, timeout_s: float) -> None:
        """Close the session, if it is open and the server can be told."""
        connection, session = self.connection, self.handshake.session
        if connection is not None and session is not None:
            try:
                connection.close_session(pb.CloseSessionRequest(session_id=session.id), timeout_s)
            except (Disconnected, PolicyClientError) as error:
                logger.debug("closing the session: %s", error)

    def close(self) -> None:
        """Let go of the connection; whoever waits is told so. Any thread, any number of times."""
        self.closing = True
        with self.changed:
            self._drop()
        self.notify()

    def _drop(self) -> None:
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.close()
