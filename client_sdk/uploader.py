"""``Uploader``: brings chunks to the server, in a thread of its own.

The thread opens the session again when it is lost, uploads one request at a time, and takes note of
what became of each chunk. Whoever acts adds chunks, and in the end waits for them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

from client_sdk.attempts import Backoff
from client_sdk.call_errors import Disconnected
from client_sdk.chunk_requests import chunk_request
from client_sdk.chunks import CutChunk
from client_sdk.errors import (
    ClosedClientError,
    LimitExceededError,
    PolicyClientError,
    UnauthenticatedError,
    UnavailableError,
    UnknownSessionError,
)
from client_sdk.link import Link
from client_sdk.log import logger
from client_sdk.pace import Pace
from client_sdk.policy_feed import PolicyFeed
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
    """The uploads of one client.

    Args:
        link: The session; this thread opens it again.
        spool: Where the chunks are.
        pace: Told what is on its way.
        feed: Asked for another policy where the server refuses what came from this one.
        has_changed: Called when something that acting may wait for has changed.
    """

    def __init__(
        self,
        link: Link,
        spool: Spool,
        pace: Pace,
        feed: PolicyFeed,
        has_changed: Callable[[], None],
    ) -> None:
        self._link = link
        self._spool = spool
        self._pace = pace
        self._feed = feed
        self._has_changed = has_changed
        self._stats = link.handshake.stats
        self._request: pb.UploadEpisodesRequest | None = None
        self._urgent_until = 0  # so many chunks, counted as the spool does, wait for no company
        self._finish_by: float | None = None
        self._backoff = Backoff()
        self._reasons_told: set[Reason] = set()
        self._idle = False  # the thread waits for something to do
        self._refused = False  # the server wants the request later, and has nothing of it
        self._thread = threading.Thread(target=self._run, name="client_sdk uploads", daemon=True)

    # -- whoever acts --------------------------------------------------------------------------

    def start(self) -> None:
        """Upload from now on."""
        self._thread.start()

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
                self._pace.hold((chunk.lineage for chunk in chunks), self._spool.added)
            self._pace.slow_down()
            if urgent or self._idle:  # else it lingers for more, and whoever acts keeps the core
                self._link.changed.notify_all()

    def finish(self, until: float) -> None:
        """Wait until everything is uploaded, or the server has it and holds its answer back.

        Args:
            until: No longer; ``time.monotonic``'s.
        """
        if self._thread.is_alive():
            with self._link.changed:
                self._finish_by = until
                self._link.changed.notify_all()
            self._thread.join(min(_HELD_S, max(until - time.monotonic(), 0.0)))
            if not self._only_held:
                self._thread.join(max(until - time.monotonic(), 0.0))
        if (steps := self._spool.untaken_steps()) and not self._only_held:
            logger.warning("closing without knowing whether the last %d steps arrived", steps)

    @property
    def _only_held(self) -> bool:
        """Whether nothing is left to send: the server has it, and keeps its answer back."""
        link = self._link
        unsent = self._spool.waiting or self._refused
        return link.connection is not None and link.session.holds and not unsent

    def join(self, timeout_s: float) -> None:
        """Wait for the thread, once the link is closed."""
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    # -- the uploader's thread -----------------------------------------------------------------

    def another_session(self, delivered_sequence: int) -> None:
        """The session was gone, and is another one now; that one has delivered so many chunks."""
        self._request = None
        self._pace.another_session()
        self._urgent_until = self._spool.added
        self._spool.another_session(delivered_sequence)
        logger.warning(
            "the session was gone (its server restarted, or its lease was over): running episodes "
            "go on as new ones, and %d steps are offered again",
            self._spool.untaken_steps(),
        )

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
        self._has_changed()

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
        self._refused = False
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
            self._pace.hold((entry.chunk.lineage for entry in entries), until)
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
        self._has_changed()

    def _tell(self, fault: Fault) -> None:
        """Say why a chunk was refused, once for each reason."""
        if fault.reason in _FETCH_ANEW:
            self._feed.fetch_soon()
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
        self._refused = isinstance(error, LimitExceededError)
        delay_s = self._backoff.delay_s() if error.retry_after_s is None else error.retry_after_s
        with suppress(ClosedClientError):
            self._link.pause(delay_s)

    def _give_up(self) -> None:
        """That request will never do: go on with what comes after it."""
        self._request = None
        self._pace.answered(None)
        self._stats.chunks_refused += self._spool.rejected()
        self._has_changed()
