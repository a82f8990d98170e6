"""Who is connected: sessions with leases, resume, and an end for those that fell silent.

Loop thread only. A session's id is its credential: logs show the client's name and a running
number instead.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

from client_sdk.wire.faults import Fault, Reason
from policy_server.episodes import EpisodeBook, EpisodeStore
from policy_server.rate_limits import Meter, RateLimit
from policy_server.refusals import draining
from policy_server.uploads import UploadLog

logger = logging.getLogger(__name__)

_MAX_REMEMBERED = 10_000
"""Ended sessions whose uploads are remembered."""


class Call(Protocol):
    """A call under way in a session."""

    def end(self, fault: Fault) -> None:
        """Fail it with that."""
        ...


class Session:
    """One connected client process.

    Attributes:
        session_id: 128 random bits; never logged.
        title: Its name and number, for logs.
        book: Its episodes.
        calls: Open streams and requests that wait; while there is one, the lease does not run.
        local: The client acts alone and uploads what it experiences.
        uploads: What it has uploaded.
        steps: What it has used of the rate of steps.
    """

    __slots__ = ("book", "calls", "last_seen_s", "local", "session_id", "steps", "title", "uploads")

    def __init__(
        self,
        session_id: str,
        title: str,
        book: EpisodeBook,
        steps: Meter,
        now_s: float,
        *,
        local: bool,
    ) -> None:
        self.session_id = session_id
        self.title = title
        self.local = local
        self.uploads = UploadLog()
        self.book = book
        self.steps = steps
        self.calls: set[Call] = set()
        self.last_seen_s = now_s


class SessionRegistry:
    """All sessions by id.

    Attributes:
        opened: Sessions so far.
        expired: Ended by their lease, not by their client.
        episodes_lost: Unfinished episodes of ended sessions.
    """

    def __init__(
        self,
        store: EpisodeStore,
        *,
        lease_s: float,
        longest_answer_s: float,
        max_sessions: int,
        max_calls: int,
        step_rate: RateLimit,
        open_rate: RateLimit,
        changed: Callable[[int], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nobody is connected yet.

        Args:
            store: Of the episodes.
            lease_s: A session that nobody named for this long ends.
            longest_answer_s: A request may wait so long for its answer. Whatever it said is
                remembered for a lease after that, for it may be said again.
            max_sessions: At once.
            max_calls: Under way at once in one session.
            step_rate: Of the steps of one session.
            open_rate: Of new sessions.
            changed: Told how many sessions there are.
            clock: In seconds.
        """
        self._store = store
        self._lease_s = lease_s
        self._longest_answer_s = longest_answer_s
        self._max_sessions = max_sessions
        self._max_calls = max_calls
        self._step_rate = step_rate
        self._opening = open_rate.meter()
        self._draining = False
        self._changed = changed
        self.clock = clock
        self._sessions: dict[str, Session] = {}
        self._numbers = itertools.count(1)
        # Of ended sessions, how many chunks they had uploaded.
        self._uploaded: OrderedDict[str, int] = OrderedDict()
        self.opened = 0
        self.expired = 0
        self.episodes_lost = 0

    def __len__(self) -> int:
        return len(self._sessions)

    def open(
        self, client_name: str, resume_id: str, *, local: bool = False
    ) -> tuple[Session, bool]:
        """The session of that id if it still lives, else a new one.

        Returns:
            The session, and whether it was resumed. Older calls of a resumed one are ended: they
            belong to a connection that the client gave up.

        Raises:
            Fault: LIMIT_EXCEEDED; or WRONG_MODE, that session is of the other mode.
        """
        known = self._sessions.get(resume_id)
        if known is not None:
            if known.local != local:
                raise Fault(
                    Reason.WRONG_MODE,
                    f"the session to resume is one of {_mode(known.local)} inference, asked for "
                    f"was {_mode(local)}; open another one, without session_id",
                    "inference_mode",
                )
            known.last_seen_s = self.clock()
            _end_calls(
                known,
                Fault(
                    Reason.NOT_READY,
                    "this call is over: its session was resumed on another connection; ask again "
                    "there",
                ),
            )
            logger.info("%s: resumed", known.title)
            return known, True
        if len(self._sessions) >= self._max_sessions:
            raise Fault(
                Reason.LIMIT_EXCEEDED,
                f"{len(self._sessions)} sessions are open, as many as max_sessions="
                f"{self._max_sessions} allows; close some, or raise that setting on the server",
                retry_after_s=min(self._lease_s, 5.0),
            )
        self._opening.take(1)
        title = f"{_printable(client_name) or 'client'} #{next(self._numbers)}"
        session = Session(
            secrets.token_hex(16),
            title,
            self._store.book(),
            self._step_rate.meter(),
            self.clock(),
            local=local,
        )
        self._sessions[session.session_id] = session
        self.opened += 1
        self._changed(len(self._sessions))
        logger.info(
            "%s: connected, %s inference; %d sessions", title, _mode(local), len(self._sessions)
        )
        return session, False

    def uploaded(self, session_id: str) -> int:
        """The last chunk that an ended session had uploaded: it need not come again."""
        return self._uploaded.get(session_id, 0)

    def find(self, session_id: str) -> Session:
        """The session of that id, its lease renewed.

        Raises:
            Fault: UNKNOWN_SESSION, or DRAINING.
        """
        self.check_not_draining()
        session = self._sessions.get(session_id)
        if session is None:
            raise Fault(
                Reason.UNKNOWN_SESSION,
                "no such session: it was never opened, its lease is over "
                f"({self._lease_s:g} s without a call), or the server was restarted since. "
                "Open another one",
                "session_id",
            )
        session.last_seen_s = self.clock()
        return session

    def admit(self, session: Session, call: Call) -> None:
        """Count a call among its session's.

        Raises:
            Fault: LIMIT_EXCEEDED; the session has too many already.
        """
        if len(session.calls) >= self._max_calls:
            raise Fault(
                Reason.LIMIT_EXCEEDED,
                f"{len(session.calls)} calls of this session are under way, as many as "
                f"max_calls_per_session={self._max_calls} allows; wait for their answers, use one "
                "StreamAct for all, or raise that setting on the server",
                retry_after_s=0.1,
            )
        session.calls.add(call)

    def leave(self, session: Session, call: Call) -> None:
        """The opposite of ``admit``; from here on the lease runs."""
        session.calls.discard(call)
        session.last_seen_s = self.clock()

    def drain(self) -> None:
        """From now on no session can be found."""
        self._draining = True

    def check_not_draining(self) -> None:
        """Refuse what would begin now.

        Raises:
            Fault: DRAINING.
        """
        if self._draining:
            raise draining()

    def close(self, session_id: str) -> None:
        """End a session, its unfinished episodes truncated; unknown ones are fine."""
        session = self._sessions.pop(session_id, None)
        if session is not None:
            self._end(session, "closed")

    def close_all(self) -> None:
        """The server stops."""
        for session_id in list(self._sessions):
            self.close(session_id)

    def expire(self) -> None:
        """End sessions whose lease is over, and forget ends that nobody says again any more."""
        now = self.clock()
        before = now - self._lease_s
        forgotten = before - self._longest_answer_s
        for session in list(self._sessions.values()):
            if session.calls:
                session.last_seen_s = now
            elif session.last_seen_s < before:
                del self._sessions[session.session_id]
                self.expired += 1
                self._end(session, f"silent for {self._lease_s:g} s")
                continue
            session.book.forget_ends(forgotten)

    def _end(self, session: Session, why: str) -> None:
        _end_calls(
            session,
            Fault(
                Reason.UNKNOWN_SESSION,
                f"this call is over, for its session is: {why}. Open another one",
                "session_id",
            ),
        )
        if session.uploads.accepted:
            self._uploaded[session.session_id] = session.uploads.accepted
            if len(self._uploaded) > _MAX_REMEMBERED:
                self._uploaded.popitem(last=False)
        lost = self._store.drop(session.book)
        self.episodes_lost += lost
        self._changed(len(self._sessions))
        logger.info(
            "%s: %s; %d unfinished episodes truncated; %d sessions",
            session.title,
            why,
            lost,
            len(self._sessions),
        )


def _end_calls(session: Session, fault: Fault) -> None:
    calls, session.calls = session.calls, set()
    for call in calls:
        call.end(fault)


def _mode(local: bool) -> str:
    return "local" if local else "remote"


def _printable(name: str) -> str:
    """A client's name, safe for a log line."""
    return "".join(character for character in name[:64] if character.isprintable())
