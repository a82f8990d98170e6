"""``OpenSession``: whether client and server understand each other, and what a client is told.

Loop thread only.
"""

from __future__ import annotations

from client_sdk.wire import PROTOCOL_VERSION
from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.faults import Fault, Reason
from client_sdk.wire.spaces import diff, space_to_proto
from policy_server.config import PolicyServerConfig
from policy_server.experience import POLICY_ID
from policy_server.local import LocalInference
from policy_server.refusals import unknown_agent
from policy_server.sessions import Session
from policy_server.terms import Terms


class Handshake:
    """Knows the spaces, and everything else that all clients are told alike."""

    def __init__(self, config: PolicyServerConfig, terms: Terms, local: LocalInference) -> None:
        self._spaces = {
            "observation_space": terms.observation_space,
            "action_space": terms.action_space,
        }
        self._local = local
        self._greeting = pb.OpenSessionResponse(
            protocol_version=PROTOCOL_VERSION,
            limits=pb.Limits(
                max_rows_per_request=config.max_rows_per_request,
                max_open_episodes=config.max_open_episodes_per_session,
                max_message_bytes=config.max_message_bytes,
            ),
        )
        agent = self._greeting.agents[""]
        agent.observation_space.CopyFrom(space_to_proto(terms.observation_space))
        agent.action_space.CopyFrom(space_to_proto(terms.action_space))
        agent.policy_id = POLICY_ID
        self._greeting.lease.FromMicroseconds(int(config.lease_s * 1e6))
        self._greeting.client_config.update(config.client_config)

    def check(self, request: pb.OpenSessionRequest) -> None:
        """Refuse a client that would not get on with this server.

        Raises:
            Fault: INCOMPATIBLE_PROTOCOL, WRONG_MODE, NO_LOCAL_INFERENCE, UNKNOWN_AGENT, or
                SPACE_MISMATCH with the difference.
        """
        _check_protocol(request.protocol_version)
        if request.inference_mode == pb.INFERENCE_MODE_LOCAL:
            self._local.check_possible("inference_mode")
        elif request.inference_mode != pb.INFERENCE_MODE_REMOTE:
            raise Fault(
                Reason.WRONG_MODE,
                f"expected INFERENCE_MODE_REMOTE ({pb.INFERENCE_MODE_REMOTE}) or "
                f"INFERENCE_MODE_LOCAL ({pb.INFERENCE_MODE_LOCAL}), got {request.inference_mode}",
                "inference_mode",
            )
        for agent, spec in request.agents.items():
            self._check_belief(agent, spec)

    def _check_belief(self, agent: str, spec: pb.AgentSpec) -> None:
        if agent != "":
            raise unknown_agent(agent, f"agents[{agent!r:.80}]")
        for name, space in self._spaces.items():
            if not spec.HasField(name):
                continue
            field = f"agents[{agent!r}].{name}"
            try:
                difference = diff(getattr(spec, name), space)
            except Fault as fault:
                raise Fault(fault.reason, fault.message, field) from fault
            if difference is not None:
                raise Fault(
                    Reason.SPACE_MISMATCH,
                    f"client and server disagree: {difference}. "
                    "Start the server with the simulator's spaces, or update the simulator",
                    field,
                )

    def greeting(self, session: Session, policy_version: int) -> pb.OpenSessionResponse:
        """What the client of that session is told."""
        response = pb.OpenSessionResponse()
        response.CopyFrom(self._greeting)
        response.session_id = session.session_id
        response.policy_version = policy_version
        return response


def _check_protocol(version: str) -> None:
    if version.partition(".")[0] != PROTOCOL_VERSION.partition(".")[0]:
        raise Fault(
            Reason.INCOMPATIBLE_PROTOCOL,
            f"the client speaks protocol {version or '(none)':.80}, this server {PROTOCOL_VERSION}; "
            "their major versions must agree",
            "protocol_version",
        )
