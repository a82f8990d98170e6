"""OpenSession: what both sides say of themselves, and when they do not agree."""

from __future__ import annotations

import time

import grpc
import gymnasium as gym
import numpy as np
import pytest

from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.faults import Reason
from client_sdk.wire.spaces import space_from_proto, space_to_proto
from client_sdk.wire.tensors import tensor_to_proto
from tests.server.talk import (
    Talker,
    refused,
)
from tests.servers import CARTPOLE_ACTIONS, CARTPOLE_OBSERVATIONS, serving

INVALID = grpc.StatusCode.INVALID_ARGUMENT
PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION


@pytest.fixture
def server():
    with serving() as server:
        yield server


# The client's idea of the spaces.

OTHER_SPACES = {
    "shape": (
        {"observation_space": gym.spaces.Box(-np.inf, np.inf, (5,), np.float32)},
        ("observation_space", "5", "4"),
    ),
    "dtype": (
        {"observation_space": gym.spaces.Box(-np.inf, np.inf, (4,), np.float64)},
        ("observation_space", "float64", "float32"),
    ),
    "bounds": (
        {"observation_space": gym.spaces.Box(-1, 1, (4,), np.float32)},
        ("observation_space", "1", "inf"),
    ),
    "number of actions": ({"action_space": gym.spaces.Discrete(3)}, ("action_space", "3", "2")),
    "kind": (
        {"action_space": gym.spaces.Box(-1, 1, (1,), np.float32)},
        ("action_space", "Box", "Discrete"),
    ),
}


@pytest.mark.parametrize("case", OTHER_SPACES)
def test_session_with_other_spaces_is_refused_with_a_diff(server, case):
    spaces, (name, *says) = OTHER_SPACES[case]
    spec = pb.AgentSpec(**{key: space_to_proto(space) for key, space in spaces.items()})
    sessions = server.server.sessions
    with Talker(server.address, connect=False) as talker:
        with refused(INVALID, Reason.SPACE_MISMATCH, f"agents[''].{name}", *says, "update"):
            talker.open(agents={"": spec})
        assert server.server.sessions == sessions


def test_session_with_the_same_spaces_is_opened(server):
    spec = pb.AgentSpec(
        observation_space=space_to_proto(CARTPOLE_OBSERVATIONS),
        action_space=space_to_proto(CARTPOLE_ACTIONS),
    )
    with Talker(server.address, agents={"": spec}) as talker:
        talker.close_session()


def test_session_for_an_unknown_agent_is_refused(server):
    with (
        Talker(server.address, connect=False) as talker,
        refused(INVALID, Reason.UNKNOWN_AGENT, "agents['blue']", "'blue'", 'one agent, ""'),
    ):
        talker.open(agents={"blue": pb.AgentSpec()})


def test_refusal_of_a_huge_name_fits_into_its_trailer(server):
    name = "b" * 100_000
    with Talker(server.address, connect=False) as talker:
        with refused(INVALID, Reason.UNKNOWN_AGENT, f"agents[{name!r:.80}]", "'bbb"):
            talker.open(agents={name: pb.AgentSpec()})
        with refused(PRECONDITION, Reason.INCOMPATIBLE_PROTOCOL, "protocol_version", "bbb"):
            talker.open(protocol_version=name)


def test_belief_in_a_huge_space_costs_the_server_nothing(server):
    space = pb.Space()
    space.box.dtype = pb.DATA_TYPE_FLOAT32
    space.box.shape.extend([2**13, 2**13])
    tensor_to_proto(np.float32(0), space.box.low)
    tensor_to_proto(np.float32(1), space.box.high)
    with Talker(server.address, connect=False) as talker:
        begin = time.monotonic()
        with refused(INVALID, Reason.SPACE_MISMATCH, "agents[''].observation_space"):
            talker.open(agents={"": pb.AgentSpec(observation_space=space)})
        assert time.monotonic() - begin < 0.5


# The handshake.


def test_handshake_tells_spaces_lease_version_and_configuration():
    config = {"level": 3, "names": ["a", "b"], "frame_skip": {"fast": True}}
    with serving(lease_s=12.5, client_config=config, first_version=7) as server:
        with Talker(server.address, connect=False) as talker:
            told = talker.open()
        assert told.protocol_version == "1.0"
        assert told.policy_version == 7
        assert told.lease.ToTimedelta().total_seconds() == 12.5
        assert list(told.agents) == [""]
        assert space_from_proto(told.agents[""].observation_space) == CARTPOLE_OBSERVATIONS
        assert space_from_proto(told.agents[""].action_space) == CARTPOLE_ACTIONS
        assert told.agents[""].policy_id == "default_policy"
        assert told.redirect_address == ""
        assert dict(told.client_config)["level"] == 3
        assert list(told.client_config["names"]) == ["a", "b"]
        assert dict(told.client_config["frame_skip"]) == {"fast": True}


@pytest.mark.parametrize("version", ["1", "1.0", "1.7", "1.0.3"])
def test_same_major_version_is_accepted(server, version):
    with Talker(server.address, connect=False) as talker:
        assert talker.open(protocol_version=version).protocol_version == "1.0"


@pytest.mark.parametrize("version", ["", "0.9", "2.0", "10.0", "one", " 1.0", "1x.0"])
def test_another_major_version_is_refused_naming_both(server, version):
    says = (version or "(none)", "1.0", "major")
    with (
        Talker(server.address, connect=False) as talker,
        refused(PRECONDITION, Reason.INCOMPATIBLE_PROTOCOL, "protocol_version", *says),
    ):
        talker.open(protocol_version=version)
    assert server.server.sessions == 0


def test_mode_must_be_one_that_is_served(server):
    with Talker(server.address, connect=False) as talker:
        field = "inference_mode"
        with refused(PRECONDITION, Reason.NO_LOCAL_INFERENCE, field, "INFERENCE_MODE_REMOTE"):
            talker.open(inference_mode=pb.INFERENCE_MODE_LOCAL)
        for mode in (pb.INFERENCE_MODE_UNSPECIFIED, 9):
            with refused(
                PRECONDITION, Reason.WRONG_MODE, field, "INFERENCE_MODE_REMOTE", f"got {mode}"
            ):
                talker.open(inference_mode=mode)


def test_client_name_of_any_kind_is_safe_in_the_log(server, caplog):
    caplog.set_level("INFO")
    with Talker(server.address, connect=False) as talker:
        session_id = talker.open(
            client_name="evil\nERROR all is lost\x1b[31m" + "x" * 10_000
        ).session_id
    line = next(record for record in caplog.records if "connected" in record.message)
    assert "\n" not in line.message
    assert "\x1b" not in line.message
    assert len(line.message) < 200
    assert session_id not in caplog.text
