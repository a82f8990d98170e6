"""``RemoteActor``: asks a policy server for actions over one stream, through thick and thin. Blocking.

The flows of one call (settle what was told, send, wait, ask again, connect again) in the order in
which they happen; what they mean is the tracks' and ``exchange``'s. One call at a time.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from typing import Any

from client_sdk.batch_track import BatchTrack
from client_sdk.call_errors import Disconnected, Overdue
from client_sdk.channel import Stream
from client_sdk.config import Timeouts
from client_sdk.connecting import keep_trying, open_session
from client_sdk.dialogue import Dialogue
from client_sdk.endpoint import Endpoint
from client_sdk.episode_track import EpisodeTrack
from client_sdk.errors import (
    ClosedClientError,
    ConnectError,
    PolicyClientError,
    UnavailableError,
    UnknownSessionError,
)
from client_sdk.exchange import Exchange
from client_sdk.log import logger
from client_sdk.pending import Pending
from client_sdk.remote_steps import RemoteSteps
from client_sdk.rows import Status
from client_sdk.transport import Connection
from client_sdk.wire import policyserver_pb2 as pb

MAX_UNANSWERED = 256
"""So many requests may be on their way without anyone waiting; the next one waits for the first."""

_CLOSED = "the client was closed meanwhile"


class RemoteActor:
    """The blocking shell around an ``Exchange``. Its stream keeps the session's lease."""

    def __init__(self, endpoint: Endpoint, exchange: Exchange, timeouts: Timeouts) -> None:
        self.exchange = exchange
        self._steps = RemoteSteps(exchange)
        self._endpoint = endpoint
        self._timeouts = timeouts
        self._target = endpoint.address
        self._connection: Connection | None = None
        self._stream: Dialogue | Stream | None = None
        self._away = False  # lost, and not found again
        self._closing = threading.Event()
        self._again: list[Pending] = []

    # -- verbs ---------------------------------------------------------------------------------

    def act(self, track: EpisodeTrack, observation: Any, reward: float = 0.0) -> Any:
        """Record where an episode is; returns the next action."""
        pending = track.pending
        if pending is not None and pending.told:
            self._settle(track)
            pending = None
        # A step that was asked and not answered is asked again, as it was: the server may have
        # recorded it.
        if pending is None:
            columns = self.exchange.observation(observation)
            track.add_reward(reward)
            pending = self._send(self.exchange.issue(track, track.row(columns)))
        self._wait(pending)
        return self.exchange.action(pending)

    def log_action(
        self,
        track: EpisodeTrack,
        observation: Any,
        action: Any,
        logp: float | None = None,
        reward: float = 0.0,
    ) -> None:
        """Record what the application did by itself."""
        self._settle(track)
        pending = self._send(self._steps.log_action(track, observation, action, logp, reward))
        if not pending.told:
            self._wait(pending)
            self._steps.logged(pending)

    def end(
        self, track: EpisodeTrack, observation: Any, status: Status, reward: float = 0.0
    ) -> None:
        """Record where an episode ended; nobody waits for the answer."""
        self._settle(track)
        self._tell(self._steps.end(track, observation, status, reward))

    def abandon(self, track: EpisodeTrack) -> None:
        """Take an episode back; nobody waits for the answer."""
        self._tell(self._steps.abandon(track))

    def act_batch(
        self, track: BatchTrack, observations: Any, rewards: Any, terminated: Any, truncated: Any
    ) -> Any:
        """Record a vector step; returns the next actions."""
        pending = track.pending
        if pending is None:
            columns = self.exchange.observations(observations, track.n)
            rows = track.rows(columns, rewards, terminated, truncated)
            if rows is None:
                return self.exchange.no_actions(track.n)
            pending = self._send(self.exchange.issue(track, rows))
        self._wait(pending)
        return self.exchange.actions(pending, track.n)

    def abandon_rows(self, track: BatchTrack, indices: Sequence[int]) -> None:
        """Take some episodes of a batch back, after whatever was asked of it before."""
        if track.pending is not None:
            # Its answer stays for whoever asks again: those actions have been chosen.
            self._wait(track.pending)
        self._tell(self._steps.abandon_rows(track, indices))

    def close_batch(self, track: BatchTrack) -> None:
        """Take back what is running of a batch; nothing more comes from it."""
        self._tell(self._steps.close_batch(track))

    def update_policy_weights(self) -> None:
        """Nothing to do: the server always acts with its newest policy."""

    def ping(self) -> float:
        """Seconds that a round trip takes, without an action."""
        exchange, timeout_s = self.exchange, self._timeouts.action_s
        if self._connection is None:
            self._connect_again()
        request = pb.ActRequest(session_id=exchange.session.id if exchange.session else "")
        start = time.perf_counter()
        try:
            if self._connection is not None:
                self._connection.act(request, min(timeout_s, 3600.0))
        except (Disconnected, UnavailableError, UnknownSessionError) as lost:
            self._lost(str(lost))
            raise ConnectError(f"connection to {self._endpoint.address} lost: {lost}") from None
        return time.perf_counter() - start

    # -- one request ---------------------------------------------------------------------------

    def _send(self, pending: Pending) -> Pending:
        stream = self._stream
        if stream is not None:  # else: sent with everything unanswered, once connected
            try:
                stream.send(pending.data)
                pending.stream = stream
                if pending.told:  # else it goes out when its answer is waited for
                    stream.flush(self._timeouts.action_s)
            except BaseException:  # Ctrl-C
                self._end_stream()
                raise
        return pending

    def _tell(self, pending: Pending | None) -> None:
        if pending is not None:
            self._send(pending)

    def _settle(self, track: EpisodeTrack) -> None:
        """Wait for the episode's previous row, so that two of one episode are never on their way.

        And for the oldest of all, where nobody has waited for very many.
        """
        if len(self.exchange.pending) > MAX_UNANSWERED:
            self._wait(next(iter(self.exchange.pending.values())))
        pending = track.pending
        if pending is not None:
            self._wait(pending)
            self.exchange.acknowledge(pending)

    def _wait(self, pending: Pending, within_s: float | None = None) -> None:
        """Read answers until that request has one.

        Raises:
            PolicyTimeout: It has none within ``Timeouts.action_s``.
            ConnectError: The connection could not be made again.
        """
        exchange = self.exchange
        action_s = self._timeouts.action_s if within_s is None else within_s
        timeout_s, deadline = action_s, time.monotonic() + action_s
        if pending.again is not None:  # since an earlier call, whose patience ended
            pending.tries, pending.due = 0, 0.0
        while not pending.answered:
            stream = self._stream
            if stream is None:
                if self._connection is not None:
                    self._begin_stream(self._connection, exchange.unanswered())
                    continue
                self._connect_again(within_s)
                timeout_s, deadline = action_s, time.monotonic() + action_s
                continue
            if self._again:
                self._ask_again(stream, pending, deadline)
                timeout_s = deadline - time.monotonic()
            try:
                if pending.stream is not stream:  # Ctrl-C came in between
                    self._send(pending)
                answered = exchange.take(stream.receive(timeout_s))
            except Disconnected as lost:
                self._lost(lost.why)
                continue
            except Overdue:
                self._renew_stream()
                timeout_s = deadline - time.monotonic()
                if timeout_s > 0.0:  # that was for the answer before
                    continue
                raise pending.overdue(self._endpoint.address, action_s) from None
            except PolicyClientError:
                self._drop()
                raise
            except BaseException:  # Ctrl-C: an answer may be lost
                self._renew_stream()
                raise
            if pending.answered:
                return
            timeout_s = deadline - time.monotonic()
            if exchange.lost:
                self._lost(exchange.lost)
            elif answered is not None and answered.again is not None:
                answered.due = time.monotonic() + answered.again_in_s()
                self._again.append(answered)

    def _ask_again(self, stream: Dialogue | Stream, wanted: Pending, deadline: float) -> None:
        """Repeat what is due; wait for it if it is what the caller waits for."""
        for pending in list(self._again):  # each stays in it until it is sent, whatever interrupts
            if pending is wanted:
                if pending.due >= deadline:
                    self._pause(deadline - time.monotonic())
                    raise pending.overdue(self._endpoint.address, self._timeouts.action_s)
                self._pause(pending.due - time.monotonic())
            elif pending.due > time.monotonic():
                continue
            self._again.remove(pending)
            if not pending.answered:
                pending.again = None
                self.exchange.stats.asked_again += 1
                stream.send(pending.data)

    def _pause(self, seconds: float) -> None:
        if seconds > 0:
            self._closing.wait(min(seconds, threading.TIMEOUT_MAX))
        if self._closing.is_set():
            raise ClosedClientError(_CLOSED)

    # -- the connection ------------------------------------------------------------------------

    def connect(self) -> None:
        """Open the session.

        Raises:
            ConnectError: Nobody answered within ``Timeouts.connect_s``; the class says how.
            PolicyClientError: The server refuses this client.
        """
        self._connect(self._timeouts.connect_s)

    def _connect_again(self, within_s: float | None = None) -> None:
        self._connect(self._timeouts.reconnect_s if within_s is None else within_s)
        if not self._away:  # we had only dropped it ourselves
            return
        self._away = False
        self.exchange.stats.reconnects += 1
        logger.info(
            "connected to %s again; %d unanswered requests sent again",
            self._endpoint.address,
            len(self.exchange.pending),
        )

    def _connect(self, budget_s: float) -> None:
        attempts = self.exchange.attempts(budget_s, self._timeouts)
        keep_trying(self._endpoint, attempts, self._open, self._pause)

    def _open(self, timeout_s: float) -> None:
        """One attempt: session, then stream, then whatever is not answered."""
        connection, target, response = open_session(
            self._endpoint, self.exchange.hello(), timeout_s
        )
        self._target, self._connection = target, connection
        try:
            self._begin_stream(connection, self.exchange.adopt(response))
        except BaseException:
            self._drop()
            raise

    def _begin_stream(self, connection: Connection, unanswered: Sequence[Pending]) -> None:
        self._stream = stream = connection.stream_act()
        if self._closing.is_set():
            raise ClosedClientError(_CLOSED)
        self._again.clear()
        try:
            stream.send(self.exchange.presence())
            for pending in unanswered:
                stream.send(pending.data)
                pending.stream = stream
            stream.flush(self._timeouts.action_s)
        except BaseException:  # Ctrl-C
            self._end_stream()
            raise

    def _renew_stream(self) -> None:
        """Another stream in the place of one that was given up: it keeps the lease as well."""
        self._end_stream()
        if self._connection is not None:
            self._begin_stream(self._connection, self.exchange.unanswered())

    def _end_stream(self) -> None:
        """Give up the stream alone; another one begins with the next call."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _lost(self, why: str) -> None:
        self._drop()
        if self._closing.is_set():
            raise ClosedClientError(_CLOSED)
        self._away = True
        logger.warning("connection to %s lost (%s); connecting again", self._endpoint.address, why)

    def _drop(self) -> None:
        """Give up stream and channel; the session lives on for its lease."""
        self._end_stream()
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    # -- the end -------------------------------------------------------------------------------

    def interrupt(self) -> None:
        """Make whoever waits raise ClosedClientError. Any thread."""
        self._closing.set()
        if (stream := self._stream) is not None:
            stream.give_up()

    def finish(self) -> None:
        """See that ended episodes have arrived, and close the session: within ``close_s``."""
        try:
            self._say_goodbye()
        finally:  # also where it is interrupted
            self.abort()

    def _say_goodbye(self) -> None:
        until = time.monotonic() + self._timeouts.close_s
        told = [pending for pending in self.exchange.pending.values() if pending.told]
        if self._stream is not None and self._stream.busy:
            told = []  # for a signal handler whose own thread receives beneath
        try:
            for pending in told:
                self._wait(pending, max(until - time.monotonic(), 0.05))
        except (PolicyClientError, Disconnected) as error:
            logger.warning("closing without knowing whether the last episodes arrived: %s", error)
        session = self.exchange.session
        if session is not None:
            if self._connection is None:  # lost: one attempt
                self._connection = Connection(self._endpoint, self._target)
            with contextlib.suppress(PolicyClientError, Disconnected):
                left_s = max(until - time.monotonic(), 0.1)
                request = pb.CloseSessionRequest(session_id=session.id)
                self._connection.close_session(request, left_s)

    def abort(self) -> None:
        """Let go of everything, without a word."""
        self._closing.set()
        self._drop()
