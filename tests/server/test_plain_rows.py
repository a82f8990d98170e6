"""Requests that are read by place, and those that must be parsed: both mean what protobuf says."""

from __future__ import annotations

import math
import random
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.batches import SpaceCodec
from policy_server.plain_rows import PlainRowReader
from policy_server.requests import Group
from tests.wire.samples import SPACES

VECTOR = spaces.Box(-1, 1, (4,))
PAIR = spaces.Dict(near=spaces.Box(-1, 1, (2,)), far=spaces.Box(0, 255, (2, 3), np.uint8))
PLAIN_SPACES = {
    name: space
    for name, space in SPACES.items()
    if (codec := SpaceCodec(space)).is_plain and codec.paths and all(codec.byte_sizes(1))
}


def request_of(
    space: gym.Space[Any],
    request: int = 9,
    episode: int = 3,
    step: int = 5,
    reward: float = 1.5,
    seed: int = 7,
    session: str = "a" * 32,
) -> pb.StreamActRequest:
    space.seed(seed)
    codec = SpaceCodec(space)
    message = pb.StreamActRequest(request=request)
    message.act.session_id = session
    group = message.act.groups.add(episodes=[episode], steps=[step], rewards=[reward])
    codec.encode(codec.columns_of(space.sample()), group.observations)
    return message


def bytes_of(message: pb.StreamActRequest) -> bytes:
    return message.SerializeToString(deterministic=True)


def reader_of(space: gym.Space[Any], *learnt: pb.StreamActRequest) -> PlainRowReader:
    reader = PlainRowReader(SpaceCodec(space))
    for message in learnt or (request_of(space),):
        for _ in range(100):  # lessons are rare
            reader.learn(message)
    return reader


def assert_parsed(plain: tuple[int, Group] | None, space: gym.Space[Any], data: bytes) -> None:
    """It says what protobuf reads in those bytes, and that is all that they say."""
    assert plain is not None
    number, row = plain
    message = pb.StreamActRequest.FromString(data)
    (group,) = message.act.groups
    assert (number, row.episodes, row.steps) == (message.request, group.episodes, group.steps)
    np.testing.assert_array_equal(row.rewards, group.rewards)
    expected = SpaceCodec(space).decode(group.observations, 1, "observations")
    assert row.observations is not None
    assert row.observations.keys() == expected.keys()
    for path, column in expected.items():
        assert row.observations[path].dtype == column.dtype
        np.testing.assert_array_equal(row.observations[path], column)
    del group.episodes[:], group.steps[:], group.rewards[:]
    group.ClearField("observations")
    rest = pb.StreamActRequest(request=message.request)
    rest.act.session_id = message.act.session_id
    rest.act.groups.add()
    assert message == rest


@pytest.mark.parametrize("space", PLAIN_SPACES.values(), ids=PLAIN_SPACES.keys())
def test_numbers_and_observations_are_those_that_protobuf_reads(space: gym.Space[Any]) -> None:
    reader = reader_of(space)
    for seed, (request, episode, step) in enumerate([(1, 1, 1), (127, 127, 127), (2, 3, 0)]):
        for reward in (0.0, -0.0, 2.5, -math.inf, math.nan):
            data = bytes_of(request_of(space, request, episode, step, reward, seed))
            assert_parsed(reader.read(data), space, data)


@pytest.mark.parametrize(
    ("request_number", "episode", "step"),
    [(3, 5, 0), (3, 128, 127), (128, 5, 2**14), (2**21, 2**20, 2**14 - 1), (2**28 - 1, 1, 1)],
)
def test_each_size_of_numbers_is_learnt(request_number: int, episode: int, step: int) -> None:
    numbers = request_number, episode, step
    reader = reader_of(VECTOR, request_of(VECTOR, *numbers))
    data = bytes_of(request_of(VECTOR, *numbers, seed=8))
    assert_parsed(reader.read(data), VECTOR, data)


@pytest.mark.parametrize("space", [VECTOR, PAIR], ids=["one leaf", "two leaves"])
def test_no_damage_of_one_byte_is_read_as_something_else(space: gym.Space[Any]) -> None:
    reader = reader_of(space, request_of(space, 1000, 300, 200))
    whole = bytes_of(request_of(space, 1001, 301, 201))
    assert_parsed(reader.read(whole), space, whole)
    numbers = random.Random(0)
    for place in range(len(whole)):
        for byte in {0, 0x7F, 0x80, 0xFF, numbers.randrange(256)} - {whole[place]}:
            data = whole[:place] + bytes([byte]) + whole[place + 1 :]
            row = reader.read(data)
            if row is not None:
                assert_parsed(row, space, data)


def test_what_is_cut_off_or_has_more_must_be_parsed() -> None:
    reader, whole = reader_of(VECTOR), bytes_of(request_of(VECTOR))
    for size in range(len(whole)):
        assert reader.read(whole[:size]) is None
    assert reader.read(whole + b"\x00") is None


@pytest.mark.parametrize(
    "change",
    [
        lambda group: group.agents.append(""),
        lambda group: group.statuses.append(1),
        lambda group: group.logged_logps.append(0.0),
        lambda group: group.logged_actions.leaves[""].SetInParent(),
        lambda group: group.ClearField("observations"),
        lambda group: group.ClearField("rewards"),
        lambda group: (group.episodes.append(1), group.steps.append(1), group.rewards.append(0.0)),
    ],
    ids=["agents", "statuses", "logps", "logged", "no observations", "no rewards", "two rows"],
)
def test_whatever_is_not_plain_must_be_parsed_however_often_it_comes(change: Any) -> None:
    message = request_of(VECTOR)
    change(message.act.groups[0])
    reader = reader_of(VECTOR, request_of(VECTOR), message)
    assert reader.read(bytes_of(message)) is None


@pytest.mark.parametrize(
    "message",
    [
        pb.StreamActRequest(),
        request_of(VECTOR, request=0),
        request_of(VECTOR, request=2**28),
        request_of(VECTOR, episode=2**40),
        request_of(VECTOR, step=2**64 - 1),
    ],
    ids=["empty", "no number", "large number", "large episode", "large step"],
)
def test_what_cannot_be_learnt_is_parsed(message: pb.StreamActRequest) -> None:
    assert reader_of(VECTOR, message).read(bytes_of(message)) is None


def test_observations_without_bytes_or_of_bools_are_parsed() -> None:
    for space in (spaces.Box(0, 1, (3,), np.bool_), spaces.Dict(), spaces.Box(0, 1, (0,))):
        message = request_of(space)
        assert reader_of(space, message).read(bytes_of(message)) is None


def test_another_session_is_not_taken_for_this_one() -> None:
    reader = reader_of(VECTOR)
    assert reader.read(bytes_of(request_of(VECTOR, session="b" * 32))) is None
    reader.forget()
    assert reader.read(bytes_of(request_of(VECTOR))) is None
