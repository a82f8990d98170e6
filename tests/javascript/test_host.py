"""host.js: a simulator without Python, stepped by a trainer as a Gymnasium environment."""

import contextlib

import grpc
import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from client_sdk import RemoteEnv, RemoteVectorEnv
from client_sdk.errors import EpisodeStateError, UnknownEnvironmentError
from client_sdk.wire import HANDLE_HEADER
from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire import policyserver_pb2_grpc as pb_grpc
from client_sdk.wire.faults import Reason
from tests.javascript.support import running
from tests.server.talk import batch, refused

START = [0.03, -0.02, 0.01, 0.04]


@contextlib.contextmanager
def hosting():
    """The process, and the address that it has printed."""
    with running("host.js", "--port", 0) as process:
        said = process.stdout.readline()
        assert said.startswith("hosting CartPole-v1 on "), said
        yield process, said.split()[-1]


@pytest.fixture(scope="module")
def address():
    with hosting() as (_, address):
        yield address


@pytest.fixture
def env(address):
    with contextlib.closing(RemoteEnv(address, connect_timeout=20)) as env:
        yield env


@contextlib.contextmanager
def talking(address):
    with grpc.insecure_channel(address) as channel:
        stub = pb_grpc.EnvServiceStub(channel)
        yield stub, stub.Make(pb.MakeRequest(protocol_version="1.0"), timeout=20).env_handle


def test_same_actions_give_what_gymnasium_gives(env):
    reference = gymnasium.make("CartPole-v1")
    assert env.observation_space == reference.observation_space
    assert env.action_space == reference.action_space
    reference.reset()
    reference.unwrapped.state = np.array(START)
    observation, _ = env.reset(options={"state": START})
    np.testing.assert_array_equal(observation, np.array(START, np.float32))
    ended = False
    while not ended:
        action = int(observation[2] + observation[3] > 0)
        expected = reference.step(action)
        observation, *outcome = env.step(action)
        np.testing.assert_allclose(observation, expected[0], rtol=0, atol=1e-6)
        assert outcome[:3] == list(expected[1:4])
        ended = expected[2] or expected[3]
    assert expected[3]  # it went on to the limit


@pytest.mark.filterwarnings("ignore:.*Box observation space .* is .*infinity.*:UserWarning")
def test_gymnasium_finds_nothing_wrong_with_it(env):
    check_env(env, skip_render_check=True)


def test_environments_in_lockstep_reset_themselves(address):
    with contextlib.closing(RemoteVectorEnv(address, num_envs=3, connect_timeout=20)) as envs:
        envs.reset(seed=5)
        over = np.zeros(3, bool)
        resets = 0
        for _ in range(60):
            observations, rewards, terminated, _, _ = envs.step(np.array([1, 1, 0]))
            assert observations.shape == (3, 4)
            np.testing.assert_array_equal(rewards, np.where(over, 0.0, 1.0))
            assert np.all(np.abs(observations[over]) <= 0.05)
            assert not np.any(terminated & over)
            resets += int(over.sum())
            over = terminated
        assert resets >= 9


def test_step_after_the_end_is_refused(env):
    env.reset()
    while not env.step(1)[2]:
        pass
    with pytest.raises(EpisodeStateError, match="reset"):
        env.step(1)
    env.reset()
    env.step(1)


def test_other_environments_are_refused(address):
    with pytest.raises(UnknownEnvironmentError, match="CartPole-v1"):
        RemoteEnv(address, "Acrobot-v1", connect_timeout=20)


@pytest.mark.parametrize(
    "actions", [np.array([2]), np.array([0, 1]), np.array([0], np.float32), None]
)
def test_wrong_actions_step_nothing(address, actions):
    with talking(address) as (stub, handle):
        stub.Reset(pb.ResetRequest(env_handle=handle), timeout=20)
        request = pb.StepRequest(env_handle=handle)
        if actions is not None:
            request.actions.CopyFrom(batch(actions))
        with refused(grpc.StatusCode.INVALID_ARGUMENT, Reason.SPACE_MISMATCH, "actions"):
            stub.Step(request, timeout=20)
        request.actions.CopyFrom(batch(np.array([1])))
        assert stub.Step(request, timeout=20).rewards == [1.0]


def test_closed_environments_are_unknown(address):
    with talking(address) as (stub, handle):
        for _ in range(2):
            stub.Close(pb.CloseRequest(env_handle=handle), timeout=20)
        with refused(grpc.StatusCode.NOT_FOUND, Reason.UNKNOWN_ENVIRONMENT, "env_handle"):
            stub.Reset(pb.ResetRequest(env_handle=handle), timeout=20)


@pytest.mark.parametrize("named_in", ["request", "metadata"])
def test_a_lost_connection_closes_the_environment(named_in):
    with hosting() as (process, address), talking(address) as (stub, handle):
        reset = {"env_handle": handle} if named_in == "request" else {}
        metadata = ((HANDLE_HEADER, handle if named_in == "metadata" else "nobody's"),)
        requests = iter([pb.DriveRequest(reset=reset)])
        drive = stub.Drive(requests, timeout=20, metadata=metadata)
        assert next(drive).WhichOneof("outcome") == "reset"
        assert process.stdout.readline() == "made 1\n"
        drive.cancel()
        assert process.stdout.readline() == "closed\n"
