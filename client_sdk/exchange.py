"""``Exchange``: requests on their way and what their answers mean; still without I/O.

A shell sends what ``issue`` gives, hands what it receives to ``take``, and after every reconnection
sends again what ``adopt`` says. Owned by one client; one of its calls, or its loop, at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import gymnasium as gym
from google.protobuf.message import DecodeError

from client_sdk.answers import AnswerReader, leading_number
from client_sdk.errors import (
    BatchError,
    InternalServerError,
    LimitExceededError,
    error_from_fault,
)
from client_sdk.log import logger
from client_sdk.pending import Pending
from client_sdk.row_requests import RowRequests
from client_sdk.rows import Rows, Track
from client_sdk.session import Handshake
from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.faults import Fault, Reason

_WARN_EVERY_S = 60.0
"""That a server is at a limit, at most: it may be with each step."""

_ASK_AGAIN = frozenset({Reason.NOT_READY, Reason.DRAINING})


class Exchange(Handshake):
    """The client's side of the conversation: numbers, and what is not answered."""

    _requests: RowRequests
    """Of the session."""
    _encode: Callable[[Pending], bytes]
    """Its ``encode``, looked up once: each step needs it."""
    _reader: AnswerReader
    """Likewise of the session: another server may answer in other words."""

    def __init__(
        self,
        client_name: str,
        observation_space: gym.Space[Any] | None = None,
        action_space: gym.Space[Any] | None = None,
    ) -> None:
        super().__init__(client_name, pb.INFERENCE_MODE_REMOTE, observation_space, action_space)
        self.pending: dict[int, Pending] = {}
        """Sent and not answered, by number, in the order of sending."""
        self.lost = ""
        """Why another connection is needed; empty: it is not."""
        self.welcome_with_logp: set[bool] = set()
        """The session has accepted logged actions with, or without one: the algorithm decides."""
        self._limit_bytes = 0
        self._warns_again = 0.0
        self._next_request = 1

    # -- the session ---------------------------------------------------------------------------

    def adopt(self, response: pb.OpenSessionResponse) -> list[Pending]:
        """Work under that session from now on.

        Returns:
            The requests to send (again), in order.

        Raises:
            PolicyClientError: This client cannot work with what the server offers.
        """
        previous = self.session
        if self.agree(response):
            self._limit_bytes = self.opened.max_message_bytes
            self._requests = RowRequests(self.opened.id, self.observation_codec, self.action_codec)
            self._encode = self._requests.encode
            self._reader = AnswerReader(self.action_codec)
        self.lost = ""
        if previous is not None and previous.id != response.session_id:
            self.welcome_with_logp.clear()
            self._restart()
        return self.unanswered()

    def unanswered(self) -> list[Pending]:
        """The requests to send again on another stream of the session, in order."""
        unanswered = list(self.pending.values())
        for pending in unanswered:
            pending.again = None
        return unanswered

    def presence(self) -> bytes:
        """The first message of a stream, with nothing in it: from here on it keeps the lease."""
        return self._requests.presence()

    def _restart(self) -> None:
        """Carry everything unanswered and everything running over to the new session."""
        resumed = ends_lost = 0
        idle = set(self.tracks)
        for pending in list(self.pending.values()):
            track, rows = pending.track, pending.rows
            if pending.final or track not in self.tracks:
                del self.pending[pending.number]
                pending.answered = True
                ends_lost += pending.final
                continue
            idle.discard(track)
            self._requests.reload(pending)
            counts = track.restarted(rows)
            resumed += counts[0]
            ends_lost += counts[1]
            if rows.episodes:
                pending.data = self._encode(pending)
            else:  # all of them were ends
                self._finish(pending)
        for track in idle:
            resumed += track.restarted(None)[0]
        self.stats.sessions_lost += 1
        self.stats.episodes_resumed += resumed
        self.stats.ends_lost += ends_lost
        logger.warning(
            "the session was gone (its server restarted, or its lease was over): %d running "
            "episodes go on as new ones, %d ends on their way were lost",
            resumed,
            ends_lost,
        )

    # -- requests ------------------------------------------------------------------------------

    def issue(
        self, track: Track, rows: Rows, *, told: bool = False, final: bool = False
    ) -> Pending:
        """Number and encode a request; its ``data`` is to be sent.

        Args:
            track: Whose rows these are.
            rows: What to say.
            told: Nobody is going to wait for the answer.
            final: These rows end what they speak of.

        Raises:
            LimitExceededError: It is larger than the server accepts; nothing was recorded.
        """
        pending = Pending(self._next_request, track, rows, told, final)
        pending.data = self._encode(pending)
        if 0 < self._limit_bytes < len(pending.data):
            track.refused(rows)
            raise LimitExceededError(
                f"a request of {len(pending.data)} bytes is larger than the server's limit of "
                f"{self._limit_bytes} (PolicyServerConfig.max_message_bytes). Send fewer rows, or "
                "raise the limit."
            )
        self._next_request += 1
        self.pending[pending.number] = pending
        if not final:
            track.pending = pending
        self.stats.requests += 1
        return pending

    def take(self, data: bytes) -> Pending | None:
        """Read an answer.

        Returns:
            Its request: now with an ``answer``, or to be sent ``again``. None: nobody's.

        Raises:
            InternalServerError: It is no answer of the contract.
        """
        number, start = leading_number(data)
        pending = self.pending.get(number)
        if pending is not None:
            found = self._reader.read(data, start, len(pending.rows.episodes))
            if found is not None:
                pending.actions, version = found
                if version:
                    self.policy_version = version
                self._finish(pending)
                return pending
        return self._take_parsed(data)

    def _take_parsed(self, data: bytes) -> Pending | None:
        try:
            response = pb.StreamActResponse.FromString(data)
        except DecodeError as error:
            raise InternalServerError(f"an answer cannot be read: {error}") from None
        pending = self.pending.get(response.request)
        if pending is None:
            return None
        groups = response.act.groups
        if len(groups) == 1:
            self._answered(pending, groups[0])
            if pending.actions is not None and pending.faults is None:
                n = len(pending.rows.episodes)
                self._reader.learn(data, n, groups[0].policy_version)
        elif response.HasField("error"):
            failure = Fault.from_detail(response.error)
            if failure.reason is Reason.UNKNOWN_SESSION:
                self.lost = "the server does not know the session any more"
                return None
            if _asks_again(failure):
                self._put_off(pending, failure)
            else:
                pending.failure = failure
                self._finish(pending)
        else:
            pending.failure = _nonsense("expected one group")
            self._finish(pending)
        return pending

    def withdraw(self, track: Track) -> None:
        """Do not repeat what the server put off: it would begin what has been taken back."""
        pending = track.pending
        if pending is not None and pending.again is not None:
            pending.failure = pending.again
            self._finish(pending)

    def _put_off(self, pending: Pending, fault: Fault) -> None:
        """The server wants to be asked later, unless nobody wants to know any more."""
        if not pending.final and pending.track not in self.tracks:
            pending.failure = fault
            self._finish(pending)
            return
        if fault.reason is Reason.DRAINING:
            self.lost = fault.message
            return
        now = time.monotonic()
        if fault.reason is Reason.LIMIT_EXCEEDED and now > self._warns_again:
            self._warns_again = now + _WARN_EVERY_S
            logger.warning("waiting, for the server is at a limit: %s", fault.message)
        pending.again = pending.why = fault

    def _answered(self, pending: Pending, group: pb.ActionRows) -> None:
        if group.faults:
            faults = {each.index: Fault.from_detail(each.error) for each in group.faults}
            for fault in faults.values():
                if _asks_again(fault):
                    self._put_off(pending, fault)
                    return
            pending.faults = faults
        if version := group.policy_version:
            self.policy_version = version
        actions = group.actions
        if actions.leaves:
            try:
                n = len(pending.rows.episodes)
                pending.actions = self.action_codec.decode(actions, n, "actions")
            except Fault as fault:
                pending.failure = fault
        self._finish(pending)

    def _finish(self, pending: Pending) -> None:
        """Let the state follow the answer, whether or not anyone waits for it."""
        self.pending.pop(pending.number, None)
        pending.again = None
        pending.answered = True
        failure, faults = pending.failure, pending.faults
        if failure is None and faults is None and not pending.final:
            pending.track.accepted(pending.rows)
            return
        rows, track = pending.rows, pending.track
        self.stats.rows_refused += len(rows.episodes if failure else faults or ())
        if pending.final:
            # Its track has ended, or gone on with other episodes.
            if fault := pending.fault:
                logger.warning("the server refused the end of episode %s: %s", track, fault)
        elif failure is not None:
            track.refused(rows)
        else:
            track.accepted(rows, rows.callers(faults or ()))

    # -- answers -------------------------------------------------------------------------------

    def action(self, pending: Pending) -> Any:
        """The action that answers the one row of that request.

        Raises:
            PolicyClientError: Why there is none.
        """
        if pending.failure is not None or pending.faults is not None:
            self.acknowledge(pending)
        pending.track.pending = None
        actions = pending.actions
        if actions is None:
            raise error_from_fault(_nonsense("expected an action"))
        return self.action_codec.value(actions, 0)

    def acknowledge(self, pending: Pending) -> None:
        """See that nothing of that request was refused.

        Raises:
            PolicyClientError: Something was.
        """
        if pending.track.pending is pending:
            pending.track.pending = None
        if fault := pending.fault:
            raise error_from_fault(fault)

    def actions(self, pending: Pending, n: int) -> Any:
        """The actions that answer the N rows of that request.

        Raises:
            BatchError: Some rows have none.
            PolicyClientError: Nothing was recorded.
        """
        pending.track.pending = None
        if pending.failure is not None:
            raise error_from_fault(pending.failure)
        columns, index, faults = pending.actions, pending.rows.index, pending.faults
        if columns is None:
            columns = self.action_codec.zeros(n)
        elif index is not None:
            some, columns = columns, self.action_codec.zeros(n)
            for path, column in some.items():
                columns[path][index] = column
        actions = self.action_codec.batched_value(columns)
        if faults:
            errors = map(error_from_fault, faults.values())
            rows = pending.rows.callers(faults)
            raise BatchError(dict(zip(rows, errors, strict=True)), actions)
        return actions


def _asks_again(fault: Fault) -> bool:
    """Whether the same request may succeed later, unchanged."""
    return fault.reason in _ASK_AGAIN or fault.retry_after_s is not None


def _nonsense(expected: str) -> Fault:
    return Fault(Reason.INTERNAL, f"the server's answer breaks the contract: {expected}")
