"""``Uploader``: the background of a client that acts alone: brings its chunks to the server.

Its thread opens the session again when it is lost, uploads one request at a time, and takes note of
what became of each chunk. Whoever acts adds chunks and reads ``attention``; when that has to wait
is ``pace``'s to say.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Final

from client_sdk.attempts import Backoff
from client_sdk.call_errors import Disconnected
from client_sdk.chunk_requests import chunk_request
from client_sdk.chunks import CutChunk, Lineage
from client_sdk.config import Timeouts
from client_sdk.endpoint import Endpoint
from client_sdk.errors import (
    ClosedClientError,
    LimitExceededError,
    PolicyClientError,
    UnauthenticatedError,
    UnavailableError,
    UnknownSessionError,
)
from client_sdk.link import Link
from client_sdk.local_options import LocalOptions
from client_sdk.pace import Pace
from client_sdk.policy_cache import PolicyCache
from client_sdk.policy_feed import LoadedPolicy, PolicyFeed
from client_sdk.session import Handshake, logger
from client_sdk.spool import Spool
from client_sdk.transport import Connection
from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.faults import Fault, Reason

LINGER_S: Final = 0.05
"""An ended episode waits so long for company before it is sent."""
_REQUEST_BYTES: Final = 8 * 2**20
"""Of one request, about; a single chunk may be larger."""
_ENVELOPE_BYTES: Final = 4096
_HELD_S: Final = 0.5
"""When closing, an upload that is not answered for so long is held back, not on its way."""
_MANY: Final = 2**31
_LONG_S: Final = 3600.0
"""The server may hold an upload for as long as it learns; that it is gone is noticed otherwise."""
_FETCH_ANEW: Final = frozenset({Reason.POLICY_MISMATCH, Reason.STALE_POLICY, Reason.UNKNOWN_POLICY})


class Uploader:
    """The background of one client that acts alone.

    Attributes:
        attention: Look at ``may_act`` before the next action; read without a lock.
        feed: Where the policy comes from.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        handshake: Handshake,
        timeouts: Timeouts,
        options: LocalOptions,
    ) -> None:
        self.attention = True
        self._timeouts = timeouts
        self._stats = handshake.stats
        self._spool = Spool(options.spool_bytes, options.spool_dir, self._dropped)
        self._link = Link(endpoint, handshake, timeouts, self._another_session)
        self.feed = PolicyFeed(
            self._link, PolicyCache(options.cache_dir), options.update_interval, self._changed
        )
        self._pace = Pace(self._link, self._spool, follows=options.update_interval == 0.0)
        self._request: pb.UploadEpisodesRequest | None = None
        self._urgent_until = 0  # so many chunks, counted as the spool does, wait for no company
        self._finish_by: float | None = None
        self._backoff = Backoff()
        self._reasons_told: set[Reason] = set()
        self._warned_of_drops = False
        self._idle = False  # the thread waits for something to do
        self._thread = threading.Thread(target=self._run, name="client_sdk uploads", daemon=True)

    # -- whoever acts --------------------------------------------------------------------------

    @property
    def policy(self) -> LoadedPolicy | None:
        """The newest one; read it once per step."""
        return self.feed.policy

    def connect(self) -> None:
        """Open the session and start both threads.

        Raises:
            ConnectError: Nobody answered within ``Timeouts.connect_s``; the class says how.
            PolicyClientError: The server refuses this client.
        """
        self._link.open()
        self._thread.start()
        self.feed.start()

    def listen(self, listener: Callable[[], None]) -> None:
        """Call that, from any thread, whenever ``may_act`` may have changed."""
        self._link.listen(listener)

    def add(self, chunks: Sequence[CutChunk], *, urgent: bool) -> None:
        """Have chunks uploaded.

        Args:
            chunks: In order.
            urgent: At once; else when there are more, or in a moment.
        """
        self._spool.add(chunks)
        with self._link.changed:
            if urgent:
                self._urgent_until = self._spool.added
                self._hold_for((chunk.lineage for chunk in chunks), self._spool.added)
            if self._pace.slow_down():
                self.attention = True
            if urgent or self._idle:  # else it lingers for more, and whoever acts keeps the core
                self._link.changed.notify_all()

    def _hold_for(self, lineages: Iterable[Lineage], until: int) -> None:
        """Have training episodes wait until so many chunks are settled, if the server wants that."""
        if self._pace.hold(lineages, until):
            self.attention = True

    def may_act(self, *, trains: bool) -> bool:
        """Whether there is a policy to act with now.

        Args:
            trains: The learner is going to see it.

        Raises:
            ClosedClientError: The client was closed.
            PolicyClientError: The server refuses this client for good.
        """
        self._link.check()
        policy = self.feed.policy
        if policy is None:
            return False
        # While nobody could answer, it acts on.
        return not (trains and self._link.connection is not None and self._pace.waits(policy))

    def await_policy(self, *, trains: bool) -> None:
        """Wait until ``may_act``.

        Raises:
            PolicyTimeout: Not within ``Timeouts.action_s``.
            PolicyClientError: As ``may_act``.
        """
        self._link.wait(lambda: self.may_act(trains=trains), self._timeouts.action_s, "policy")

    def update_policy(self) -> None:
        """Take the newest policy there is.

        Raises:
            PolicyTimeout: No answer within ``Timeouts.action_s``.
            PolicyClientError: As ``may_act``.
        """
        self.feed.fetch_now(self._timeouts.action_s)

    def overdue(self) -> PolicyClientError:
        """The error for a policy that did not come in time."""
        return self._link.overdue("policy", self._timeouts.action_s)

    def ping(self) -> float:
        """Seconds that a round trip takes.

        Raises:
            ConnectError: The connection is lost.
            PolicyClientError: The server refuses.
        """
        return self._link.ping(self._timeouts.action_s)

    def interrupt(self) -> None:
        """Make whoever waits raise ClosedClientError. Any thread."""
        self._link.closing = True
        self.attention = True
        self._link.notify()

    def finish(self) -> None:
        """Upload what is there and close the session, within ``close_s``."""
        until = time.monotonic() + self._timeouts.close_s
        try:
            if self._thread.is_alive():
                with self._link.changed:
                    self._finish_by = until
                    self._link.changed.notify_all()
                self._thread.join(min(_HELD_S, self._timeouts.close_s))
                if not self._only_held:
                    self._thread.join(max(until - time.monotonic(), 0.0))
            if (steps := self._spool.untaken_steps()) and not self._only_held:
                logger.warning("closing without knowing whether the last %d steps arrived", steps)
            self._link.closing = True  # the server is about to end our calls
            self._link.say_goodbye(max(until - time.monotonic(), 0.1))
        finally:  # also where it is interrupted
            self.abort()

    @property
    def _only_held(self) -> bool:
        """Whether nothing is left to send: the server has it, and keeps its answer back."""
        link = self._link
        return link.connection is not None and link.session.holds and not self._spool.waiting

    def abort(self) -> None:
        """Let go of everything, without a word."""
        self.attention = True
        self._link.close()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(1.0)
        self.feed.join(1.0)
        self._spool.close()

    # -- told by several threads ---------------------------------------------------------------

    def _changed(self) -> None:
        """Say again whether acting has to look."""
        link = self._link
        with link.changed:
            policy = self.feed.policy
            self.attention = (
                policy is None
                or link.closing
                or link.failure is not None
                or self._pace.waits(policy)
            )
        link.notify()

    def _dropped(self, chunks: Sequence[CutChunk]) -> None:
        self._stats.steps_dropped += sum(chunk.steps for chunk in chunks)
        if not self._warned_of_drops:
            self._warned_of_drops = True
            logger.warning(
                "experience is lost: more of it waits for the server than spool_bytes allows, or "
                "the server has refused it"
            )

    def _another_session(self, delivered_sequence: int) -> None:
        self._request = None
        self._pace.another_session()
        self._urgent_until = self._spool.added
        self._spool.another_session(delivered_sequence)
        logger.warning(
            "the session was gone (its server restarted, or its lease was over): running episodes "
            "go on as new ones, and %d steps are offered again",
            self._spool.untaken_steps(),
        )

    # -- the uploader's thread -----------------------------------------------------------------

    def _run(self) -> None:
        while not self._link.closing:
            connection = self._link.connection
            try:
                if connection is None:
                    if not self._link.reopen():
                        break
                elif self._has_work():
                    # Not what is known to be in vain: chunks on their way are never dropped.
                    if self._link.connection is connection:
                        self._upload(connection)
                elif self._finish_by is not None:
                    break
            except ClosedClientError:
                break
            except (Disconnected, UnknownSessionError, UnauthenticatedError) as lost:
                if self._is_over():
                    break
                if connection is not None:
                    self._link.lost(connection, str(lost))
            except PolicyClientError as error:
                self._put_off(error)
            except Exception:  # else nothing would ever be uploaded again
                logger.exception("a bug of the client")
                self._give_up()
        self._changed()

    def _is_over(self) -> bool:
        return self._finish_by is not None and time.monotonic() >= self._finish_by

    def _has_work(self) -> bool:
        """Wait until there is something to upload; False: look around."""
        link = self._link
        with link.changed:
            while not (self._request is not None or self._spool.untaken):
                if link.closing or link.connection is None or self._finish_by is not None:
                    return False
                self._idle = True
                link.changed.wait(_LONG_S)
                self._idle = False
            if self._request is None:
                link.changed.wait_for(self._hurries, LINGER_S)
        return not link.closing

    def _hurries(self) -> bool:
        return (
            self._spool.settled < self._urgent_until
            or self._finish_by is not None
            or self._link.closing
        )

    def _upload(self, connection: Connection) -> None:
        """Send the next request, or again the one that was not answered."""
        link = self._link
        if self._request is None:
            self._request = self._next_request()
            self._stats.requests += 1
        else:
            self._stats.asked_again += 1
        number, request = link.number, self._request
        request.session_id = link.session.id
        timeout_s = _LONG_S
        if self._finish_by is not None:
            timeout_s = max(self._finish_by - time.monotonic(), 0.05)
        self._pace.sent()
        try:
            response = connection.upload_episodes(request, timeout_s)
        except Disconnected:
            self._pace.unsent()
            raise
        if number == link.number:
            self._note(request, response)

    def _next_request(self) -> pb.UploadEpisodesRequest:
        session = self._link.session
        limit_bytes = _REQUEST_BYTES
        if session.max_message_bytes:
            limit_bytes = min(limit_bytes, session.max_message_bytes - _ENVELOPE_BYTES)
        entries = self._spool.take(limit_bytes, session.max_rows_per_request or _MANY)
        with self._link.changed:
            until = self._spool.settled + len(entries)
            self._hold_for((entry.chunk.lineage for entry in entries), until)
        self._stats.episodes_resumed += sum(
            entry.starts and entry.chunk.lineage.resumed for entry in entries
        )
        return chunk_request(entries)

    def _note(self, request: pb.UploadEpisodesRequest, response: pb.UploadEpisodesResponse) -> None:
        """Take note of what became of a request."""
        self._request = None
        self._pace.answered(response.policy_version)
        self._backoff = Backoff()
        refused: set[int] = set()
        for each in response.faults:
            if each.index < len(request.chunks):
                refused.add(request.chunks[each.index].sequence)
            self._tell(Fault.from_detail(each.error))
        if refused:
            self._stats.chunks_refused += self._spool.refused(refused)
        self._stats.steps_uploaded += self._spool.answered(
            response.accepted_sequence, response.delivered_sequence
        )
        self._changed()

    def _tell(self, fault: Fault) -> None:
        """Say why a chunk was refused, once for each reason."""
        if fault.reason in _FETCH_ANEW:
            self.feed.fetch_soon()
        level = logging.DEBUG if fault.reason in self._reasons_told else logging.WARNING
        self._reasons_told.add(fault.reason)
        logger.log(level, "the server refuses experience: %s", fault)

    def _put_off(self, error: PolicyClientError) -> None:
        """Repeat a request later that the server does not want now, or never."""
        if error.retry_after_s is None and not isinstance(error, UnavailableError):
            logger.error("the server refuses an upload: %s", error)
            self._give_up()
            return
        if (
            isinstance(error, LimitExceededError)
            and Reason.LIMIT_EXCEEDED not in self._reasons_told
        ):
            self._reasons_told.add(Reason.LIMIT_EXCEEDED)
            logger.warning("waiting, for the server is at a limit: %s", error)
        delay_s = self._backoff.delay_s() if error.retry_after_s is None else error.retry_after_s
        with suppress(ClosedClientError):
            self._link.pause(delay_s)

    def _give_up(self) -> None:
        """That request will never do: go on with what comes after it."""
        self._request = None
        self._pace.answered(None)
        self._stats.chunks_refused += self._spool.rejected()
        self._changed()
