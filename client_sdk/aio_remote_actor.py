"""``AioRemoteActor``: what ``remote_actor.RemoteActor`` does, for many tasks of one event loop.

One task reads the stream, connects again when it breaks, and wakes whoever waits; so a lost
connection comes back also while nobody asks for anything. Loop only.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import time
from collections.abc import Coroutine, Sequence
from typing import Any

from client_sdk.aio_connecting import keep_trying, open_session
from client_sdk.aio_transport import AioConnection, AioStream
from client_sdk.batch_track import BatchTrack
from client_sdk.call_errors import Disconnected
from client_sdk.config import Timeouts
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
from client_sdk.rows import Status, Track
from client_sdk.wire import policyserver_pb2 as pb

MAX_UNANSWERED = 1024
"""As in ``remote_actor``; here many may be on their way that tasks do wait for."""

_CLOSED = "the client was closed meanwhile"


class AioRemoteActor:
    """The shell around an ``Exchange`` for one event loop. Its stream keeps the session's lease."""

    def __init__(self, endpoint: Endpoint, exchange: Exchange, timeouts: Timeouts) -> None:
        self.exchange = exchange
        self._steps = RemoteSteps(exchange)
        self._endpoint = endpoint
        self._timeouts = timeouts
        self._loop = asyncio.get_running_loop()
        self._connection: AioConnection | None = None
        self._stream: AioStream | None = None
        self._reader: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._asked: Pending | None = None  # whose answer its own task receives
        self._closed = False

    # -- verbs ---------------------------------------------------------------------------------

    async def act(self, track: EpisodeTrack, observation: Any, reward: float = 0.0) -> Any:
        """Record where an episode is; returns the next action."""
        pending = track.pending
        if pending is not None and pending.told:
            await self._settle(track)
            pending = None
        # A step that was asked and not answered is still asked.
        if pending is None:
            columns = self.exchange.observation(observation)
            track.add_reward(reward)
            pending = self.exchange.issue(track, track.row(columns))
            await self._ask(pending)
        else:
            await self._wait(pending)
        return self.exchange.action(pending)

    async def log_action(
        self,
        track: EpisodeTrack,
        observation: Any,
        action: Any,
        logp: float | None = None,
        reward: float = 0.0,
    ) -> None:
        """Record what the application did by itself."""
        await self._settle(track)
        pending = self._steps.log_action(track, observation, action, logp, reward)
        await self._send(pending)
        if not pending.told:
            await self._wait(pending)
            self._steps.logged(pending)

    async def end(
        self, track: EpisodeTrack, observation: Any, status: Status, reward: float = 0.0
    ) -> None:
        """Record where an episode ended; nobody waits for the answer."""
        await self._settle(track)
        await self._tell(track, self._steps.end(track, observation, status, reward))

    async def abandon(self, track: EpisodeTrack) -> None:
        """Take an episode back; nobody waits for the answer."""
        await self._tell(track, self._steps.abandon(track))

    async def act_batch(
        self, track: BatchTrack, observations: Any, rewards: Any, terminated: Any, truncated: Any
    ) -> Any:
        """Record a vector step; returns the next actions."""
        pending = track.pending
        if pending is None:
            columns = self.exchange.observations(observations, track.n)
            rows = track.rows(columns, rewards, terminated, truncated)
            if rows is None:
                return self.exchange.no_actions(track.n)
            pending = self.exchange.issue(track, rows)
            await self._ask(pending)
        else:
            await self._wait(pending)
        return self.exchange.actions(pending, track.n)

    async def abandon_rows(self, track: BatchTrack, indices: Sequence[int]) -> None:
        """Take some episodes of a batch back, after whatever was asked of it before."""
        if track.pending is not None:
            # Its answer stays for whoever asks again: those actions have been chosen.
            await self._wait(track.pending)
        await self._tell(track, self._steps.abandon_rows(track, indices))

    async def close_batch(self, track: BatchTrack) -> None:
        """Take back what is running of a batch; nothing more comes from it."""
        await self._tell(track, self._steps.close_batch(track))

    async def update_policy_weights(self) -> None:
        """Nothing to do: the server always acts with its newest policy."""

    async def ping(self) -> float:
        """Seconds that a round trip takes, without an action."""
        exchange = self.exchange
        request = pb.ActRequest(session_id=exchange.session.id if exchange.session else "")
        connection = self._connection
        if connection is None:
            raise ConnectError(f"connection to {self._endpoint.address} lost: connecting again")
        start = time.perf_counter()
        try:
            await connection.act(request, min(self._timeouts.action_s, 3600.0))
        except (Disconnected, UnavailableError, UnknownSessionError) as lost:
            raise ConnectError(f"connection to {self._endpoint.address} lost: {lost}") from None
        return time.perf_counter() - start

    # -- one request ---------------------------------------------------------------------------

    async def _ask(self, pending: Pending) -> None:
        """Send a request, and wait for its answer; raises as ``_wait``."""
        exchange, stream = self.exchange, self._stream
        # With several episodes, what others have to say would wait for this answer.
        if stream is None or len(exchange.tracks) > 1 or not stream.may_ask:
            await self._send(pending)
            await self._wait(pending)
            return
        pending.due = self._loop.time() + self._timeouts.action_s
        self._asked = pending
        if self._timer is None:
            self._watch()
        try:
            data = await stream.ask(pending.data)
        finally:
            self._asked = None
        if data is not None:
            try:
                self._take(data, stream)
            except PolicyClientError:
                stream.put_back(data)  # for the reader to deal with
            if exchange.lost:
                stream.put_back(data)
        if not pending.answered:
            stream.wake()
            left_s = pending.due - self._loop.time()
            if left_s <= 0.0:
                raise pending.overdue(self._endpoint.address, self._timeouts.action_s)
            await self._await_answer(pending, left_s)

    async def _send(self, pending: Pending) -> None:
        stream = self._stream
        if stream is not None:
            await stream.send(pending.data)
        elif self._reader is None or self._reader.done():
            # Gave up connecting; it is sent with everything unanswered.
            self._reader = self._loop.create_task(self._read(connected=False))

    async def _tell(self, track: Track, pending: Pending | None) -> None:
        withdrawn = track.pending
        if withdrawn is not None and withdrawn.answered:
            _wake(withdrawn)  # whoever waits for it is told why the server put it off
        if pending is not None:
            await self._send(pending)

    async def _settle(self, track: EpisodeTrack) -> None:
        """Wait for the episode's previous row, so that two of one episode are never on their way.

        And for the oldest of all, where nobody has waited for very many.
        """
        if len(self.exchange.pending) > MAX_UNANSWERED:
            oldest = next(iter(self.exchange.pending.values()))
            if oldest.waiter is None:
                await self._wait(oldest)
        pending = track.pending
        if pending is not None:
            await self._wait(pending)
            self.exchange.acknowledge(pending)

    async def _wait(self, pending: Pending, within_s: float | None = None) -> None:
        """Wait until that request has an answer; the reader sees to it.

        Raises:
            PolicyTimeout: It has none within ``Timeouts.action_s``.
            ConnectError: The connection could not be made again.
        """
        if pending.answered:
            return
        if pending.again is not None and self._stream is not None:
            # Since an earlier call, whose patience ended.
            pending.tries = 0
            self._ask_again(pending, self._stream)
        await self._await_answer(pending, within_s)

    async def _await_answer(self, pending: Pending, within_s: float | None = None) -> None:
        if self._closed:
            raise ClosedClientError(_CLOSED)
        if self._reader is None or self._reader.done():
            await self._send(pending)
        within = self._timeouts.action_s if within_s is None else within_s
        while (first := pending.waiter) is not None and not first.done():
            # Whose slot it is must not be forgotten: it waits for the same answer.
            if await self._wait_with(first, pending, within):
                return
        waiter = pending.waiter = self._loop.create_future()
        pending.due = self._loop.time() + within
        if self._timer is None or within_s is not None:
            self._watch()
        await waiter

    async def _wait_with(
        self, first: asyncio.Future[None], pending: Pending, within_s: float
    ) -> bool:
        """Wait beside another task; False: it was cancelled before there was an answer.

        Raises:
            PolicyTimeout: There is none after ``within_s``, however long the other task waits.
            PolicyClientError: What the other task is told.
        """
        await asyncio.wait({first}, timeout=within_s)
        while not first.done() and self._stream is None:
            await asyncio.wait({first}, timeout=within_s)  # connecting: the reader's patience
        if pending.answered:
            return True
        if not first.done():
            raise pending.overdue(self._endpoint.address, within_s)
        if not first.cancelled() and (error := first.exception()) is not None:
            raise copy.copy(error)
        return False

    def _watch(self) -> None:
        """Look again when the first of those who wait has waited long enough."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due = [
            pending.due
            for pending in self.exchange.pending.values()
            if pending.waiter or pending is self._asked
        ]
        if due:
            # Nobody waits longer than that, so one timer is enough: those who come later are due
            # later, or found when it fires.
            self._timer = self._loop.call_at(min(due), self._expire)

    def _expire(self) -> None:
        now = self._loop.time()
        for pending in self.exchange.pending.values():
            # While connecting, the patience is reconnect_s and the reader's.
            if pending.due <= now and self._stream is not None:
                if pending is self._asked:
                    self._stream.give_way()
                elif pending.waiter:
                    error = pending.overdue(self._endpoint.address, self._timeouts.action_s)
                    _wake(pending, error)
        self._timer = None
        if self._stream is not None:
            self._watch()

    # -- the connection ------------------------------------------------------------------------

    async def connect(self) -> None:
        """Open the session.

        Raises:
            ConnectError: Nobody answered within ``Timeouts.connect_s``; the class says how.
            PolicyClientError: The server refuses this client.
        """
        await self._connect(self._timeouts.connect_s)
        self._reader = self._loop.create_task(self._read(connected=True))

    async def _read(self, *, connected: bool) -> None:
        """Take answers and connect again, until that fails or the client is closed."""
        try:
            while True:
                if not connected:
                    await self._connect(self._timeouts.reconnect_s)
                    self.exchange.stats.reconnects += 1
                    logger.info(
                        "connected to %s again; %d unanswered requests sent again",
                        self._endpoint.address,
                        len(self.exchange.pending),
                    )
                why = await self._read_stream()
                if self._closed:
                    return
                await self._drop()
                connected = False
                logger.warning(
                    "connection to %s lost (%s); connecting again", self._endpoint.address, why
                )
        except PolicyClientError as error:
            await self._drop()
            logger.error("gave up connecting to %s: %s", self._endpoint.address, error)
            self._fail(error)
        except Exception as error:  # else whoever waits would wait for ever
            logger.exception("a bug of the client")
            await self._drop()
            self._fail(ConnectError(f"the client failed: {error!r}"))

    async def _read_stream(self) -> str:
        """Take answers until there are no more; returns why."""
        exchange, expected = self.exchange, self.exchange.pending
        while True:
            stream, connection = self._stream, self._connection
            if stream is None or connection is None:
                return "never connected"
            try:
                self._take(await stream.receive(expected), stream)
            except Disconnected as lost:
                if not stream.gave_way:
                    return lost.why
                self._begin_stream(connection, exchange.unanswered())
            if exchange.lost:
                return exchange.lost

    def _take(self, data: bytes, stream: AioStream) -> None:
        pending = self.exchange.take(data)
        if pending is None:
            return
        if pending.answered:
            if pending.waiter is not None:
                _wake(pending)
        elif pending.again is not None:
            self._loop.call_later(pending.again_in_s(), self._ask_again, pending, stream)

    def _ask_again(self, pending: Pending, stream: AioStream) -> None:
        """Repeat a request that met a "not now", unless connecting again has done so."""
        if pending.again is not None and stream is self._stream:
            pending.again = None
            self.exchange.stats.asked_again += 1
            self._spawn(stream.send(pending.data))

    def _fail(self, error: PolicyClientError) -> None:
        for pending in list(self.exchange.pending.values()):
            if pending.waiter is not None:
                _wake(pending, copy.copy(error))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)  # the loop itself keeps only weak references
        task.add_done_callback(self._tasks.discard)

    async def _connect(self, budget_s: float) -> None:
        attempts = self.exchange.attempts(budget_s, self._timeouts)
        await keep_trying(self._endpoint, attempts, self._open)

    async def _open(self, timeout_s: float) -> None:
        """One attempt: session, then stream, then whatever is not answered."""
        connection, response = await open_session(self._endpoint, self.exchange.hello(), timeout_s)
        try:
            waiting = list(self.exchange.pending.values())
            unanswered = self.exchange.adopt(response)
            self._begin_stream(connection, unanswered)
        except BaseException:
            await connection.close()
            raise
        self._connection = connection
        now = self._loop.time()
        for pending in unanswered:
            pending.due = max(pending.due, now + self._timeouts.action_s)
        for pending in waiting:
            if pending.answered:  # not worth sending to another server
                _wake(pending)
        self._watch()

    def _begin_stream(self, connection: AioConnection, unanswered: Sequence[Pending]) -> None:
        self._stream = stream = connection.stream_act()
        self._spawn(stream.send(self.exchange.presence()))
        for pending in unanswered:
            self._spawn(stream.send(pending.data))

    async def _drop(self) -> None:
        """Give up stream and channel; the session lives on for its lease."""
        stream, self._stream = self._stream, None
        connection, self._connection = self._connection, None
        if stream is not None:
            stream.close()
        if connection is not None:
            await connection.close()

    # -- the end -------------------------------------------------------------------------------

    async def finish(self) -> None:
        """See that ended episodes have arrived, and close the session: within ``close_s``."""
        try:
            await self._say_goodbye()
        finally:  # also where it is interrupted
            await self.abort()

    async def _say_goodbye(self) -> None:
        until = time.monotonic() + self._timeouts.close_s
        told = [pending for pending in self.exchange.pending.values() if pending.told]
        try:
            async with asyncio.timeout(self._timeouts.close_s):
                for pending in told:
                    await self._wait(pending, max(until - time.monotonic(), 0.05))
        except (PolicyClientError, TimeoutError) as error:
            logger.warning("closing without knowing whether the last episodes arrived: %s", error)
        self._closed = True  # the server is about to end our stream
        session, connection = self.exchange.session, self._connection
        if session is not None and connection is not None:
            with contextlib.suppress(PolicyClientError, Disconnected):
                left_s = max(until - time.monotonic(), 0.1)
                request = pb.CloseSessionRequest(session_id=session.id)
                await connection.close_session(request, left_s)

    async def abort(self) -> None:
        """Let go of everything, without a word; whoever waits is told so."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for task in (self._reader, *self._tasks):
            if task is not None and not task.done():
                task.cancel()
                await asyncio.wait({task})
        await self._drop()
        self._fail(ClosedClientError(_CLOSED))

    def forget(self) -> None:
        """Stop the reader of a client that nobody closed. Any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed, and the task with it
            if self._reader is not None:
                self._loop.call_soon_threadsafe(self._reader.cancel)


def _wake(pending: Pending, error: BaseException | None = None) -> None:
    waiter, pending.waiter = pending.waiter, None
    if waiter is None or waiter.done():
        return
    if error is None:
        waiter.set_result(None)
    else:
        waiter.set_exception(error)
