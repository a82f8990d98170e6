"""Requests that are put together from bytes are those that protobuf would write."""

from __future__ import annotations

import random
from typing import Any

import gymnasium as gym
import pytest
from gymnasium import spaces

from client_sdk.rows import Rows
from client_sdk.templates import RowTemplate, varint
from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.batches import SpaceCodec
from tests.wire.samples import SPACES

SESSION = "0123456789abcdef" * 2
NUMBERS = [0, 1, 127, 128, 300, 16_383, 16_384, 2**21, 2**35, 2**63, 2**64 - 1]

every_space = pytest.mark.parametrize(
    "space",
    [space for space in SPACES.values() if SpaceCodec(space).paths],
    ids=[name for name, space in SPACES.items() if SpaceCodec(space).paths],
)


def written(codec: SpaceCodec, number: int, rows: Rows) -> pb.StreamActRequest:
    assert rows.observations is not None
    message = pb.StreamActRequest(request=number)
    message.act.session_id = SESSION
    group = message.act.groups.add()
    group.episodes.extend(rows.episodes)
    group.steps.extend(rows.steps)
    group.rewards.extend(rows.rewards or [0.0])
    codec.encode(rows.observations, group.observations)
    return message


@every_space
def test_a_row_is_written_as_protobuf_writes_it(space: gym.Space[Any]) -> None:
    codec = SpaceCodec(space)
    template = RowTemplate(SESSION, codec)
    space.seed(3)
    for reward in ([], [0.0], [-1.5], [3e38]):
        rows = Rows([1], [2], reward, codec.columns_of(space.sample()))
        expected = written(codec, 1, rows)
        data = template.fill(1, rows)
        assert pb.StreamActRequest.FromString(data) == expected
        if len(codec.paths) == 1:  # else the leaves are in an order of protobuf's own
            assert data == expected.SerializeToString()


def test_numbers_may_grow_and_shrink_from_row_to_row() -> None:
    codec = SpaceCodec(spaces.Discrete(300))
    template = RowTemplate(SESSION, codec)
    dice = random.Random(1)
    for _ in range(500):
        number, episode, step = (dice.choice(NUMBERS[1:]) for _ in range(3))
        for later in range(3):
            step = (step + later) % 2**64
            rows = Rows([episode], [step], [dice.random()], codec.columns_of(dice.randrange(300)))
            expected = written(codec, number, rows).SerializeToString()
            assert template.fill(number, rows) == expected


@pytest.mark.parametrize("number", NUMBERS)
def test_varints_are_protobufs(number: int) -> None:
    message = pb.StepRows(episodes=[number])
    assert message.SerializeToString()[2:] == varint(number)
