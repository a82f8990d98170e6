"""One stream of resets and steps: who answers it, in which thread, and what a flood comes to."""

import queue
import threading
from concurrent import futures

import grpc
import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from client_sdk import RemoteEnv
from client_sdk.config import Address
from client_sdk.endpoint import Endpoint
from client_sdk.env_connection import EnvConnection
from client_sdk.env_registry import EnvRegistry
from client_sdk.env_service import EnvService
from client_sdk.env_source import EnvSource
from client_sdk.errors import SpaceMismatchError
from client_sdk.request_line import RequestLine
from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.batches import SpaceCodec
from tests.stepping.support import PATIENCE_S, Script, Scripted, hosting, wait_for

METHOD = "/policyserver.v1.EnvService/Drive"
FLOOD = 2000


class Wide(gym.Env):
    """Shows its last action, so many bytes, and counts its steps in the first of them."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012 - as gymnasium has it
    render_mode = "rgb_array"

    def __init__(self, size):
        self.observation_space = self.action_space = spaces.Box(0, 255, (size,), np.uint8)
        self.steps = 0

    def reset(self, *, seed=None, options=None):
        return np.zeros(self.observation_space.shape, np.uint8), {}

    def step(self, action):
        self.steps += 1
        observation = np.array(action)
        observation[0] = self.steps % 256
        return observation, 0.0, False, False, {}

    def render(self):
        return np.zeros((2, 3, 3), np.uint8)


class Made:
    """A handle on a host, and requests that name it, for whoever writes them himself."""

    def __init__(self, address, space=Scripted.action_space):
        self._codec = SpaceCodec(space)
        # Else gRPC would let megabytes pass unread.
        self._channel = grpc.insecure_channel(address, [("grpc.http2.bdp_probe", 0)])
        self.connection = EnvConnection(Endpoint(Address.parse(address)))
        make = pb.MakeRequest(protocol_version="1.0")
        self.handle = self.connection.make(make, PATIENCE_S).env_handle

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._channel.close()
        self.connection.disconnect()

    def reset(self):
        return pb.DriveRequest(reset={"env_handle": self.handle}).SerializeToString()

    def step(self, action):
        request = pb.DriveRequest(step={"env_handle": self.handle})
        self._codec.encode(self._codec.columns_of(action), request.step.actions)
        return request.SerializeToString()

    def drive(self, requests):
        """The answers, for an iterable of requests."""
        return self._channel.stream_stream(METHOD)(iter(requests), timeout=4 * PATIENCE_S)


def test_a_client_that_floods_a_drive_waits_and_gets_every_answer():
    size, made_envs, taken = 16 * 1024, [], []

    def make():
        made_envs.append(Wide(size))
        return made_envs[-1]

    def flood(client):
        step = client.step(np.zeros(size, np.uint8))
        yield client.reset()
        for number in range(FLOOD):
            taken.append(number)
            yield step

    with (
        hosting(make) as host,
        RemoteEnv(host.address) as other,
        Made(host.address, other.action_space) as client,
    ):
        other.reset()
        answers = client.drive(flood(client))
        before, quiet = 0, 0
        while quiet < 5:  # nothing more is taken while another client makes so many steps
            for _ in range(20):
                other.step(np.zeros(size, np.uint8))
            quiet = quiet + 1 if 0 < before == len(taken) else 0
            before = len(taken)
        assert made_envs[1].steps < FLOOD / 20
        assert len(taken) < FLOOD / 2
        first, *others = (pb.DriveResponse.FromString(data) for data in answers)
    assert first.HasField("reset")
    counts = [answer.step.observations.leaves[""].data[0] for answer in others]
    assert counts == [number % 256 for number in range(1, FLOOD + 1)]


def test_a_large_answer_that_is_not_read_leaves_the_environment_to_others():
    env = Wide(1024 * 1024)
    with hosting(lambda: env) as host, Made(host.address, env.action_space) as made:
        answers = made.drive([made.reset(), made.step(np.zeros(1024 * 1024, np.uint8))])
        next(answers)
        wait_for(lambda: env.steps == 1)
        request = pb.RenderRequest(env_handle=made.handle)
        for _ in range(3):
            assert made.connection.render(request, PATIENCE_S).frame.shape == [2, 3, 3]
        assert len(next(answers)) > 1024 * 1024


class Slow(RequestLine):
    """The end of the requests is there before the last answer is sent."""

    def ask(self):
        super().ask()
        threading.Event().wait(0.1)


@pytest.mark.parametrize("line", [RequestLine, Slow])
def test_a_client_that_has_sent_its_last_request_gets_all_answers_and_the_end(monkeypatch, line):
    monkeypatch.setattr("client_sdk.env_drive.RequestLine", line)
    script = Script()
    with hosting(script.make) as host, Made(host.address) as made:
        answers = made.drive([made.reset(), *[made.step(1)] * 3])
        kinds = [pb.DriveResponse.FromString(data).WhichOneof("outcome") for data in answers]
        assert kinds == ["reset", "step", "step", "step"]
        assert answers.code() is grpc.StatusCode.OK
        wait_for(lambda: script.count("close") == 1)


def test_what_comes_after_the_environment_was_closed_is_told_so():
    with hosting(Script().make) as host, Made(host.address) as made:
        ask: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        answers = made.drive(iter(ask.get, None))
        ask.put(made.reset())
        next(answers)
        made.connection.close(pb.CloseRequest(env_handle=made.handle), PATIENCE_S)
        for _ in range(3):
            ask.put(made.step(1))
            error = pb.DriveResponse.FromString(next(answers)).error
            assert error.reason == pb.ERROR_REASON_UNKNOWN_ENVIRONMENT
        ask.put(None)
        assert list(answers) == []


def test_an_answer_may_be_quicker_than_what_grpc_writes_down(monkeypatch):
    deserialize = grpc._common.deserialize

    def slow(*arguments):
        request = deserialize(*arguments)
        threading.Event().wait(0.05)
        return request

    monkeypatch.setattr("grpc._common.deserialize", slow)
    with hosting(Script().make) as host, RemoteEnv(host.address, step_timeout=PATIENCE_S) as env:
        env.reset()
        for number in range(1, 6):
            assert env.step(1)[0].tolist() == [number, number]


class Watching(grpc.GenericRpcHandler):
    """The handlers of a host, with another function in the place of a Drive's.

    Attributes:
        arguments: How many gRPC has given to each call of a Drive.
    """

    def __init__(self, handlers, *, blocking):
        self._handlers = handlers
        self._blocking = blocking
        self.arguments = []

    def service(self, handler_call_details):
        handler = self._handlers.service(handler_call_details)
        if handler is None or handler_call_details.method != METHOD:
            return handler

        def answer(*arguments):
            self.arguments.append(len(arguments))
            return handler.stream_stream(*arguments)

        if not self._blocking:
            vars(answer).update(vars(handler.stream_stream))
        return handler._replace(stream_stream=answer)


def nothing_inside(*_):
    raise AttributeError("_state")


def other_arguments(_):
    """Wants fewer than it is given."""


@pytest.mark.parametrize(
    ("blocking", "line", "lines"),
    [
        (False, RequestLine, 1),
        (False, nothing_inside, 0),
        (False, other_arguments, 0),
        (True, RequestLine, 0),
    ],
    ids=["this gRPC", "one without lines", "one with other arguments", "one without non-blocking"],
)
def test_grpc_lets_the_environments_thread_answer_and_need_not(monkeypatch, blocking, line, lines):
    made, asked = [], []

    def make_line(*arguments):
        made.append(line(*arguments))
        monkeypatch.setattr(made[-1], "ask", counted(made[-1].ask))
        return made[-1]

    def counted(ask):
        return lambda: asked.append(ask())

    monkeypatch.setattr("client_sdk.env_drive.RequestLine", make_line)
    registry = EnvRegistry(max_envs=1, lease_s=60.0)
    service = EnvService(EnvSource(Script().make, {}), registry, lease_s=60.0, max_watchers=1)
    handlers = Watching(service.handler(), blocking=blocking)
    server = grpc.server(futures.ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers((handlers,))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        with RemoteEnv(address) as env:
            env.reset()
            for number in range(1, 10):
                assert env.step(1)[0].tolist() == [number, number]
            with pytest.raises(SpaceMismatchError):
                env.step(7)
            assert env.step(1)[0].tolist() == [10, 10]
        assert handlers.arguments == [2 if blocking else 3]
        # Ahead of all, and after a reset and eleven steps.
        assert (len(made), len(asked)) == (lines, lines * 13)
        wait_for(lambda: len(registry) == 0)
    finally:
        server.stop(0.0).wait(PATIENCE_S)
        registry.end(PATIENCE_S)
