"""Bad input from whoever steps: each an error that says so, and nothing stepped or lost."""

import queue
import socket

import grpc
import numpy as np
import pytest

from client_sdk import PolicyClient, RemoteEnv, RemoteVectorEnv, Timeouts
from client_sdk.config import Address
from client_sdk.endpoint import Endpoint
from client_sdk.env_connection import EnvConnection
from client_sdk.env_server import EnvServer, EnvServerConfig
from client_sdk.errors import (
    ConnectTimeout,
    EnvironmentFailedError,
    EpisodeEndedError,
    IncompatibleProtocolError,
    InvalidValueError,
    LimitExceededError,
    MalformedTensorError,
    NotFiniteError,
    SpaceMismatchError,
    StepOutOfOrderError,
    UnauthenticatedError,
    UnknownEnvironmentError,
)
from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.batches import SpaceCodec
from tests.servers import serving
from tests.stepping.support import PATIENCE_S, Mixed, Script, Scripted, hosting, wait_for


class Bare:
    """The service without RemoteEnv: what another language sends."""

    def __init__(self, address, **make):
        self.connection = EnvConnection(Endpoint(Address.parse(address)))
        self.make_request = pb.MakeRequest(protocol_version="1.0", **make)
        self.handle = ""

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.connection.disconnect()

    def make(self):
        made = self.connection.make(self.make_request, PATIENCE_S)
        self.handle = made.env_handle
        return made

    def reset(self, **fields):
        request = pb.ResetRequest(env_handle=self.handle, **fields)
        return self.connection.reset(request, PATIENCE_S)

    def step_request(self, action=1, space=Scripted.action_space):
        request = pb.StepRequest(env_handle=self.handle)
        codec = SpaceCodec(space)
        codec.encode(codec.columns_of(action), request.actions)
        return request

    def step(self, request=None):
        return self.connection.step(request or self.step_request(), PATIENCE_S)


@pytest.fixture
def script():
    return Script()


@pytest.fixture
def host(script):
    with hosting(script.make) as server:
        yield server


@pytest.fixture
def env(host):
    with RemoteEnv(host.address) as env:
        yield env


@pytest.fixture
def bare(host):
    with Bare(host.address) as bare:
        bare.make()
        yield bare


@pytest.mark.parametrize(
    ("action", "says"),
    [
        (np.zeros(3, np.int64), r"action: expected \[\]"),
        (0.5, "expected int64"),
        ("left", "got str 'left'"),
        (None, "got None"),
        (7, "actions: expected 0 to 2, got 7"),
        (-1, "expected 0 to 2, got -1"),
    ],
)
def test_an_action_that_the_space_does_not_hold_is_refused_and_steps_nothing(
    env, script, action, says
):
    env.reset()
    with pytest.raises(SpaceMismatchError, match=says):
        env.step(action)
    assert script.count("step") == 0
    assert env.step(1)[0].tolist() == [1, 1]


def test_an_action_that_is_not_finite_is_refused():
    with hosting("Pendulum-v1") as host, RemoteEnv(host.address) as env:
        env.reset()
        with pytest.raises(NotFiniteError, match="finite"):
            env.step(np.array([np.nan], np.float32))


def test_an_action_with_a_wrong_key_names_it():
    with hosting(Mixed) as host, RemoteEnv(host.address) as env:
        env.reset(seed=1)
        action = dict(env.action_space.sample())
        action["pull"] = action.pop("push")
        with pytest.raises(SpaceMismatchError, match="missing key 'push'; unknown key 'pull'"):
            env.step(action)


def test_one_bad_row_of_many_steps_none_of_them(host, script):
    with RemoteVectorEnv(host.address, num_envs=3) as envs:
        envs.reset()
        with pytest.raises(SpaceMismatchError, match="row 1: expected 0 to 2, got 9"):
            envs.step([0, 9, 1])
        with pytest.raises(SpaceMismatchError, match="expected 3 rows, got 2"):
            envs.step([0, 1])
        assert script.count("step") == 0
        # In the row that resets itself the action means nothing, whatever it is.
        assert envs.step([2, 1, 1])[2].tolist() == [True, False, False]
        assert envs.step([9, 1, 1])[0].tolist() == [[0, 0], [2, 2], [2, 2]]


def test_stepping_before_the_first_reset_is_refused(env):
    with pytest.raises(StepOutOfOrderError, match="reset first"):
        env.step(0)
    env.reset()
    env.step(0)


def test_stepping_after_the_end_is_refused(env):
    env.reset()
    assert env.step(2)[2]
    with pytest.raises(EpisodeEndedError, match="reset before the next step"):
        env.step(0)
    env.reset()
    env.step(0)


@pytest.mark.parametrize(
    ("seed", "says"), [(2**63, "9223372036854775807"), (-1, "got -1"), ("one", "got 'one'")]
)
def test_a_seed_that_cannot_be_sent_is_refused(env, seed, says):
    with pytest.raises(InvalidValueError, match=f"seed: .*{says}"):
        env.reset(seed=seed)
    env.reset(seed=0)


def test_seeds_are_for_all_environments_or_for_none(host):
    with RemoteVectorEnv(host.address, num_envs=2) as envs:
        for seed in ([1], [1, None], [1, 2, 3]):
            with pytest.raises(InvalidValueError, match="a seed for each of 2"):
                envs.reset(seed=seed)
        with pytest.raises(InvalidValueError, match=r"seed: expected a whole .* got float"):
            envs.reset(seed=1.5)
        envs.reset(seed=[None, None])


def test_a_mask_of_resets_is_refused_where_environments_reset_themselves(host):
    with RemoteVectorEnv(host.address, num_envs=2) as envs:
        with pytest.raises(InvalidValueError, match="reset_mask"):
            envs.reset(options={"reset_mask": np.array([True, False])})
        envs.reset()


def test_options_that_json_does_not_know_are_refused_by_name(env, script):
    with pytest.raises(InvalidValueError, match=r"'map'\['walls'\].*got object"):
        env.reset(options={"map": {"walls": object()}})
    with pytest.raises(InvalidValueError, match="'far': expected a number within a double's range"):
        env.reset(options={"far": 10**400})
    with pytest.raises(InvalidValueError, match=r"'id': expected a number that a double holds"):
        env.reset(options={"id": 2**53 + 1})
    with pytest.raises(InvalidValueError, match="options: expected a dict, got list"):
        env.reset(options=["level", 3])
    env.reset(options={"level": 3, "map": np.arange(3), "name": None, "rate": 0.5})
    assert script.options == [{"level": 3, "map": [0, 1, 2], "name": None, "rate": 0.5}]


def test_a_render_mode_that_is_no_frame_is_refused(host):
    with pytest.raises(InvalidValueError, match="ansi"):
        RemoteEnv(host.address, render_mode="ansi")


@pytest.mark.parametrize("setting", ["connect_timeout", "step_timeout"])
def test_a_timeout_that_is_none_is_refused(host, setting):
    with pytest.raises(InvalidValueError, match=setting):
        RemoteEnv(host.address, **{setting: 0})


@pytest.mark.parametrize(
    ("make", "argument", "expected"),
    [
        (RemoteEnv, {"env_id": 3}, "the id of an environment, or None, got int"),
        (RemoteEnv, {"kwargs": "level"}, "a dict, got str"),
        (RemoteEnv, {"render_mode": ["human"]}, ".* got \\['human'\\]"),
        (RemoteEnv, {"connect_timeout": "3"}, "a positive number of seconds, got '3'"),
        (RemoteEnv, {"step_timeout": None}, "a positive number of seconds, got None"),
        (RemoteEnv, {"token": 3}, "one word of visible ASCII characters, or None, got int"),
        (RemoteEnv, {"tls": "ca.pem"}, "a TlsConfig or None, got str"),
        (RemoteEnv, {"insecure": "no"}, "True or False, got str"),
        (RemoteVectorEnv, {"num_envs": "3"}, "a whole number of at least 1, got '3'"),
        (RemoteVectorEnv, {"num_envs": 2.5}, "a whole number of at least 1, got 2.5"),
        (RemoteVectorEnv, {"num_envs": True}, "a whole number of at least 1, got True"),
    ],
)
def test_an_argument_of_another_type_is_refused_by_name(make, argument, expected):
    field = next(iter(argument))
    with pytest.raises(InvalidValueError, match=f"^{field}: expected {expected}"):
        make("localhost:1", **argument)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("host", 3, "a host name or address, got 3"),
        ("port", "9901", "a whole number, 0 to 65535, got '9901'"),
        ("address_file", 3, "a path or None, got 3"),
        ("token", 3, "visible ASCII characters, or None, got int"),
        ("tls", {"key": "-----BEGIN"}, "a ServerTls or None, got dict$"),
        ("insecure", "no", "True or False, got 'no'"),
        ("any_env", 1, "True or False, got 1"),
        ("max_envs", 2.0, "a whole number, 1 to 1048576, got 2.0"),
        ("max_watchers", None, "a whole number, 1 to 4096, got None"),
        ("lease_s", "60", "a number of seconds, 0.001 to 1e6, got '60'"),
        ("keepalive_s", True, "a number of seconds, 0.001 to 1e6, got True"),
        ("max_message_bytes", "1", "a whole number, 1 to 2147483647, got '1'"),
    ],
)
def test_a_setting_of_another_type_is_refused_by_name(field, value, expected):
    with pytest.raises(ValueError, match=rf"^EnvServerConfig\.{field}: expected {expected}"):
        EnvServerConfig(**{field: value})


@pytest.mark.parametrize("arguments", [{"env": 3}, {"config": {"port": 0}}, {"kwargs": ["level"]}])
def test_a_host_of_something_else_is_refused_by_name(arguments):
    with pytest.raises(InvalidValueError, match=f"^{next(iter(arguments))}: expected"):
        EnvServer(**{"env": "CartPole-v1", **arguments})


def test_keyword_arguments_reach_the_environment_and_those_that_cannot_be_sent_are_refused():
    with hosting(Mixed, kwargs={"level": 1}) as host:
        with RemoteEnv(host.address) as env:
            assert env.reset()[1]["level"] == 1
        with RemoteEnv(host.address, kwargs={"level": 2}) as env:
            assert env.reset()[1]["level"] == 2
        with pytest.raises(InvalidValueError, match="kwargs: 'level'"):
            RemoteEnv(host.address, kwargs={"level": {1, 2}})
        with pytest.raises(EnvironmentFailedError, match="height"):
            RemoteEnv(host.address, kwargs={"height": 2})


def test_an_unknown_environment_is_refused_with_the_one_that_there_is(host):
    with pytest.raises(UnknownEnvironmentError, match=r"'make'.*got 'CartPole-v1'.*--any-env"):
        RemoteEnv(host.address, "CartPole-v1")


def test_a_host_of_any_environment_makes_registered_ones_and_imports_nothing():
    with hosting("CartPole-v1", any_env=True) as host:
        with RemoteEnv(host.address, "Pendulum-v1") as env:
            assert env.action_space.shape == (1,)
        for name in ("NoSuchEnv-v0", "antigravity:Env-v0", "tests.stepping.support:Mixed"):
            with pytest.raises(UnknownEnvironmentError, match=name):
                RemoteEnv(host.address, name)


def test_too_many_environments_are_refused_with_the_setting(script):
    with hosting(script.make, max_envs=3) as host:
        with RemoteVectorEnv(host.address, num_envs=2):
            with pytest.raises(LimitExceededError, match=r"max_envs=3.*--max-envs"):
                RemoteVectorEnv(host.address, num_envs=2)
            with RemoteEnv(host.address), pytest.raises(LimitExceededError, match="3 environments"):
                RemoteEnv(host.address)
        assert script.count("make") == 3
        with RemoteVectorEnv(host.address, num_envs=3):
            assert host.open_envs == 3


def test_a_request_that_is_too_large_names_its_size_and_the_limit_and_the_setting(script):
    with hosting(script.make, max_message_bytes=10_000) as host:
        with RemoteEnv(host.address) as env:
            with pytest.raises(LimitExceededError, match=r"vs\. 10000.*max_message_bytes"):
                env.reset(options={"map": "#" * 10_000})
            env.reset(options={"map": "#" * 1_000})
            env.step(0)
        with pytest.raises(LimitExceededError, match="max_message_bytes"):
            RemoteEnv(host.address, kwargs={"map": "#" * 10_000})


@pytest.mark.parametrize("token", [None, "guess"])
def test_a_wrong_token_is_refused_at_once(script, token):
    with hosting(script.make, token="word") as host:
        with pytest.raises(UnauthenticatedError, match="token"):
            RemoteEnv(host.address, token=token)
        with RemoteEnv(host.address, token="word") as env:
            env.reset()
        assert script.count("make") == 1


def test_a_token_does_not_travel_in_the_clear_without_being_told():
    with pytest.raises(InvalidValueError, match="plain text"):
        RemoteEnv("simulator:9901", token="word")


def test_another_protocol_is_refused_with_both_versions(host):
    with Bare(host.address) as bare:
        bare.make_request.protocol_version = "2.1"
        with pytest.raises(IncompatibleProtocolError, match=r"1\.0.*2\.1"):
            bare.make()
        bare.make_request.protocol_version = "1.9"
        assert bare.make().protocol_version == "1.0"


def test_a_policy_server_is_no_host_of_environments_and_says_so():
    with serving() as server, pytest.raises(IncompatibleProtocolError, match="this service"):
        RemoteEnv(server.address)


def test_a_host_of_environments_is_no_policy_server_and_says_so(host):
    with pytest.raises(IncompatibleProtocolError, match="this service"):
        PolicyClient(host.address, timeouts=Timeouts(connect_s=2.0))


# -- what only another client would send


def test_every_call_with_an_unknown_handle_is_refused_and_closing_is_not(bare):
    good, bare.handle = bare.handle, "0" * 32
    with pytest.raises(UnknownEnvironmentError, match="unknown handle"):
        bare.reset()
    with pytest.raises(UnknownEnvironmentError):
        bare.step()
    with pytest.raises(UnknownEnvironmentError):
        bare.connection.render(pb.RenderRequest(env_handle=bare.handle), PATIENCE_S)
    with pytest.raises(UnknownEnvironmentError):
        next(bare.connection.stream_frames(pb.StreamFramesRequest(env_handle="no"), PATIENCE_S))
    for handle in (bare.handle, good, good):
        bare.connection.close(pb.CloseRequest(env_handle=handle), PATIENCE_S)
    bare.handle = good
    with pytest.raises(UnknownEnvironmentError):
        bare.reset()


def test_unary_calls_reset_step_and_end_an_episode(bare):
    assert not bare.reset(seeds=[1]).infos
    stepped = bare.step()
    assert (list(stepped.rewards), list(stepped.terminated)) == ([1.0], [False])
    assert list(bare.step(bare.step_request(2)).terminated) == [True]


def test_seeds_of_another_number_are_refused(bare):
    with pytest.raises(MalformedTensorError, match="expected no seeds or 1"):
        bare.reset(seeds=[1, 2])


def test_actions_that_contradict_themselves_are_refused(bare, script):
    bare.reset()
    request = bare.step_request()
    request.actions.leaves[""].data = b"short"
    with pytest.raises(MalformedTensorError, match="expected 8 bytes"):
        bare.step(request)
    with pytest.raises(SpaceMismatchError, match="missing leaf"):
        bare.step(pb.StepRequest(env_handle=bare.handle))
    assert script.count("step") == 0
    bare.step()


class Driving:
    """A bare Drive stream."""

    def __init__(self, address):
        self._channel = grpc.insecure_channel(address)
        self._outbox = queue.SimpleQueue()
        self._answers = self._channel.stream_stream("/policyserver.v1.EnvService/Drive")(
            iter(self._outbox.get, None), timeout=PATIENCE_S
        )

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._answers.cancel()
        self._outbox.put(None)
        self._channel.close()

    def ask(self, request):
        data = request if isinstance(request, bytes) else request.SerializeToString()
        self._outbox.put(data)
        return pb.DriveResponse.FromString(next(self._answers))


def reset_of(handle):
    return pb.DriveRequest(reset=pb.ResetRequest(env_handle=handle))


def test_garbage_in_a_stream_is_answered_and_the_stream_goes_on(host, bare):
    with Driving(host.address) as drive:
        for garbage in (b"\xff\xff\xff", b""):
            error = drive.ask(garbage).error
            assert error.reason == pb.ERROR_REASON_MALFORMED_TENSOR
            assert error.status_code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
        assert drive.ask(reset_of("nobody")).error.reason == pb.ERROR_REASON_UNKNOWN_ENVIRONMENT
        assert drive.ask(reset_of(bare.handle)).HasField("reset")


def test_garbage_at_the_port_is_for_that_connection_only(host, env):
    address, _, port = host.address.rpartition(":")
    with socket.create_connection((address, int(port)), PATIENCE_S) as stranger:
        stranger.sendall(b"\x00garbage\r\n\r\n" * 100)
    with grpc.insecure_channel(host.address) as channel:
        call = channel.unary_unary("/policyserver.v1.EnvService/Make")
        with pytest.raises(grpc.RpcError, match="are no MakeRequest"):
            call(b"\xff\xff", timeout=PATIENCE_S)
    env.reset()


def test_a_second_client_of_one_handle_is_refused(host, bare, script):
    with Driving(host.address) as first, Driving(host.address) as second:
        assert first.ask(reset_of(bare.handle)).HasField("reset")
        error = second.ask(reset_of(bare.handle)).error
        assert error.reason == pb.ERROR_REASON_STEP_OUT_OF_ORDER
        assert "another client drives" in error.message
        with pytest.raises(StepOutOfOrderError, match="another client drives"):
            bare.reset()
        step = pb.DriveRequest(step=bare.step_request())
        assert first.ask(step).HasField("step")
    assert script.count("reset") == 1


def test_metadata_may_name_environments_that_a_stream_cannot_have(host, bare):
    with Driving(host.address) as first:
        assert first.ask(reset_of(bare.handle)).HasField("reset")
        for named in (bare.handle, "nobody", ""):
            drive = bare.connection.drive(named)
            request = reset_of(bare.handle).SerializeToString()
            answer = pb.DriveResponse.FromString(drive.ask(request, PATIENCE_S))
            assert "another client drives" in answer.error.message
            drive.close()
        assert first.ask(pb.DriveRequest(step=bare.step_request())).HasField("step")


def test_environments_that_metadata_name_are_the_streams_alone(host, bare):
    drive = bare.connection.drive(bare.handle)
    request = reset_of("another").SerializeToString()
    answer = pb.DriveResponse.FromString(drive.ask(request, PATIENCE_S))
    assert "one Drive per handle" in answer.error.message
    with pytest.raises(StepOutOfOrderError, match="another client drives"):
        bare.reset()
    drive.close()
    wait_for(lambda: host.open_envs == 0)


def test_one_stream_drives_one_handle(host, bare):
    with Driving(host.address) as drive:
        assert drive.ask(reset_of(bare.handle)).HasField("reset")
        error = drive.ask(reset_of("another")).error
        assert error.reason == pb.ERROR_REASON_STEP_OUT_OF_ORDER
        assert drive.ask(reset_of(bare.handle)).HasField("reset")


def test_a_port_that_is_no_host_is_told_from_a_slow_one():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(ConnectTimeout, match="Is it a host of environments"):
            RemoteEnv(address, connect_timeout=1.0)
