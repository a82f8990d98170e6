"""Messages about steps: protobuf and the layouts of bytes agree in every space, or protobuf reads."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from google.protobuf.struct_pb2 import Struct
from gymnasium import spaces
from gymnasium.utils.env_checker import data_equivalence

from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.batches import Columns, SpaceCodec
from client_sdk.wire.faults import Fault
from client_sdk.wire.layouts import FixedLayout
from client_sdk.wire.steps import StepMessages, Stepped
from tests.wire.samples import SPACES

every_space = pytest.mark.parametrize("space", SPACES.values(), ids=SPACES.keys())

VECTOR, CHOICE = spaces.Box(-1, 1, (4,)), spaces.Discrete(5)
HANDLE = "0123456789abcdef"
N = 3


def columns_of(space: gym.Space[Any], n: int = N) -> Columns:
    space.seed(7)
    return SpaceCodec(space).columns_of_batch([space.sample() for _ in range(n)], n)


def messages_of(
    observations: gym.Space[Any] = VECTOR, actions: gym.Space[Any] = CHOICE, n: int = N
) -> StepMessages:
    return StepMessages(HANDLE, SpaceCodec(observations), SpaceCodec(actions), n)


def assert_same(left: Columns, right: Columns) -> None:
    assert left.keys() == right.keys()
    for path, column in right.items():
        assert left[path].dtype == column.dtype
        np.testing.assert_array_equal(left[path], column)


@every_space
def test_protobuf_reads_a_request_as_it_was_meant(space: gym.Space[Any]) -> None:
    actions = columns_of(space)
    request = pb.DriveRequest.FromString(messages_of(actions=space).request(actions))
    assert request.step.env_handle == HANDLE
    assert_same(SpaceCodec(space).decode(request.step.actions, N, "actions"), actions)


@every_space
def test_protobuf_reads_an_answer_as_it_was_meant(space: gym.Space[Any]) -> None:
    codec = messages_of(observations=space)
    step = Stepped(
        columns_of(space), [0.5, -0.0, float("inf")], [True, False, False], [False, True, False]
    )
    response = pb.DriveResponse.FromString(codec.answer(step)).step
    assert_same(codec.parsed(response).observations, step.observations)
    np.testing.assert_array_equal(list(response.rewards), step.rewards)
    assert list(response.terminated) == step.terminated
    assert list(response.truncated) == step.truncated


@every_space
def test_what_is_read_by_place_is_what_was_written(space: gym.Space[Any]) -> None:
    columns = columns_of(space)
    codec = messages_of(space, space)
    rewards, terminated, truncated = [1.0, 2.0, 3.0], [True] * N, [False, True, False]
    answer = codec.read_answer(codec.answer(Stepped(columns, rewards, terminated, truncated)))
    request = codec.read_request(codec.request(columns))
    assert (answer is None) == (request is None)
    if answer is not None and request is not None:
        assert_same(request, columns)
        assert_same(answer.observations, columns)
        assert list(answer.rewards) == rewards
        assert list(answer.terminated) == terminated
        assert list(answer.truncated) == truncated
        assert answer.infos == ()


@every_space
def test_the_shortest_way_to_write_gives_the_same_bytes(space: gym.Space[Any]) -> None:
    space.seed(7)
    value, codec = space.sample(), messages_of(space, space, 1)
    columns = SpaceCodec(space).columns_of(value)
    assert codec.one_request(value) in {None, codec.request(columns)}
    step = Stepped(columns, (0.5,), (True,), (False,))
    assert codec.one_answer((value, 0.5, True, False, {})) in {None, codec.answer(step)}
    assert codec.one_answer((value, 0.5, True, False, {"lives": 3})) is None


@pytest.mark.parametrize(
    ("space", "values"),
    [
        (CHOICE, [np.int64(3), 3, np.asarray(3)]),
        (VECTOR, [np.ones(4, np.float32)]),
        (SPACES["image"], [np.ones(SPACES["image"].shape, np.uint8)]),
    ],
    ids=["choice", "vector", "image"],
)
def test_usual_values_go_the_shortest_way(space: gym.Space[Any], values: list[Any]) -> None:
    codec = messages_of(space, space, 1)
    for value in values:
        expected = codec.request(SpaceCodec(space).columns_of(value))
        assert codec.one_request(value) == expected
        assert codec.read_one_request(expected) is not None
        assert codec.one_answer((value, 0.0, False, False, {})) is not None


@pytest.mark.parametrize(
    ("space", "value"),
    [
        (VECTOR, np.ones(4, np.float64)),
        (VECTOR, np.ones((1, 4), np.float32)),
        (VECTOR, np.ones(8, np.float32)[::2]),
        (VECTOR, np.ones(4, ">f4")),
        (VECTOR, [1.0] * 4),
        (CHOICE, 5),
        (CHOICE, True),
        (CHOICE, 2**64),
        (CHOICE, 1.0),
        (CHOICE, None),
        (spaces.Text(5), "hello"),
        (spaces.Text(5), np.full(5, 104, np.int32)),
        (spaces.Dict({"a": VECTOR}), {"a": np.ones(4, np.float32)}),
    ],
)
def test_whatever_needs_a_closer_look_goes_the_usual_way(space: gym.Space[Any], value: Any) -> None:
    codec = messages_of(space, space, 1)
    assert codec.one_request(value) is None
    assert codec.one_answer((value, 0.0, False, False, {})) is None


@every_space
def test_the_answer_of_a_single_environment_has_its_value(space: gym.Space[Any]) -> None:
    columns = columns_of(space, 1)
    codec = messages_of(observations=space, n=1)
    data = codec.answer(Stepped(columns, [0.5], [True], [False]))
    step = codec.read_one_answer(data)
    assert (step is None) == (codec.read_answer(data) is None)
    if step is not None:
        observation, *others = step
        assert others == [0.5, True, False, {}]
        expected = SpaceCodec(space).value(columns, 0)
        assert data_equivalence(observation, expected, exact=True)
        assert type(observation) is type(expected)
        assert not isinstance(observation, np.ndarray) or observation.flags.writeable


@every_space
def test_the_request_to_a_single_environment_has_its_action(space: gym.Space[Any]) -> None:
    columns = columns_of(space, 1)
    codec = messages_of(actions=space, n=1)
    action = codec.read_one_request(codec.request(columns))
    by_place = codec.read_request(codec.request(columns)) is not None
    if action is None:  # for ``read_request``, then
        assert not by_place or isinstance(space, spaces.Dict | spaces.Tuple | spaces.Text)
    else:
        expected = SpaceCodec(space).value(columns, 0)
        assert type(action) is type(expected)
        assert data_equivalence(action, expected, exact=True)


@pytest.mark.parametrize(
    ("space", "bad"),
    [
        (CHOICE, 5),
        (CHOICE, -1),
        (VECTOR, [0.0, np.nan, 0.0, 0.0]),
        (spaces.Box(-1, 1, (100,)), np.full(100, np.inf, np.float32)),
        (spaces.Box(-1, 1, (2,), np.float64), [0.0, 1e300]),
        (spaces.Box(-1, 1, (), np.float32), np.float32(np.nan)),
        (spaces.MultiDiscrete([3, 4]), [2, 4]),
        (spaces.MultiDiscrete([3, 3], start=[1, 1]), [0, 1]),
        (spaces.MultiBinary(3), [0, 2, 0]),
    ],
)
def test_an_action_that_may_be_none_is_left_to_a_closer_look(
    space: gym.Space[Any], bad: Any
) -> None:
    codec, actions = messages_of(actions=space, n=1), SpaceCodec(space)
    columns = actions.columns_of(bad)
    assert actions.row_faults(columns, "actions")
    assert codec.read_one_request(codec.request(columns)) is None
    good = actions.columns_of(space.sample())
    assert codec.read_one_request(codec.request(good)) is not None


@pytest.mark.parametrize(
    "space",
    [
        VECTOR,
        CHOICE,
        SPACES["image"],
        spaces.Dict({"b": VECTOR, "a": spaces.Tuple((CHOICE, VECTOR)), "Z": CHOICE}),
        spaces.Text(5),
        spaces.Dict({}),
    ],
    ids=["vector", "choice", "image", "nested", "text", "nothing"],
)
def test_no_message_is_parsed_where_the_space_allows_it(space: gym.Space[Any]) -> None:
    columns = columns_of(space)
    codec = messages_of(space, space)
    assert codec.read_request(codec.request(columns)) is not None
    step = Stepped(columns, [0.0] * N, [False] * N, [False] * N)
    assert codec.read_answer(codec.answer(step)) is not None


def test_a_message_of_another_form_is_left_to_protobuf() -> None:
    codec, actions = messages_of(), columns_of(CHOICE)
    data = codec.request(actions)
    other = StepMessages("f" * 16, SpaceCodec(VECTOR), SpaceCodec(CHOICE), N)
    reset = pb.DriveRequest(reset=pb.ResetRequest(env_handle=HANDLE))
    for foreign in (
        b"",
        data[:-1],
        data + b"\0",
        other.request(actions),
        reset.SerializeToString(),
        messages_of(n=1).request(columns_of(CHOICE, 1)),
    ):
        assert codec.read_request(foreign) is None


def test_every_byte_beside_the_values_counts() -> None:
    codec, actions = messages_of(), columns_of(CHOICE)
    data = codec.request(actions)
    places = [
        place
        for place in range(len(data))
        if codec.read_request(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        is not None
    ]
    assert len(places) == 8 * N  # the actions themselves, int64


def test_infos_and_refusals_are_left_to_protobuf() -> None:
    codec = messages_of()
    info = Struct()
    info.update({"lives": 3})
    step = Stepped(columns_of(VECTOR), [0.0] * N, [False] * N, [False] * N, [info] * N)
    data = codec.answer(step)
    assert codec.read_answer(data) is None
    parsed = codec.parsed(pb.DriveResponse.FromString(data).step)
    assert [message["lives"] for message in parsed.infos] == [3.0] * N
    refusal = pb.DriveResponse(error=pb.ErrorDetail(message="no")).SerializeToString()
    assert codec.read_answer(refusal) is None


def test_observations_of_another_space_are_refused_when_parsed() -> None:
    step = Stepped(columns_of(CHOICE), [0.0] * N, [False] * N, [False] * N)
    foreign = pb.DriveResponse.FromString(messages_of(observations=CHOICE).answer(step)).step
    with pytest.raises(Fault, match="observations"):
        messages_of().parsed(foreign)


def test_a_layout_needs_values_that_differ_in_every_byte() -> None:
    message = pb.Tensor(data=b"\0\0\0")
    assert FixedLayout(message, [pb.Tensor(data=b"\1\1\1")], [3]).offsets == (2,)
    for other in (b"\1\0\1", b"\0\0\0", b"\1\1\0"):
        with pytest.raises(ValueError, match="is what these messages differ in"):
            FixedLayout(message, [pb.Tensor(data=other)], [3])
    with pytest.raises(ValueError, match="depends on their values"):
        FixedLayout(message, [pb.Tensor(data=b"\1\1\1\1")], [4])
