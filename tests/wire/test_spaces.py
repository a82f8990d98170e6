"""Spaces: each goes round, peers' are checked, and a difference is told in words."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.faults import Fault, Reason
from client_sdk.wire.spaces import (
    MAX_SPACE_ELEMENTS,
    diff,
    space_from_proto,
    space_to_proto,
)
from client_sdk.wire.tensors import tensor_to_proto
from tests.wire.samples import SPACES


def over_the_wire(space: gym.Space[Any]) -> gym.Space[Any]:
    return space_from_proto(pb.Space.FromString(space_to_proto(space).SerializeToString()))


def refusal(proto: pb.Space) -> Fault:
    with pytest.raises(Fault) as caught:
        space_from_proto(proto)
    assert caught.value.reason in (Reason.SPACE_MISMATCH, Reason.MALFORMED_TENSOR)
    assert caught.value.field.startswith("space")
    return caught.value


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES.keys())
def test_every_space_goes_round(space: gym.Space[Any]) -> None:
    assert over_the_wire(space) == space


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES.keys())
def test_every_space_agrees_with_itself_and_with_its_message(space: gym.Space[Any]) -> None:
    assert diff(space, space) is None
    assert diff(space_to_proto(space), space) is None
    assert diff(over_the_wire(space), space_to_proto(space)) is None


def test_every_kind_of_space_in_the_contract_is_among_the_samples() -> None:
    kinds = {space_to_proto(space).WhichOneof("kind") for space in SPACES.values()}
    assert kinds == {field.name for field in pb.Space.DESCRIPTOR.fields}


@pytest.mark.parametrize("name", SPACES)
def test_any_two_different_spaces_have_a_difference_in_words(name: str) -> None:
    for other, space in SPACES.items():
        assert (diff(SPACES[name], space) is None) == (SPACES[name] == space), other


def test_bounds_that_are_all_alike_travel_as_one_number() -> None:
    proto = space_to_proto(spaces.Box(0, 255, (84, 84, 3), np.uint8))
    assert (len(proto.box.low.data), len(proto.box.high.data)) == (1, 1)
    assert proto.ByteSize() < 64


def test_the_dtype_of_a_discrete_is_no_difference() -> None:
    assert diff(spaces.Discrete(4, dtype=np.int32), spaces.Discrete(4)) is None


def test_the_order_of_a_charset_is_no_difference() -> None:
    left, right = space_to_proto(spaces.Text(3, charset="ab")), pb.Space()
    right.CopyFrom(left)
    right.text.charset = "ba"
    assert diff(left, right) is None


@pytest.mark.parametrize(
    ("client", "server", "words"),
    [
        (
            spaces.Box(-1, 1, (4,)),
            spaces.Box(-1, 1, (8,)),
            "the client has Box float32 [4], the server Box float32 [8]",
        ),
        (
            spaces.Box(0, 1, (4,), np.float64),
            spaces.Box(0, 1, (4,)),
            "the client has Box float64 [4], the server Box float32 [4]",
        ),
        (
            spaces.Box(-1, 1, (2,)),
            spaces.Box(-1, np.array([1, 3], np.float32)),
            "high[1]: the client has 1.0, the server 3.0",
        ),
        (
            spaces.Discrete(4, start=1),
            spaces.Discrete(4),
            "the client has Discrete(4, start=1), the server Discrete(4)",
        ),
        (
            spaces.MultiDiscrete([2, 3]),
            spaces.MultiDiscrete([2, 4]),
            "nvec[1]: the client has 3, the server 4",
        ),
        (
            spaces.MultiDiscrete([2, 3], start=[1, 0]),
            spaces.MultiDiscrete([2, 3]),
            "start[0]: the client has 1, the server 0",
        ),
        (
            spaces.MultiBinary(3),
            spaces.MultiBinary(4),
            "the client has MultiBinary [3], the server MultiBinary [4]",
        ),
        (
            spaces.Text(3, charset="ab"),
            spaces.Text(3, charset="abc"),
            "charset: the client has 'ab', the server 'abc'",
        ),
        (
            spaces.Dict(camera=spaces.Dict(rgb=spaces.Discrete(2))),
            spaces.Dict(camera=spaces.Dict(rgb=spaces.Discrete(3))),
            '["camera"]["rgb"]: the client has Discrete(2), the server Discrete(3)',
        ),
        (
            spaces.Dict(a=spaces.Box(0, 1, (2,))),
            spaces.Dict(a=spaces.Box(0, 2, (2,))),
            '["a"].high[0]: the client has 1.0, the server 2.0',
        ),
        (
            spaces.Dict(a=spaces.Discrete(2)),
            spaces.Dict(b=spaces.Discrete(2)),
            (
                '["a"]: the client has Discrete(2), the server nothing; '
                '["b"]: the client has nothing, the server Discrete(2)'
            ),
        ),
        (
            spaces.Tuple([spaces.Discrete(2)]),
            spaces.Tuple([spaces.Discrete(2), spaces.Discrete(3)]),
            "[1]: the client has nothing, the server Discrete(3)",
        ),
        (
            spaces.Tuple([spaces.Discrete(2)]),
            spaces.Dict(a=spaces.Discrete(2)),
            "the client has Tuple of 1, the server Dict of 1",
        ),
    ],
)
def test_a_difference_is_told_with_its_place_and_both_sides(
    client: gym.Space[Any], server: gym.Space[Any], words: str
) -> None:
    assert diff(client, server) == words


def test_many_differences_are_cut_short() -> None:
    many = {f"key{index}": spaces.Discrete(2) for index in range(100)}
    words = diff(spaces.Dict(many), spaces.Dict())
    assert words is not None
    assert words.count("the client has") == 5
    assert words.endswith("; and more")


def test_comparing_with_a_huge_space_of_a_peer_does_not_build_it() -> None:
    proto = space_to_proto(spaces.Box(-1, 1, (4,)))
    proto.box.shape[:] = [2**40, 2**20]
    words = diff(proto, spaces.Box(-1, 1, (4,)))
    assert words is not None
    assert str(2**40) in words


@pytest.mark.parametrize(
    "space",
    [
        spaces.Graph(spaces.Box(-1, 1, (2,)), None),
        spaces.Sequence(spaces.Discrete(2)),
        spaces.OneOf([spaces.Discrete(2)]),
    ],
    ids=lambda space: type(space).__name__,
)
def test_a_space_that_the_contract_lacks_is_refused_with_its_place(space: gym.Space[Any]) -> None:
    with pytest.raises(Fault, match=f"got {type(space).__name__}") as caught:
        space_to_proto(spaces.Dict(a=spaces.Tuple([space])))
    assert caught.value.field == 'space["a"][0]'


@pytest.mark.parametrize(
    "space",
    [spaces.Box(0, 1, (2,), np.uint64), spaces.MultiDiscrete([2, 3], dtype=np.uint64)],
    ids=str,
)
def test_a_dtype_that_the_contract_lacks_is_refused_with_its_place(space: gym.Space[Any]) -> None:
    with pytest.raises(Fault, match="got uint64") as caught:
        space_to_proto(spaces.Dict(a=space))
    assert caught.value.field == 'space["a"]'


def test_a_dict_with_keys_other_than_strings_is_refused() -> None:
    with pytest.raises(Fault, match="expected strings as keys, got 0"):
        space_to_proto(spaces.Dict({0: spaces.Discrete(2)}))


def box(**changes: Any) -> pb.Space:
    proto = space_to_proto(spaces.Box(-1, 1, (2,)))
    for name, value in changes.items():
        if name == "shape":
            proto.box.shape[:] = value
        elif name == "dtype":
            proto.box.dtype = value
        else:
            tensor_to_proto(np.asarray(value), getattr(proto.box, name))
    return proto


def multi_discrete(nvec: Any, start: Any = None) -> pb.Space:
    proto = pb.Space()
    tensor_to_proto(np.asarray(nvec), proto.multi_discrete.nvec)
    if start is not None:
        tensor_to_proto(np.asarray(start), proto.multi_discrete.start)
    return proto


def nested(proto: pb.Space) -> pb.Space:
    outer = pb.Space()
    outer.tuple.spaces.add().dict.spaces["key"].CopyFrom(proto)
    return outer


NO_SPACES = {
    "nothing": pb.Space(),
    "box of unknown dtype": box(dtype=99),
    "box without dtype": box(dtype=0),
    "box with a negative dimension": box(shape=[-2]),
    "box of too many dimensions": box(shape=[1] * 33),
    "box beyond memory": box(shape=[2**62, 2**62]),
    "box one too large": box(shape=[MAX_SPACE_ELEMENTS + 1]),
    "box with too few bounds": box(low=np.zeros(1, np.float32)),
    "box with too wide bounds": box(low=np.zeros(2, np.float64)),
    "box with swapped bounds": box(low=np.float32(2)),
    "box with NaN as bound": box(high=np.float32(np.nan)),
    "box without bounds": pb.Space(box=pb.BoxSpace(dtype=pb.DATA_TYPE_FLOAT32, shape=[2])),
    "discrete of none": pb.Space(discrete=pb.DiscreteSpace(n=0)),
    "discrete of less than none": pb.Space(discrete=pb.DiscreteSpace(n=-1)),
    "discrete beyond int64": pb.Space(discrete=pb.DiscreteSpace(n=2, start=2**63 - 1)),
    "multi discrete of none": multi_discrete([2, 0]),
    "multi discrete of floats": multi_discrete([2.0, 3.0]),
    "multi discrete with another start": multi_discrete([2, 3], [1]),
    "multi discrete with a wider start": multi_discrete(np.int8([2, 3]), np.int64([1, 1])),
    "multi discrete beyond its dtype": multi_discrete(np.int8([100]), np.int8([100])),
    "multi discrete without nvec": pb.Space(multi_discrete=pb.MultiDiscreteSpace()),
    "multi binary of none": pb.Space(multi_binary=pb.MultiBinarySpace(shape=[0])),
    "multi binary with a negative dimension": pb.Space(
        multi_binary=pb.MultiBinarySpace(shape=[-1])
    ),
    "text shorter than its shortest": pb.Space(text=pb.TextSpace(min_length=3, max_length=2)),
    "text beyond memory": pb.Space(text=pb.TextSpace(max_length=2**32 - 1)),
}


@pytest.mark.parametrize("proto", NO_SPACES.values(), ids=NO_SPACES.keys())
def test_a_message_that_is_no_space_is_a_fault(proto: pb.Space) -> None:
    refusal(proto)


@pytest.mark.parametrize("proto", NO_SPACES.values(), ids=NO_SPACES.keys())
def test_a_message_that_is_no_space_can_be_compared(proto: pb.Space) -> None:
    try:
        words = diff(proto, spaces.Box(-1, 1, (2,)))
    except Fault:
        return
    assert words is not None


@pytest.mark.parametrize(
    "name",
    ["discrete of none", "box with swapped bounds", "multi binary with a negative dimension"],
)
def test_a_fault_of_a_nested_space_names_its_place(name: str) -> None:
    assert refusal(nested(NO_SPACES[name])).field.startswith('space[0]["key"]')


def test_many_large_leaves_are_too_large_together() -> None:
    outer = pb.Space()
    for _ in range(5):
        outer.tuple.spaces.add().CopyFrom(box(shape=[MAX_SPACE_ELEMENTS // 4]))
    assert f"expected at most {MAX_SPACE_ELEMENTS}" in refusal(outer).message
