"""Anything at all on the wire: refused in words or served, never an incident, never the end."""

from __future__ import annotations

import contextlib
import random
import socket

import grpc
import gymnasium as gym
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.batches import SpaceCodec
from client_sdk.wire.tensors import DTYPES
from tests.server.talk import RUNNING, Talker, rows, seen
from tests.servers import CARTPOLE_ACTIONS, CARTPOLE_OBSERVATIONS, serving

C = grpc.StatusCode
POLITE = {C.INVALID_ARGUMENT, C.NOT_FOUND, C.FAILED_PRECONDITION, C.RESOURCE_EXHAUSTED}
METHODS = ("OpenSession", "CloseSession", "Act")

fuzz = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)

EVERYTHING = gym.spaces.Dict(
    {
        "camera": gym.spaces.Box(0, 255, (2, 2), np.uint8),
        "pair": gym.spaces.Tuple([gym.spaces.MultiDiscrete([2, 3]), gym.spaces.MultiBinary(2)]),
        "note": gym.spaces.Text(4),
        "on": gym.spaces.Box(0, 1, (), np.bool_),
    }
)
SPACES = {
    "leaf": (CARTPOLE_OBSERVATIONS, CARTPOLE_ACTIONS),
    "tree": (EVERYTHING, gym.spaces.Box(-1.0, 1.0, (2,), np.float32)),
}


@pytest.fixture(scope="module", params=SPACES)
def target(request):
    """A server, a client of it, and its spaces' codecs."""
    observations, actions = SPACES[request.param]
    with (
        serving(observations, actions, need_logp=False, when_full="discard") as server,
        Talker(server.address) as talker,
    ):
        incidents = server.server.stats()["incidents"]
        yield server, talker, SpaceCodec(observations), SpaceCodec(actions)
        assert server.server.stats()["incidents"] == incidents


def check_alive(server) -> None:
    """Another client is served as ever, and every step is accounted for."""
    assert server.unaccounted() == 0
    assert server.buffer.running_steps >= 0
    codec = SpaceCodec(server.observation_space)
    with Talker(server.address) as talker:
        for step in range(2):
            columns = codec.columns_of(server.observation_space.sample())
            answer = talker.act(rows([1], [step], columns)).groups[0]
            assert answer.HasField("actions"), answer
        talker.close_session()
    chunks = server.collect(10**6, timeout_s=0.001)
    server.buffer.ledger.deliver(sum(chunk.steps for chunk in chunks))
    for chunk in chunks:
        assert np.isfinite(chunk.rewards).all()
        for batch, _ in chunk.rows:
            assert not codec.row_faults(batch.observations, "learnt")


def polite(call) -> None:
    """The call succeeds, or fails as a client's mistake does."""
    try:
        call()
    except grpc.RpcError as error:
        assert error.code() in POLITE, error  # noqa: PT017


# Messages that parse.

numbers = st.integers(0, 4)
floats = st.one_of(st.floats(width=64), st.sampled_from([0.0, 0.0, 1.0, 1e300]))


@st.composite
def tensors(draw):
    """From nonsense to nearly right."""
    dtype = draw(st.sampled_from([*DTYPES, 0, 99, -5]))
    shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, -1, 2**40]), max_size=4))
    size = 1
    for dimension in shape:
        size *= abs(dimension)
    itemsize = DTYPES[dtype].itemsize if dtype in DTYPES else 1
    length = min(size * itemsize, 4096) + draw(st.sampled_from([0, 0, 0, 1]))
    data = draw(st.binary(min_size=length, max_size=length))
    return pb.Tensor(dtype=dtype, shape=shape, data=data)


def batches(codec: SpaceCodec, n: int):
    """Good columns of n rows, or random bytes in them, or random leaves."""
    good = pb.Batch()
    codec.encode(codec.zeros(n), good)

    def scrambled(seed: int) -> pb.Batch:
        batch = pb.Batch.FromString(good.SerializeToString())
        luck = random.Random(seed)
        for tensor in batch.leaves.values():
            if luck.random() < 0.5:
                tensor.data = luck.randbytes(len(tensor.data))
        return batch

    def spoilt(leaves: dict[str, pb.Tensor]) -> pb.Batch:
        batch = pb.Batch.FromString(good.SerializeToString())
        for path, tensor in leaves.items():
            batch.leaves[path].CopyFrom(tensor)
        return batch

    paths = st.sampled_from([*codec.paths, "", "camera/x", "~1"])
    return st.one_of(
        st.just(good),
        st.integers(0, 2**32).map(scrambled),
        st.dictionaries(paths, tensors(), max_size=2).map(spoilt),
        st.dictionaries(st.text(max_size=3), tensors(), max_size=2).map(
            lambda leaves: pb.Batch(leaves=leaves)
        ),
    )


@st.composite
def groups(draw, observations: SpaceCodec, actions: SpaceCodec):
    n = draw(st.integers(0, 4))

    def column(values, odds=8):
        """Of the right length, usually; or none."""
        length = n if draw(st.integers(0, odds)) else draw(st.integers(0, 5))
        return draw(st.lists(values, min_size=length, max_size=length))

    group = pb.StepRows(episodes=draw(st.lists(numbers, min_size=n, max_size=n)))
    group.steps.extend(column(numbers))
    if draw(st.booleans()):
        group.rewards.extend(column(floats))
    if draw(st.booleans()):
        group.statuses.extend(column(st.sampled_from([0, 1, 1, 2, 3, 4, 5, -1])))
    if not draw(st.integers(0, 6)):
        group.agents.extend(column(st.sampled_from(["", "", "blue"])))
    if draw(st.integers(0, 6)):
        group.observations.CopyFrom(draw(batches(observations, n)))
    if not draw(st.integers(0, 3)):
        group.logged_actions.CopyFrom(draw(batches(actions, n)))
        if draw(st.booleans()):
            group.logged_logps.extend(column(floats))
    return group


@st.composite
def act_requests(draw, observations: SpaceCodec, actions: SpaceCodec):
    request = pb.ActRequest()
    request.groups.extend(draw(st.lists(groups(observations, actions), max_size=3)))
    for start in draw(st.lists(st.tuples(numbers, st.integers(0, 7), st.text()), max_size=2)):
        number, flags, label = start
        request.starts.add(
            episode=number,
            label=label,
            evaluation=bool(flags & 1),
            greedy=bool(flags & 2),
            resumed=bool(flags & 4),
        )
    for number in draw(st.lists(numbers, max_size=2)):
        request.metrics.add(
            episode=number, values=draw(st.dictionaries(st.text(max_size=5), floats, max_size=2))
        )
    return request


@fuzz
@given(data=st.data())
def test_random_requests_are_answered_politely(target, data):
    server, talker, observations, actions = target
    request = data.draw(act_requests(observations, actions))
    request.session_id = talker.session_id
    polite(lambda: talker.stub.Act(request, timeout=10))
    check_alive(server)


@fuzz
@given(data=st.data())
def test_random_requests_on_a_stream_are_answered_politely(target, data):
    server, talker, observations, actions = target
    requests = data.draw(st.lists(act_requests(observations, actions), max_size=4))
    for request in requests:
        request.session_id = data.draw(st.sampled_from([talker.session_id] * 4 + ["nobody"]))
    messages = [pb.StreamActRequest(request=3, act=request) for request in requests]
    answers = list(talker.stub.StreamAct(iter(messages), timeout=10))
    assert len(answers) == len(messages)
    for answer in answers:
        if answer.WhichOneof("outcome") == "error":
            assert answer.error.status_code in {code.value[0] for code in POLITE}
        for group in answer.act.groups:
            for fault in group.faults:
                assert fault.error.status_code in {code.value[0] for code in POLITE}
                assert fault.error.message
    check_alive(server)


box_spaces = st.builds(
    lambda dtype, shape, low, high: pb.Space(
        box=pb.BoxSpace(dtype=dtype, shape=shape, low=low, high=high)
    ),
    st.sampled_from([*DTYPES, 0]),
    st.lists(st.sampled_from([0, 1, 4, -1, 2**40]), max_size=40),
    tensors(),
    tensors(),
)
int64s = st.integers(-(2**63), 2**63 - 1)
leaf_spaces = st.one_of(
    st.just(pb.Space()),
    box_spaces,
    st.builds(lambda n, s: pb.Space(discrete=pb.DiscreteSpace(n=n, start=s)), int64s, int64s),
    st.builds(lambda t: pb.Space(multi_discrete=pb.MultiDiscreteSpace(nvec=t)), tensors()),
    st.builds(
        lambda shape: pb.Space(multi_binary=pb.MultiBinarySpace(shape=shape)),
        st.lists(int64s, max_size=3),
    ),
    st.builds(
        lambda low, high, charset: pb.Space(
            text=pb.TextSpace(min_length=low, max_length=high, charset=charset)
        ),
        st.integers(0, 2**32 - 1),
        st.integers(0, 2**32 - 1),
        st.text(max_size=3),
    ),
)
any_space = st.recursive(
    leaf_spaces,
    lambda children: st.one_of(
        st.dictionaries(st.text(max_size=3), children, max_size=3).map(
            lambda parts: pb.Space(dict=pb.DictSpace(spaces=parts))
        ),
        st.lists(children, max_size=3).map(lambda p: pb.Space(tuple=pb.TupleSpace(spaces=p))),
    ),
    max_leaves=8,
)


@fuzz
@given(observations=any_space, actions=any_space, name=st.text(), mode=st.integers(-1, 4))
def test_random_beliefs_are_answered_politely(target, observations, actions, name, mode):
    server, talker, *_ = target
    spec = pb.AgentSpec(observation_space=observations, action_space=actions)
    polite(lambda: talker.open(agents={"": spec}, client_name=name, inference_mode=mode))
    check_alive(server)


# Bytes that do not.


@fuzz
@given(data=st.binary(max_size=200), method=st.sampled_from(METHODS))
def test_bytes_that_are_no_message_are_refused_by_each_method(target, data, method):
    server, talker, *_ = target
    polite(lambda: talker.channel.unary_unary(f"/policyserver.v1.PolicyService/{method}")(data))
    check_alive(server)


@fuzz
@given(seed=st.integers(0, 2**32), method=st.sampled_from([*METHODS, "StreamAct"]))
def test_damaged_messages_are_answered_politely(target, seed, method):
    """A good request with some bytes flipped, removed or put in."""
    server, talker, observations, _ = target
    group = rows([1, 2], [0, 0], observations.zeros(2), rewards=[0, 0], statuses=[RUNNING] * 2)
    act = talker.request(group, starts=[pb.EpisodeStart(episode=1, label="one")])
    good = pb.StreamActRequest(request=1, act=act) if method == "StreamAct" else act
    message = bytearray(good.SerializeToString())
    luck = random.Random(seed)
    for _ in range(luck.randrange(1, 5)):
        position = luck.randrange(len(message))
        match luck.randrange(3):
            case 0:
                message[position] ^= 1 << luck.randrange(8)
            case 1:
                del message[position]
            case 2:
                message.insert(position, luck.randrange(256))
    path = f"/policyserver.v1.PolicyService/{method}"
    if method == "StreamAct":
        polite(lambda: list(talker.channel.stream_stream(path)(iter([bytes(message)]), timeout=10)))
    else:
        polite(lambda: talker.channel.unary_unary(path)(bytes(message), timeout=10))
    check_alive(server)


def test_garbage_on_a_stream_ends_that_stream_only():
    with serving() as server, Talker(server.address) as talker:
        stream = talker.stream()
        assert stream.ask(rows([1], [0], seen(0))).act.groups[0].HasField("actions")
        raw = talker.channel.stream_stream("/policyserver.v1.PolicyService/StreamAct")
        with pytest.raises(grpc.RpcError) as caught:
            list(raw(iter([b"\xff\xff\xff"]), timeout=10))
        assert caught.value.code() is C.INVALID_ARGUMENT
        assert "StreamActRequest" in caught.value.details()
        assert stream.ask(rows([1], [1], seen(0))).act.groups[0].HasField("actions")


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
NOISE = {
    "nothing": b"",
    "zeros": bytes(10_000),
    "HTTP/1": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "TLS": bytes.fromhex("16030100c5010000c10303") + bytes(200),
    "preface alone": PREFACE,
    "preface and a huge frame": PREFACE + b"\xff\xff\xff\x00\x00\x00\x00\x00\x01" + bytes(1000),
    "preface and noise": PREFACE + random.Random(1).randbytes(10_000),
    "noise": random.Random(2).randbytes(10_000),
}


@pytest.mark.parametrize("case", NOISE)
def test_noise_on_the_port_costs_its_own_connection_only(case):
    with serving() as server, Talker(server.address) as talker:
        stream = talker.stream()
        host, port = server.address.split(":")
        with (
            contextlib.suppress(OSError),
            socket.create_connection((host, int(port)), timeout=5) as connection,
        ):
            connection.sendall(NOISE[case])
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):  # until the server closes it
                pass
        assert stream.ask(rows([1], [0], seen(0))).act.groups[0].HasField("actions")
        assert stream.ask(rows([1], [1], seen(0))).act.groups[0].HasField("actions")
        check_alive(server)
