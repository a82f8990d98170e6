"""Requests on their way and what their answers mean: the contract's messages, still without I/O.

A shell sends what ``issue`` gives, hands what it receives to ``take``, and after every reconnection
sends again what ``adopt`` says. Owned by one client; one of its calls, or its loop, at a time.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import random
from collections.abc import Iterable
from typing import Any

import gymnasium as gym
from google.protobuf import json_format
from google.protobuf.message import DecodeError

from client_sdk.episode import Numbering, Rows, Status, Track
from client_sdk.errors import (
    BatchError,
    IncompatibleProtocolError,
    InternalServerError,
    InvalidValueError,
    LimitExceededError,
    NotConnectedError,
    NotFiniteError,
    PolicyTimeout,
    SpaceMismatchError,
    error_from_fault,
)
from client_sdk.templates import RowsTemplate, usable
from client_sdk.wire import PROTOCOL_VERSION
from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.batches import Columns, SpaceCodec
from client_sdk.wire.faults import Fault, Reason
from client_sdk.wire.spaces import diff, space_from_proto, space_to_proto

logger = logging.getLogger("client_sdk")

AGENT = ""
"""The only agent of single-agent work."""

_MAX_TEMPLATES = 8
"""Of different numbers of rows."""

_ASK_AGAIN = frozenset({Reason.NOT_READY, Reason.DRAINING})


@dataclasses.dataclass
class ClientStats:
    """What became of connections and episodes so far. Counters only go up."""

    requests: int = 0
    """Messages sent, repetitions not counted."""
    asked_again: int = 0
    """Messages repeated because the server said "not now"."""
    reconnects: int = 0
    """Connections lost and made again."""
    sessions_lost: int = 0
    """Sessions that the server no longer knew: it restarted, or the lease was over."""
    episodes_resumed: int = 0
    """Episodes that went on in another session as new ones, their beginning lost."""
    ends_lost: int = 0
    """Ends of episodes that were on their way when the session was lost."""
    rows_refused: int = 0
    """Rows that the server refused."""


@dataclasses.dataclass(frozen=True)
class Session:
    """What was agreed when it was opened."""

    id: str = dataclasses.field(repr=False)
    """Its credential; in messages only."""
    observation_space: gym.Space[Any]
    action_space: gym.Space[Any]
    lease_s: float
    max_rows_per_request: int
    """0: no limit was named."""
    max_open_episodes: int
    max_message_bytes: int
    config: dict[str, Any]


class Pending:
    """One request, until its answer has been looked at."""

    answered = False
    actions: Columns | None = None
    """By row of the request; None: none were due."""
    faults: dict[int, Fault] | None = None
    """Refused rows of the request; None: none."""
    failure: Fault | None = None
    """Of the whole request: nothing was recorded."""
    again: Fault | None = None
    """Why the server wants to be asked again; cleared when it is."""
    why: Fault | None = None
    """What it said then; kept."""
    tries = 0
    due = 0.0
    """The shell's: when to ask again, or to give up."""
    waiter: Any = None
    """The shell's: who waits."""

    def __init__(self, number: int, track: Track, rows: Rows, told: bool, final: bool) -> None:
        self.number = number
        self.track = track
        self.rows = rows
        self.told = told
        """Nobody waits for its answer."""
        self.final = final
        """Its rows end what they speak of: not worth repeating to a server that knows nothing."""
        self.data = b""
        """As it was sent."""

    def again_in_s(self) -> float:
        """When to ask again: as the server said, or ever later, scattered among clients."""
        self.tries += 1
        if self.again is not None and self.again.retry_after_s is not None:
            return self.again.retry_after_s
        return min(0.05 * 2.0 ** min(self.tries, 10), 1.0) * random.uniform(0.5, 1.0)  # noqa: S311


class Exchange:
    """The client's side of the conversation: numbers, codecs, and what is not answered."""

    def __init__(
        self,
        client_name: str,
        observation_space: gym.Space[Any] | None = None,
        action_space: gym.Space[Any] | None = None,
    ) -> None:
        self.stats = ClientStats()
        self.numbering = Numbering()
        self.pending: dict[int, Pending] = {}
        """Sent and not answered, by number, in the order of sending."""
        self.tracks: set[Track] = set()
        """Whatever is running; the shell adds and removes."""
        self.session: Session | None = None
        self.session_lost = False
        """The server has just said that it knows no such session: open it again."""
        self.logged_actions_welcome = False
        """The session has accepted one; whether it does depends on the algorithm."""
        self.policy_version = 0
        """Of the latest answer."""
        self._name = client_name
        self._expected = (observation_space, action_space)
        self._observations: SpaceCodec
        self._actions: SpaceCodec
        self._limit_bytes = 0
        self._refills = False
        self._next_request = 1
        self._message = pb.StreamActRequest()
        self._templates: dict[int, RowsTemplate] = {}

    # -- the session ---------------------------------------------------------------------------

    def hello(self) -> pb.OpenSessionRequest:
        """Opens the session, or takes it up again."""
        request = pb.OpenSessionRequest(
            client_name=self._name,
            protocol_version=PROTOCOL_VERSION,
            inference_mode=pb.INFERENCE_MODE_REMOTE,
            session_id=self.session.id if self.session else "",
        )
        observation_space, action_space = self._expected
        if observation_space is not None:
            request.agents[AGENT].observation_space.CopyFrom(space_to_proto(observation_space))
        if action_space is not None:
            request.agents[AGENT].action_space.CopyFrom(space_to_proto(action_space))
        return request

    def adopt(self, response: pb.OpenSessionResponse) -> list[Pending]:
        """Work under that session from now on.

        Returns:
            The requests to send (again), in order.

        Raises:
            PolicyClientError: This client cannot work with what the server offers.
        """
        previous = self.session
        if previous is None or previous.id != response.session_id:
            self._open(response, previous)
        self.session_lost = False
        if previous is not None and previous.id != response.session_id:
            self.logged_actions_welcome = False
            self._restart()
        unanswered = list(self.pending.values())
        for pending in unanswered:
            pending.again = None
        return unanswered

    def presence(self) -> bytes:
        """The first message of a stream, with nothing in it: from here on it keeps the lease."""
        message = pb.StreamActRequest()
        message.act.session_id = self._opened.id
        return message.SerializeToString()

    def _open(self, response: pb.OpenSessionResponse, previous: Session | None) -> None:
        major = response.protocol_version.partition(".")[0]
        if major != PROTOCOL_VERSION.partition(".")[0]:
            raise IncompatibleProtocolError(
                f"the server speaks protocol {response.protocol_version!r}, this client "
                f"{PROTOCOL_VERSION!r}; install matching releases"
            )
        if list(response.agents) != [AGENT]:
            raise SpaceMismatchError(
                f"the server expects agents {sorted(response.agents)}; this client plays a single "
                "agent",
                field="agents",
            )
        spec = response.agents[AGENT]
        if previous is None:
            try:
                observation_space = space_from_proto(spec.observation_space)
                action_space = space_from_proto(spec.action_space)
                self._observations = SpaceCodec(observation_space)
                self._actions = SpaceCodec(action_space)
            except Fault as fault:
                raise error_from_fault(fault) from None
        else:
            observation_space, action_space = previous.observation_space, previous.action_space
            for name, ours, theirs in (
                ("observation_space", observation_space, spec.observation_space),
                ("action_space", action_space, spec.action_space),
            ):
                if difference := diff(ours, theirs):
                    raise SpaceMismatchError(
                        f"the server that answers now has another one: {difference}. "
                        "Make a new client.",
                        field=name,
                    )
        limits = response.limits
        self._limit_bytes = limits.max_message_bytes
        self._refills = usable(self._observations)
        self._templates.clear()
        self.policy_version = response.policy_version
        self.session = Session(
            id=response.session_id,
            observation_space=observation_space,
            action_space=action_space,
            lease_s=response.lease.ToMicroseconds() / 1e6,
            max_rows_per_request=limits.max_rows_per_request,
            max_open_episodes=limits.max_open_episodes,
            max_message_bytes=limits.max_message_bytes,
            config=_plain(json_format.MessageToDict(response.client_config)),
        )

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
            self._reload(pending)
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

    def _reload(self, pending: Pending) -> None:
        """Take the columns of a sent request back from its own bytes."""
        group = pb.StreamActRequest.FromString(pending.data).act.groups[0]
        rows, n = pending.rows, len(group.episodes)
        rows.observations = self._observations.decode(group.observations, n, "observations")
        if group.HasField("logged_actions"):
            rows.logged_actions = self._actions.decode(group.logged_actions, n, "logged_actions")

    # -- values --------------------------------------------------------------------------------

    def observation(self, value: Any) -> Columns:
        """One observation as columns.

        Raises:
            InvalidValueError: It is none of the space, or not finite.
        """
        codec = self._observations
        try:
            columns = codec.columns_of(value)
        except Fault as fault:
            raise error_from_fault(fault) from None
        if faults := codec.row_faults(columns, "observation"):
            raise error_from_fault(faults[0])
        return columns

    def last_observation(self, value: Any, status: Status) -> Columns | None:
        """The observation that ends an episode, if there is one.

        Raises:
            InvalidValueError: It is none of the space; or missing, where it is learnt from.
        """
        if value is not None:
            return self.observation(value)
        if status is Status.TRUNCATED:
            raise InvalidValueError(
                "a truncated episode needs its last observation: the learner bootstraps from it",
                field="observation",
            )
        return None

    def logged_action(self, value: Any, logp: float | None) -> Columns:
        """One action as columns.

        Raises:
            InvalidValueError: It is none of the space, or its log-density no finite number.
        """
        if logp is not None and not math.isfinite(logp):
            raise NotFiniteError(f"expected a finite number, got {logp}", field="logp")
        codec = self._actions
        try:
            columns = codec.columns_of(value, "action")
        except Fault as fault:
            raise error_from_fault(fault) from None
        if faults := codec.row_faults(columns, "action", True):
            raise error_from_fault(faults[0])
        return columns

    def observations(self, values: Any, n: int) -> Columns:
        """N observations as columns.

        Raises:
            InvalidValueError: They are no N observations of the space.
            BatchError: Some of them are not finite.
        """
        try:
            columns = self._observations.columns_of_batch(values, n)
        except Fault as fault:
            raise error_from_fault(fault) from None
        if faults := self._observations.row_faults(columns, "observations"):
            raise BatchError({row: error_from_fault(fault) for row, fault in faults.items()})
        return columns

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

    def _encode(self, pending: Pending) -> bytes:
        rows = pending.rows
        if rows.plain and self._refills:
            n = len(rows.episodes)
            data = (self._templates.get(n) or self._template(n)).fill(pending.number, rows)
            rows.observations = None  # the caller's memory, from here on
            return data
        message, session = self._message, self._opened
        message.Clear()
        message.request = pending.number
        act = message.act
        act.session_id = session.id
        if rows.begun:
            options = rows.options
            for number in rows.begun:
                act.starts.add(
                    episode=number,
                    label=options.label,
                    evaluation=not options.training_enabled,
                    greedy=not options.explore,
                    resumed=number in rows.resumed,
                )
        for number, values in rows.metrics.items():
            act.metrics.add(episode=number, values=values)
        group = act.groups.add()
        group.episodes.extend(rows.episodes)
        group.steps.extend(rows.steps)
        if rows.rewards:
            group.rewards.extend(rows.rewards)
        if rows.statuses:
            group.statuses.extend(rows.statuses)  # type: ignore[arg-type]
        if rows.observations is not None:
            self._observations.encode(rows.observations, group.observations)
            rows.observations = None  # the caller's memory, from here on
        if rows.logged_actions is not None:
            self._actions.encode(rows.logged_actions, group.logged_actions)
            group.logged_logps.extend(rows.logged_logps)
            rows.logged_actions = None
        return message.SerializeToString()

    def _template(self, n: int) -> RowsTemplate:
        if len(self._templates) >= _MAX_TEMPLATES:
            self._templates.clear()
        template = RowsTemplate(self._opened.id, self._observations, n)
        self._templates[n] = template
        return template

    @property
    def _opened(self) -> Session:
        if self.session is None:
            raise NotConnectedError("no session is open")
        return self.session

    def take(self, data: bytes) -> Pending | None:
        """Read an answer.

        Returns:
            Its request: now with an ``answer``, or to be sent ``again``. None: nobody's.

        Raises:
            InternalServerError: It is no answer of the contract.
        """
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
        elif response.HasField("error"):
            failure = Fault.from_detail(response.error)
            if failure.reason is Reason.UNKNOWN_SESSION:
                self.session_lost = True
                return None
            if asks_again(failure):
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
        if fault.reason is Reason.LIMIT_EXCEEDED and (
            pending.why is None or pending.why.reason is not fault.reason
        ):
            logger.warning("waiting, for the server is at a limit: %s", fault.message)
        pending.again = pending.why = fault

    def _answered(self, pending: Pending, group: pb.ActionRows) -> None:
        if group.faults:
            faults = {each.index: Fault.from_detail(each.error) for each in group.faults}
            for fault in faults.values():
                if asks_again(fault):
                    self._put_off(pending, fault)
                    return
            pending.faults = faults
        if version := group.policy_version:
            self.policy_version = version
        actions = group.actions
        if actions.leaves:
            try:
                n = len(pending.rows.episodes)
                pending.actions = self._actions.decode(actions, n, "actions")
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
            if fault := failure or next(iter((faults or {}).values()), None):
                logger.warning("the server refused the end of episode %s: %s", track, fault)
        elif failure is not None:
            track.refused(rows)
        else:
            track.accepted(rows, _callers_rows(rows, faults or ()))

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
        return self._actions.value(actions, 0)

    def acknowledge(self, pending: Pending) -> None:
        """See that nothing of that request was refused.

        Raises:
            PolicyClientError: Something was.
        """
        if pending.track.pending is pending:
            pending.track.pending = None
        fault = pending.failure or next(iter((pending.faults or {}).values()), None)
        if fault is not None:
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
            columns = self._actions.zeros(n)
        elif index is not None:
            some, columns = columns, self._actions.zeros(n)
            for path, column in some.items():
                columns[path][index] = column
        actions = self._actions.batched_value(columns)
        if faults:
            errors = map(error_from_fault, faults.values())
            rows = _callers_rows(pending.rows, faults)
            raise BatchError(dict(zip(rows, errors, strict=True)), actions)
        return actions

    def no_actions(self, n: int) -> Any:
        """N actions that mean nothing."""
        return self._actions.batched_value(self._actions.zeros(n))


def overdue(pending: Pending, address: object, waited_s: float) -> PolicyTimeout:
    """The error for a request without an answer in time."""
    error = PolicyTimeout(
        f"no answer from {address} within {waited_s:.3g} s (Timeouts.action_s). Calling again asks "
        "for the same step."
    )
    if pending.why is not None:
        error.__cause__ = error_from_fault(pending.why)
    return error


def asks_again(fault: Fault) -> bool:
    """Whether the same request may succeed later, unchanged."""
    return fault.reason in _ASK_AGAIN or fault.retry_after_s is not None


def _callers_rows(rows: Rows, faults: Iterable[int]) -> list[int]:
    return [row if rows.index is None else int(rows.index[row]) for row in faults]


def _nonsense(expected: str) -> Fault:
    return Fault(Reason.INTERNAL, f"the server's answer breaks the contract: {expected}")


def _plain(value: Any) -> Any:
    """JSON as Python has it: Struct knows only floats, where most settings are whole numbers."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value
