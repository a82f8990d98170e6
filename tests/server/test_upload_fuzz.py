"""Anything at all in an upload: refused in words or taken, never an incident, never the end."""

from __future__ import annotations

import random

import grpc
import gymnasium as gym
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ray.rllib.connectors.env_to_module import FlattenObservations

from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.tensors import DTYPES
from tests.server.exporting import exporting
from tests.server.test_fuzz import polite
from tests.server.uploading import Uploader

fuzz = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)

NESTED = gym.spaces.Dict(
    {"speed": gym.spaces.Box(-5, 5, (2,), np.float32), "gear": gym.spaces.Discrete(3)}
)


@pytest.fixture(scope="module")
def target():
    actions = gym.spaces.Box(-2, 3, (2,), np.float32)
    with (
        exporting(None, NESTED, actions, FlattenObservations, when_full="discard") as server,
        Uploader(server.address) as client,
    ):
        incidents = server.server.stats()["incidents"]
        client.fly()
        yield server, client
        assert server.server.stats()["incidents"] == incidents


def good(client, episode: int, sequence: int, steps: int = 4) -> pb.Chunk:
    rng = np.random.default_rng(episode)
    columns = {
        "speed": rng.normal(size=(steps + 1, 2)).astype(np.float32),
        "gear": rng.integers(0, 3, steps + 1),
    }
    return client.chunk(episode, 0, columns, sequence=sequence)


def check_alive(server, client) -> None:
    """What reaches the learner is sound, and the next client is served as ever."""
    with Uploader(server.address) as other:
        other.policy, other.sha256 = client.policy, client.sha256
        other.deliver(good(other, 1, 1))
    assert server.unaccounted() == 0
    assert server.buffer.running_steps == 0
    for chunk in server.collect(10**6, timeout_s=0.001):
        server.buffer.ledger.deliver(chunk.steps)
        chunk.settle()
        assert np.isfinite(chunk.rewards).all()
        for made, row in chunk.rows:
            for columns in (made.observations, made.actions, made.outputs):
                assert all(np.isfinite(column[row]).all() for column in columns.values())
    assert server.unaccounted() == 0


@fuzz
@given(seed=st.integers(0, 2**32))
def test_damaged_uploads_are_answered_politely(target, seed):
    server, client = target
    luck = random.Random(seed)
    client.session_id = client.open().session_id
    request = pb.UploadEpisodesRequest(
        session_id=client.session_id,
        starts=[pb.EpisodeStart(episode=1, label="x", resumed=luck.random() < 0.5)],
        chunks=[good(client, 1, 1), good(client, 2, 2)],
        metrics=[pb.EpisodeMetrics(episode=1, values={"a": 1.0})],
    )
    data = bytearray(request.SerializeToString())
    for _ in range(luck.randrange(1, 6)):
        data[luck.randrange(len(data))] = luck.randrange(256)
    method = client.channel.unary_unary("/policyserver.v1.PolicyService/UploadEpisodes")
    polite(lambda: method(bytes(data), timeout=20))
    client.close_session()
    check_alive(server, client)


shapes = st.lists(st.sampled_from([-1, 0, 1, 2, 4, 5, 2**40]), max_size=3)
tensors = st.builds(
    lambda dtype, shape, data: pb.Tensor(dtype=dtype, shape=shape, data=data),
    st.sampled_from([0, *DTYPES]),
    shapes,
    st.one_of(st.binary(max_size=40), st.just(b"\0" * 16), st.just(b"\xff" * 20)),
)
batches = st.builds(
    lambda leaves: pb.Batch(leaves=leaves),
    st.dictionaries(st.sampled_from(["", "speed", "gear", "x/y"]), tensors, max_size=3),
)
FIELDS = {
    "sequence": st.integers(1, 4),
    "episode": st.integers(0, 2**64 - 1),
    "agent": st.sampled_from(["", "a"]),
    "policy_sha256": st.binary(max_size=33),
    "policy_version": st.integers(0, 2**64 - 1),
    "first_step": st.sampled_from([0, 4, 2**63, 2**64 - 1]),
    "status": st.integers(0, 9),
    "logged": st.booleans(),
    "rewards": tensors,
    "observations": batches,
    "actions": batches,
    "outputs": st.dictionaries(
        st.sampled_from(["action_logp", "action_dist_inputs", "other"]), tensors, max_size=3
    ),
    "env_steps": st.lists(st.integers(0, 2**64 - 1), max_size=6),
}


@fuzz
@given(
    st.lists(
        st.tuples(st.integers(1, 3), st.fixed_dictionaries({}, optional=FIELDS), st.booleans()),
        max_size=4,
    )
)
def test_random_fields_are_answered_politely(target, changes):
    server, client = target
    client.session_id = client.open().session_id
    chunks = []
    for sequence, (episode, fields, _) in enumerate(changes, start=1):
        chunk = good(client, episode, sequence)
        for name, value in fields.items():
            chunk.ClearField(name)
            chunk.MergeFrom(pb.Chunk(**{name: value}))
        chunks.append(chunk)
    starts = [pb.EpisodeStart(episode=episode, resumed=True) for episode, _, on in changes if on]
    for _ in range(2):
        polite(lambda: client.upload(*chunks, starts=starts))
    client.close_session()
    check_alive(server, client)


@pytest.mark.parametrize("method", ["GetPolicy", "UploadEpisodes"])
@fuzz
@given(data=st.binary(max_size=60))
def test_bytes_that_are_no_message_are_refused(target, method, data):
    _, client = target
    path = f"/policyserver.v1.PolicyService/{method}"
    if method == "GetPolicy":
        polite(lambda: list(client.channel.unary_stream(path)(data, timeout=20)))
    else:
        polite(lambda: client.channel.unary_unary(path)(data, timeout=20))


def test_message_over_the_limit_is_refused_and_the_client_stays_usable():
    with exporting(max_message_bytes=100_000) as server, Uploader(server.address) as client:
        client.fly()
        big = client.chunk(1, 0, np.zeros((4001, 4), np.float32))
        with pytest.raises(grpc.RpcError) as caught:
            client.upload(big)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        client.deliver(client.chunk(1, 0, np.zeros((11, 4), np.float32), sequence=1))
