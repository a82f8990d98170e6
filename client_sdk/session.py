"""What a client and a server agree on: the session, its spaces, and values of those spaces.

No I/O. Owned by one client; both inference modes build on it.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import gymnasium as gym
from google.protobuf import json_format

from client_sdk.attempts import Attempts
from client_sdk.config import Timeouts
from client_sdk.errors import (
    BatchError,
    IncompatibleProtocolError,
    InvalidValueError,
    NotConnectedError,
    SpaceMismatchError,
    error_from_fault,
)
from client_sdk.rows import Numbering, Status, Track
from client_sdk.stats import ClientStats
from client_sdk.values import finite_number
from client_sdk.wire import PROTOCOL_VERSION
from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.batches import Columns, SpaceCodec
from client_sdk.wire.faults import Fault
from client_sdk.wire.spaces import diff, space_from_proto, space_to_proto

AGENT = ""
"""The only agent of single-agent work."""


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
    steps_per_upload: int = 0
    """0: none was named."""
    holds: bool = False
    """The server learns on-policy: experience is acknowledged when it wants more of it."""


class Handshake:
    """Opens sessions, and checks values at the application's door.

    Attributes:
        stats: What became of connections and episodes so far.
        session: The latest; None before the first.
        policy_version: Of the policy that gave the latest action.
        numbering: Of episodes.
        tracks: Whatever is running; the client adds, and removes what is over.
        observation_codec: Of the session's observation space.
        action_codec: Of its action space.
    """

    observation_codec: SpaceCodec
    action_codec: SpaceCodec

    def __init__(
        self,
        client_name: str,
        mode: pb.InferenceMode,
        observation_space: gym.Space[Any] | None = None,
        action_space: gym.Space[Any] | None = None,
    ) -> None:
        """Nothing is agreed yet.

        Raises:
            SpaceMismatchError: The contract has no such space.
        """
        self.stats = ClientStats()
        self.session: Session | None = None
        self.policy_version = 0
        self.numbering = Numbering()
        self.tracks: set[Track] = set()
        self._name = client_name
        self._mode = mode
        self._belief = _belief(observation_space, action_space)

    # -- the session ---------------------------------------------------------------------------

    @property
    def opened(self) -> Session:
        """The session.

        Raises:
            NotConnectedError: None is open.
        """
        if self.session is None:
            raise NotConnectedError("no session is open")
        return self.session

    def hello(self) -> pb.OpenSessionRequest:
        """Opens the session, or takes it up again."""
        request = pb.OpenSessionRequest(
            client_name=self._name,
            protocol_version=PROTOCOL_VERSION,
            inference_mode=self._mode,
            session_id=self.session.id if self.session else "",
        )
        if self._belief is not None:
            request.agents[AGENT].CopyFrom(self._belief)
        return request

    def agree(self, response: pb.OpenSessionResponse) -> bool:
        """Work under that session from now on.

        Returns:
            Whether it is another one than before.

        Raises:
            PolicyClientError: This client cannot work with what the server offers.
        """
        previous = self.session
        if previous is not None and previous.id == response.session_id:
            return False
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
                self.observation_codec = SpaceCodec(observation_space)
                self.action_codec = SpaceCodec(action_space)
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
            steps_per_upload=response.steps_per_upload,
            holds=response.holds,
        )
        return True

    def attempts(self, budget_s: float, timeouts: Timeouts) -> Attempts:
        """To open the session, or to take it up again, from now on."""
        return Attempts(
            time.monotonic(),
            budget_s,
            timeouts.connect_s,
            self.session.lease_s if self.session else None,
        )

    # -- values --------------------------------------------------------------------------------

    def observation(self, value: Any) -> Columns:
        """One observation as columns.

        Raises:
            InvalidValueError: It is none of the space, or not finite.
        """
        codec = self.observation_codec
        if (sure := codec.sure_columns(value)) is not None:
            return sure
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
        if logp is not None:
            finite_number(logp, "logp")
        codec = self.action_codec
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
            columns = self.observation_codec.columns_of_batch(values, n)
        except Fault as fault:
            raise error_from_fault(fault) from None
        if faults := self.observation_codec.row_faults(columns, "observations"):
            raise BatchError({row: error_from_fault(fault) for row, fault in faults.items()})
        return columns

    def no_actions(self, n: int) -> Any:
        """N actions that mean nothing."""
        return self.action_codec.batched_value(self.action_codec.zeros(n))


def _belief(
    observation_space: gym.Space[Any] | None, action_space: gym.Space[Any] | None
) -> pb.AgentSpec | None:
    """The spaces that the program was written for; None: it takes what the server has."""
    given = {"observation_space": observation_space, "action_space": action_space}
    spec = pb.AgentSpec()
    for name, space in given.items():
        if space is not None:
            try:
                getattr(spec, name).CopyFrom(space_to_proto(space))
            except Fault as fault:
                field = name + fault.field.removeprefix("space")
                raise error_from_fault(Fault(fault.reason, fault.message, field)) from None
    return None if observation_space is action_space is None else spec


def _plain(value: Any) -> Any:
    """JSON as Python has it: Struct knows only floats, where most settings are whole numbers."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value
