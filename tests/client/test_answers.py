"""Answers that are read by place, and those that must be parsed: both mean what protobuf says."""

from __future__ import annotations

import random
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from client_sdk.answers import AnswerReader, leading_number
from client_sdk.episode_track import EpisodeTrack
from client_sdk.exchange import Exchange
from client_sdk.pending import Pending
from client_sdk.rows import EpisodeOptions
from client_sdk.wire import PROTOCOL_VERSION
from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.batches import Columns, SpaceCodec
from client_sdk.wire.faults import Fault, Reason
from client_sdk.wire.spaces import space_to_proto
from tests.wire.samples import SPACES

CHOICE = spaces.Discrete(5)
PAIR = spaces.Dict(steer=spaces.Box(-1, 1, (2,)), gear=spaces.Discrete(3))
N = 3

every_space = pytest.mark.parametrize("space", SPACES.values(), ids=SPACES.keys())


def columns_of(space: gym.Space[Any], seed: int, n: int = N) -> Columns:
    space.seed(seed)
    return SpaceCodec(space).columns_of_batch([space.sample() for _ in range(n)], n)


def answer_of(space: gym.Space[Any], number: int, columns: Columns, version: int = 7) -> bytes:
    response = pb.StreamActResponse(request=number)
    group = response.act.groups.add(policy_version=version)
    SpaceCodec(space).encode(columns, group.actions)
    return response.SerializeToString(deterministic=True)


def read(reader: AnswerReader, data: bytes, n: int = N) -> tuple[int, Columns, int] | None:
    number, start = leading_number(data)
    found = reader.read(data, start, n)
    return None if found is None else (number, *found)


def parsed(space: gym.Space[Any], data: bytes, n: int = N) -> tuple[int, Columns, int]:
    response = pb.StreamActResponse.FromString(data)
    (group,) = response.act.groups
    assert not group.faults
    columns = SpaceCodec(space).decode(group.actions, n, "actions")
    return response.request, columns, group.policy_version


def assert_same(found: tuple[int, Columns, int] | None, expected: tuple[int, Columns, int]) -> None:
    assert found is not None
    assert (found[0], found[2]) == (expected[0], expected[2])
    assert found[1].keys() == expected[1].keys()
    for path, column in expected[1].items():
        assert found[1][path].dtype == column.dtype
        np.testing.assert_array_equal(found[1][path], column)


def reader_of(space: gym.Space[Any], data: bytes, n: int = N, version: int = 7) -> AnswerReader:
    reader = AnswerReader(SpaceCodec(space))
    reader.learn(data, n, version)
    return reader


# -- the reader ------------------------------------------------------------------------------------


@every_space
def test_actions_are_those_that_protobuf_reads(space: gym.Space[Any]) -> None:
    reader = reader_of(space, answer_of(space, 1, columns_of(space, 1)))
    codec = SpaceCodec(space)
    for number in (2, 127, 128, 16_384, 2**40, 2**63 - 1):
        data = answer_of(space, number, columns_of(space, number % 1000))
        if codec.paths and codec.is_plain and all(codec.byte_sizes(1)):
            assert_same(read(reader, data), parsed(space, data))
        else:
            assert read(reader, data) is None


@pytest.mark.parametrize("number", [0, 1, 127, 128, 2**35, 2**63 - 1, 2**63, 2**64 - 1])
def test_the_number_of_an_answer_is_the_one_that_protobuf_reads(number: int) -> None:
    data = answer_of(CHOICE, number, columns_of(CHOICE, 1))
    found, start = leading_number(data)
    if 0 < number < 2**63:
        rest = pb.StreamActResponse.FromString(data[start:])
        assert (found, rest.request) == (number, 0)
    else:
        assert (found, start) == (0, 0)


@pytest.mark.parametrize("version", [0, 1, 2**40])
def test_another_policy_version_is_parsed_and_then_known(version: int) -> None:
    reader = reader_of(CHOICE, answer_of(CHOICE, 1, columns_of(CHOICE, 1)))
    data = answer_of(CHOICE, 2, columns_of(CHOICE, 2), version)
    assert read(reader, data) is None
    reader.learn(data, N, version)
    assert_same(read(reader, data), parsed(CHOICE, data))


def test_other_numbers_of_rows_are_known_beside_each_other() -> None:
    reader = AnswerReader(SpaceCodec(CHOICE))
    answers = {n: answer_of(CHOICE, n, columns_of(CHOICE, n, n), 7) for n in (1, 2, 64)}
    for n, data in answers.items():
        reader.learn(data, n, 7)
    for n, data in answers.items():
        assert_same(read(reader, data, n), parsed(CHOICE, data, n))
        assert read(reader, data, n + 1) is None


@pytest.mark.parametrize("space", [CHOICE, PAIR], ids=["leaf", "dict"])
def test_spoilt_answers_are_never_read_as_anything_but_what_they_say(space: gym.Space[Any]) -> None:
    good = answer_of(space, 300, columns_of(space, 1))
    reader = reader_of(space, good)
    dice = random.Random(5)
    spoilt = [good[:size] for size in range(len(good))]
    spoilt += [good + bytes([byte]) for byte in (0, 8, 255)]
    for at in range(len(good)):
        for byte in (0, 1, 0x7F, 0x80, 0xFF, dice.randrange(256)):
            spoilt.append(good[:at] + bytes([byte]) + good[at + 1 :])
        spoilt.append(good[:at] + bytes([dice.randrange(256)]) + good[at:])
    known = 0
    for data in spoilt:
        found = read(reader, data)
        if found is not None:
            known += 1
            assert_same(found, parsed(space, data))
    assert known > 0


def test_answers_that_say_more_are_left_to_protobuf() -> None:
    columns = columns_of(CHOICE, 1)
    plain = answer_of(CHOICE, 2, columns)
    reader = reader_of(CHOICE, plain)
    refused, twice, failed = (pb.StreamActResponse.FromString(plain) for _ in range(3))
    refused.act.groups[0].faults.add(index=1, error=Fault(Reason.NOT_FINITE, "no").to_detail())
    twice.act.groups.add()
    failed.error.CopyFrom(Fault(Reason.NOT_READY, "later").to_detail())
    renumbered = plain + pb.StreamActResponse(request=3).SerializeToString()
    unknown_field = plain + b"\xf8\x7f\x01"
    others = [message.SerializeToString() for message in (refused, twice, failed)]
    for data in (*others, renumbered, unknown_field):
        pb.StreamActResponse.FromString(data)  # it can be read
        assert read(reader, data) is None


# -- a whole exchange ------------------------------------------------------------------------------


def exchange_of(space: gym.Space[Any]) -> tuple[Exchange, EpisodeTrack]:
    response = pb.OpenSessionResponse(session_id="0" * 32, protocol_version=PROTOCOL_VERSION)
    spec = response.agents[""]
    spec.observation_space.CopyFrom(space_to_proto(spaces.Discrete(2)))
    spec.action_space.CopyFrom(space_to_proto(space))
    exchange = Exchange("test")
    exchange.adopt(response)
    track = EpisodeTrack("episode", exchange.numbering, EpisodeOptions())
    exchange.tracks.add(track)
    return exchange, track


def ask(exchange: Exchange, track: EpisodeTrack) -> Pending:
    return exchange.issue(track, track.row(exchange.observation(1)))


def int32_choice(number: int, action: int) -> pb.StreamActResponse:
    """As a server may answer that holds its choices in another dtype."""
    response = pb.StreamActResponse(request=number)
    tensor = response.act.groups.add(policy_version=7).actions.leaves[""]
    tensor.dtype = pb.DATA_TYPE_INT32
    tensor.shape.append(1)
    tensor.data = np.int32(action).tobytes()
    return response


def number_last(number: int, action: int) -> bytes:
    """As a server may answer that writes its fields in another order."""
    message = pb.StreamActResponse.FromString(answer_of(CHOICE, number, {"": np.array([action])}))
    message.ClearField("request")
    return message.SerializeToString() + pb.StreamActResponse(request=number).SerializeToString()


@pytest.mark.parametrize(
    "written",
    [
        lambda number, action: answer_of(CHOICE, number, {"": np.array([action])}),
        lambda number, action: int32_choice(number, action).SerializeToString(),
        lambda number, action: (
            answer_of(CHOICE, number, {"": np.array([action])}) + b"\xf8\x7f\x01"
        ),
        number_last,
    ],
    ids=["as ours does", "in another dtype", "with unknown fields", "in another order"],
)
def test_each_step_gets_its_own_action_however_a_server_writes(written: Any) -> None:
    exchange, track = exchange_of(CHOICE)
    for step in range(300):
        pending = ask(exchange, track)
        assert exchange.take(written(pending.number, step % 5)) is pending
        assert exchange.action(pending) == step % 5
    assert (track.step, exchange.pending, exchange.policy_version) == (300, {}, 7)


def test_a_server_that_changes_its_ways_is_understood_at_once() -> None:
    exchange, track = exchange_of(CHOICE)
    for step in range(40):
        pending = ask(exchange, track)
        way = step // 2 % 4
        version = 7 + step // 4
        data = answer_of(CHOICE, pending.number, {"": np.array([step % 5])}, version)
        if way == 1:
            data += b"\xf8\x7f\x01"
        exchange.take(data)
        assert exchange.action(pending) == step % 5
        assert exchange.policy_version == version


def test_an_answer_to_nothing_that_was_asked_is_nobodys() -> None:
    exchange, track = exchange_of(CHOICE)
    pending = ask(exchange, track)
    data = answer_of(CHOICE, pending.number, {"": np.array([1])})
    assert exchange.take(data) is pending
    assert exchange.take(data) is None  # a second time
    assert exchange.take(answer_of(CHOICE, 99, {"": np.array([1])})) is None
