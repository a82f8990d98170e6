"""Batches: values of every space go round, casts are safe, and each bad row is told apart."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as np_st

from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.batches import Columns, SpaceCodec
from client_sdk.wire.faults import Fault, Reason
from client_sdk.wire.spaces import space_from_proto, space_to_proto
from client_sdk.wire.tensors import tensor_from_proto, tensor_to_proto
from tests.wire.samples import SPACES

every_space = pytest.mark.parametrize("space", SPACES.values(), ids=SPACES.keys())

IMAGE = spaces.Box(0, 255, (84, 84, 3), np.uint8)
VECTOR = spaces.Box(-1, 1, (4,))
NAN, INF = float("nan"), float("inf")


def samples_of(space: gym.Space[Any], n: int) -> list[Any]:
    space.seed(7)
    return [space.sample() for _ in range(n)]


def message_of(codec: SpaceCodec, columns: Columns) -> pb.Batch:
    batch = pb.Batch()
    codec.encode(columns, batch)
    return pb.Batch.FromString(batch.SerializeToString())


def batch_of(**leaves: np.ndarray) -> pb.Batch:
    """A batch as a foreign client might send it; "leaf" stands for the path ""."""
    batch = pb.Batch()
    for path, array in leaves.items():
        tensor_to_proto(array, batch.leaves["" if path == "leaf" else path])
    return batch


def assert_same(left: Any, right: Any) -> None:
    if isinstance(right, dict):
        assert left.keys() == right.keys()
        for key in right:
            assert_same(left[key], right[key])
    elif isinstance(right, tuple):
        assert isinstance(left, tuple)
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    elif isinstance(right, np.ndarray):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)
    else:
        assert type(left) is type(right)
        assert left == right


def arrays_in(value: Any) -> list[np.ndarray]:
    if isinstance(value, np.ndarray):
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    return [array for part in value for array in arrays_in(part)] if type(value) is tuple else []


def refusal(call: Any, *args: Any, **kwargs: Any) -> Fault:
    with pytest.raises(Fault) as caught:
        call(*args, **kwargs)
    return caught.value


# -- round trips


@every_space
def test_one_value_of_every_space_goes_round(space: gym.Space[Any]) -> None:
    codec = SpaceCodec(space)
    for value in samples_of(space, 5):
        received = codec.decode(message_of(codec, codec.columns_of(value)), 1, "observations")
        assert codec.row_faults(received, "observations", bounds=True) == {}
        back = codec.value(received, 0)
        assert back in space
        assert_same(back, value)


@every_space
@pytest.mark.parametrize("n", [0, 1, 7])
def test_a_list_of_values_of_every_space_goes_round(space: gym.Space[Any], n: int) -> None:
    codec = SpaceCodec(space)
    values = samples_of(space, n)
    received = codec.decode(message_of(codec, codec.columns_of_batch(values, n)), n, "o")
    assert codec.row_faults(received, "o", bounds=True) == {}
    for row, value in enumerate(values):
        assert_same(codec.value(received, row), value)


@every_space
def test_what_a_vector_env_gives_for_every_space_goes_round(space: gym.Space[Any]) -> None:
    codec = SpaceCodec(space)
    stacked = concatenate(space, samples_of(space, 7), create_empty_array(space, 7))
    received = codec.decode(message_of(codec, codec.columns_of_batch(stacked, 7)), 7, "o")
    assert_same(codec.batched_value(received), stacked)


@pytest.mark.parametrize(
    "name", ["discrete", "multi discrete", "multi binary", "image", "nested", "tuple"]
)
def test_a_batched_value_belongs_to_the_batched_space(name: str) -> None:
    codec = SpaceCodec(SPACES[name])
    columns = codec.columns_of_batch(samples_of(SPACES[name], 3), 3)
    assert codec.batched_value(columns) in batch_space(SPACES[name], 3)


@every_space
def test_a_space_that_travelled_reads_the_same_messages(space: gym.Space[Any]) -> None:
    sender = SpaceCodec(space)
    receiver = SpaceCodec(space_from_proto(space_to_proto(space)))
    values = samples_of(space, 3)
    received = receiver.decode(message_of(sender, sender.columns_of_batch(values, 3)), 3, "o")
    for row, value in enumerate(values):
        assert_same(receiver.value(received, row), value)


@every_space
def test_columns_have_the_shape_and_dtype_of_their_leaf(space: gym.Space[Any]) -> None:
    codec = SpaceCodec(space)
    one = codec.columns_of(samples_of(space, 1)[0])
    many = codec.columns_of_batch(samples_of(space, 3), 3)
    for columns, n in ((one, 1), (many, 3), (codec.zeros(3), 3), (codec.zeros(0), 0)):
        assert tuple(columns) == codec.paths
        for path, column in columns.items():
            leaf = codec.leaf(path)
            assert leaf.path == path
            assert column.shape == (n, *leaf.shape)
            assert column.dtype == leaf.dtype


@every_space
def test_a_glance_finds_what_a_closer_look_finds(space: gym.Space[Any]) -> None:
    codec = SpaceCodec(space)
    space.seed(5)
    value = space.sample()
    sure = codec.sure_columns(value)
    if isinstance(value, np.ndarray) and codec.is_plain and value.size:
        assert sure is not None
    if sure is not None:
        columns = codec.columns_of(value)
        assert not codec.row_faults(columns, "observation")
        assert sure.keys() == columns.keys()
        for path, column in columns.items():
            assert sure[path].dtype == column.dtype
            np.testing.assert_array_equal(sure[path], column)


@pytest.mark.parametrize(
    "value",
    [
        np.array([0, np.nan], np.float32),
        np.array([np.inf, 0], np.float32),
        np.array([0, 0], np.float64),
        np.array([0, 0, 0], np.float32),
        np.array(0, np.float32),
        [0.0, 0.0],
        np.array(["a", "b"]),
        None,
    ],
    ids=str,
)
def test_a_glance_is_not_enough_for_what_is_not_as_it_should_be(value: Any) -> None:
    assert SpaceCodec(spaces.Box(-1, 1, (2,))).sure_columns(value) is None


def test_a_glance_is_not_enough_for_integers_outside_their_space() -> None:
    codec = SpaceCodec(spaces.MultiDiscrete([3, 3]))
    assert codec.sure_columns(np.array([2, 2])) is not None
    assert codec.sure_columns(np.array([2, 3])) is None
    assert codec.sure_columns(np.array([-1, 2])) is None


@every_space
def test_a_codec_can_be_pickled_and_copied(space: gym.Space[Any]) -> None:
    codec = SpaceCodec(space)
    value = samples_of(space, 1)[0]
    for other in (pickle.loads(pickle.dumps(codec)), copy.deepcopy(codec)):
        assert_same(other.value(other.columns_of(value), 0), value)


def test_zeros_are_zero_everywhere() -> None:
    for column in SpaceCodec(SPACES["nested"]).zeros(4).values():
        assert not column.any()


# -- paths


def test_paths_are_json_pointers_without_the_first_slash() -> None:
    codec = SpaceCodec(SPACES["dict with awkward keys"])
    assert set(codec.paths) == {
        "",
        "a~1b",
        "a~0b",
        "a~01b",
        'quoted "key"',
        "schlüssel",
        "a/b",
        "0",
    }
    assert SpaceCodec(SPACES["nested"]).paths == (
        "inner/tuple/0",
        "inner/tuple/1/deep",
        "inner/tuple/2/0",
        "inner/tuple/2/1",
        "outer",
    )


def test_a_space_that_is_itself_a_leaf_has_the_empty_path() -> None:
    assert SpaceCodec(VECTOR).paths == ("",)


# -- ownership


def test_decoded_columns_are_read_only_views() -> None:
    codec = SpaceCodec(VECTOR)
    column = codec.decode(message_of(codec, codec.zeros(3)), 3, "o")[""]
    assert not column.flags.writeable
    assert not column.flags.owndata


@every_space
def test_values_are_the_callers_own_to_keep_and_change(space: gym.Space[Any]) -> None:
    codec = SpaceCodec(space)
    received = codec.decode(message_of(codec, codec.zeros(2)), 2, "o")
    for value in (codec.value(received, 0), codec.batched_value(received)):
        for array in arrays_in(value):
            array[...] = 1
    assert not any(column.any() for column in received.values())


# -- what applications hand in


@pytest.mark.parametrize(
    "value",
    [
        [0, 1, 2, 3],
        (0.0, 1.0, 2.0, 3.0),
        [np.float32(0), np.float64(1), 2, True + 2],
        np.arange(4),
        np.arange(4, dtype=np.uint8),
        np.arange(4, dtype=np.float16),
        np.arange(4, dtype=np.float64),
        np.arange(4, dtype=">f4"),
        np.arange(8, dtype=np.float32)[::2] / 2,
    ],
    ids=lambda value: f"{type(value).__name__} {getattr(value, 'dtype', '')}",
)
def test_numbers_of_any_safe_kind_become_float32(value: Any) -> None:
    column = SpaceCodec(VECTOR).columns_of(value)[""]
    assert column.dtype == np.float32
    assert column.tolist() == [[0.0, 1.0, 2.0, 3.0]]


@pytest.mark.parametrize("value", [2, np.int64(2), np.int8(2), np.uint64(2), np.array(2, np.uint8)])
def test_an_integer_of_any_width_is_a_discrete_value(value: Any) -> None:
    column = SpaceCodec(spaces.Discrete(4)).columns_of(value)[""]
    assert column.dtype == np.int64
    assert column.tolist() == [2]


def test_a_discrete_value_comes_back_in_the_dtype_of_its_space() -> None:
    codec = SpaceCodec(spaces.Discrete(4, dtype=np.int32))
    columns = codec.columns_of(np.int32(3))
    assert columns[""].dtype == np.int64
    assert type(codec.value(columns, 0)) is np.int32
    assert codec.batched_value(columns).dtype == np.int32


@pytest.mark.parametrize("value", [[1, 0, 1], [True, False, True], np.array([1, 0, 1])])
def test_bools_and_wide_integers_are_multi_binary_values(value: Any) -> None:
    column = SpaceCodec(spaces.MultiBinary(3)).columns_of(value)[""]
    assert column.dtype == np.int8
    assert column.tolist() == [[1, 0, 1]]


def test_bools_fit_a_uint8_box() -> None:
    column = SpaceCodec(spaces.Box(0, 255, (2,), np.uint8)).columns_of(np.array([True, False]))[""]
    assert column.dtype == np.uint8
    assert column.tolist() == [[1, 0]]


def test_python_integers_fit_a_narrow_box_if_each_of_them_fits() -> None:
    codec = SpaceCodec(spaces.Box(0, 255, (2,), np.uint8))
    assert codec.columns_of([0, 255])[""].tolist() == [[0, 255]]
    fault = refusal(codec.columns_of, [0, 256])
    assert fault.reason is Reason.SPACE_MISMATCH
    assert str(fault) == "observation: expected 0 to 255 (uint8), got 256 (int64)"
    assert "got -1 (int64)" in str(refusal(codec.columns_of, [0, -1]))


def test_mappings_and_lists_stand_for_dicts_and_tuples() -> None:
    from types import MappingProxyType

    codec = SpaceCodec(
        spaces.Dict(pair=spaces.Tuple([spaces.Discrete(3), spaces.Box(-1, 1, (2,))]))
    )
    columns = codec.columns_of(MappingProxyType({"pair": [2, [0.5, 1]]}))
    assert columns["pair/0"].tolist() == [2]
    assert columns["pair/1"].tolist() == [[0.5, 1.0]]


LOSSY = [
    (spaces.Discrete(4), np.float32(1)),
    (spaces.Discrete(4), 1.0),
    (spaces.MultiDiscrete([2, 2]), np.zeros(2)),
    (spaces.Box(0, 255, (2,), np.uint8), np.zeros(2, np.float32)),
    (spaces.Box(0, 255, (2,), np.uint8), np.zeros(2, np.int64)),
    (spaces.Box(0, 255, (2,), np.uint8), np.zeros(2, np.int8)),
    (spaces.Box(0, 9, (2,), np.int32), np.zeros(2, np.int64)),
    (spaces.Box(0, 1, (2,), np.bool_), np.zeros(2, np.uint8)),
    (spaces.Box(-1, 1, (2,)), np.zeros(2, np.complex64)),
]


@pytest.mark.parametrize(("space", "value"), LOSSY)
def test_a_lossy_cast_is_refused_with_both_dtypes_named(space: gym.Space[Any], value: Any) -> None:
    codec = SpaceCodec(space)
    stacked = np.stack([value, value])
    for fault in (
        refusal(codec.columns_of, value),
        refusal(codec.columns_of_batch, stacked, 2),
    ):
        assert fault.reason is Reason.SPACE_MISMATCH
        assert str(codec.leaf("").dtype) in fault.message
        assert str(np.asarray(value).dtype) in fault.message


@pytest.mark.parametrize(
    ("space", "value"), [pair for pair in LOSSY if np.asarray(pair[1]).dtype.kind != "c"]
)
def test_a_lossy_cast_is_refused_on_the_wire_too(space: gym.Space[Any], value: Any) -> None:
    codec = SpaceCodec(space)
    fault = refusal(codec.decode, batch_of(leaf=np.stack([value, value])), 2, "observations")
    assert fault.reason is Reason.SPACE_MISMATCH
    assert str(codec.leaf("").dtype) in fault.message
    assert str(np.asarray(value).dtype) in fault.message


@pytest.mark.parametrize(
    "value",
    ["text", None, ..., {"a": 1}, [[1, 2], [3]], [1, 2, 3, None], ["a"] * 4, b"abcd"],
    ids=repr,
)
def test_what_is_no_array_of_numbers_is_refused(value: Any) -> None:
    fault = refusal(SpaceCodec(VECTOR).columns_of, value)
    assert fault.reason is Reason.SPACE_MISMATCH
    assert "expected float32 [4], got " in fault.message


def test_a_number_beyond_int64_is_refused() -> None:
    for value in (2**63, 2**70, -(2**70)):
        refusal(SpaceCodec(spaces.Discrete(4)).columns_of, value)


def test_a_wrong_shape_is_told_with_both_shapes() -> None:
    codec = SpaceCodec(spaces.Dict(camera=IMAGE))
    flat, full = np.zeros((84, 84), np.uint8), np.zeros((84, 84, 3), np.uint8)
    words = 'observation["camera"]: expected [84, 84, 3], got [84, 84]'
    assert str(refusal(codec.columns_of, {"camera": flat})).startswith(words)
    assert str(
        refusal(codec.columns_of_batch, {"camera": np.stack([flat] * 2)}, 2, "observation")
    ).startswith(words)
    assert str(
        refusal(codec.decode, batch_of(camera=np.stack([flat] * 2)), 2, "observation")
    ).startswith(words)
    one_of_two = [{"camera": full}, {"camera": flat}]
    assert str(refusal(codec.columns_of_batch, one_of_two, 2, "observation")).startswith(
        'observation[1]["camera"]: expected [84, 84, 3], got [84, 84]'
    )


def test_a_scalar_space_takes_no_array_of_one() -> None:
    assert "expected [], got [1]" in str(
        refusal(SpaceCodec(spaces.Discrete(4)).columns_of, np.array([1]))
    )


@pytest.mark.parametrize("got", [0, 1, 3])
def test_a_wrong_number_of_rows_is_told(got: int) -> None:
    codec = SpaceCodec(VECTOR)
    stacked = np.zeros((got, 4), np.float32)
    for fault in (
        refusal(codec.columns_of_batch, stacked, 2),
        refusal(codec.columns_of_batch, list(stacked.tolist()) or np.zeros((0, 4)), 2),
        refusal(codec.decode, batch_of(leaf=stacked), 2, "observations"),
    ):
        assert f"observations: expected 2 rows, got {got}" in str(fault)
    nested = SpaceCodec(spaces.Tuple([VECTOR]))
    assert f"expected 2 rows, got {got}" in str(
        refusal(nested.columns_of_batch, [(row,) for row in stacked], 2)
    )


def test_a_batch_without_the_dimension_of_rows_is_told() -> None:
    fault = refusal(SpaceCodec(VECTOR).decode, batch_of(leaf=np.zeros(4, np.float32)), 1, "o")
    assert "expected [1, 4], got [4]. The first dimension counts rows." in str(fault)


@pytest.mark.parametrize("values", [3.0, "text", None, {"a": 1}, ...], ids=repr)
def test_a_batch_that_is_no_sequence_is_refused(values: Any) -> None:
    assert refusal(SpaceCodec(VECTOR).columns_of_batch, values, 2).reason is Reason.SPACE_MISMATCH


def test_the_bad_one_in_a_list_is_named() -> None:
    codec = SpaceCodec(VECTOR)
    good = np.zeros(4, np.float32)
    assert refusal(codec.columns_of_batch, [good, good[:3]], 2).field == "observations[1]"
    assert refusal(codec.columns_of_batch, [good, None], 2).field == "observations[1]"
    texts = SpaceCodec(spaces.Text(3))
    assert refusal(texts.columns_of_batch, ("abc", "abcd"), 2).field == "observations[1]"


# -- keys


def test_a_missing_and_an_unknown_key_are_named() -> None:
    codec = SpaceCodec(spaces.Dict(deep=spaces.Dict(a=spaces.Discrete(2), b=spaces.Discrete(2))))
    fault = refusal(codec.columns_of, {"deep": {"a": 1, "c": 1}})
    assert fault.reason is Reason.SPACE_MISMATCH
    assert str(fault) == (
        "observation[\"deep\"]: missing key 'b'; unknown key 'c'. Expected exactly 'a', 'b'."
    )


def test_a_missing_and_an_unknown_leaf_are_named() -> None:
    codec = SpaceCodec(spaces.Dict(a=spaces.Discrete(2), b=spaces.Discrete(2)))
    column = np.zeros(1, np.int64)
    for leaves, words in (
        ({"a": column}, "missing leaf 'b'"),
        ({"a": column, "b": column, "c": column}, "unknown leaf 'c'"),
        ({"a": column, "c": column}, "missing leaf 'b'; unknown leaf 'c'"),
        ({}, "missing leaf 'a'; missing leaf 'b'"),
    ):
        fault = refusal(codec.decode, batch_of(**leaves), 1, "groups[0].observations")
        assert fault.reason is Reason.SPACE_MISMATCH
        assert fault.field == "groups[0].observations"
        assert fault.message.startswith(f"{words}. Expected exactly 'a', 'b'. Keys are JSON")


def test_looking_at_a_message_does_not_change_it() -> None:
    batch = batch_of(other=np.zeros(1, np.int64))
    before = batch.SerializeToString()
    refusal(SpaceCodec(spaces.Discrete(2)).decode, batch, 1, "o")
    assert batch.SerializeToString() == before


def test_a_flood_of_unknown_leaves_gets_a_short_answer() -> None:
    batch = pb.Batch()
    for index in range(10_000):
        batch.leaves[f"{index}" * 100].SetInParent()
    assert len(str(refusal(SpaceCodec(VECTOR).decode, batch, 1, "o"))) < 1000


@pytest.mark.parametrize("value", [3, [1, 2], None, "a"], ids=repr)
def test_what_is_no_dict_is_refused(value: Any) -> None:
    codec = SpaceCodec(spaces.Dict(a=spaces.Discrete(2)))
    assert "expected a dict with 'a', got " in str(refusal(codec.columns_of, value))


@pytest.mark.parametrize("value", [3, (1,), (1, 2, 3), {"0": 1, "1": 2}, "ab"], ids=repr)
def test_what_is_no_tuple_of_that_length_is_refused(value: Any) -> None:
    codec = SpaceCodec(spaces.Tuple([spaces.Discrete(2), spaces.Discrete(2)]))
    assert "expected a tuple of 2, got " in str(refusal(codec.columns_of, value))


# -- casts on the wire


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int32, np.uint8, np.bool_])
def test_a_foreign_client_may_send_another_safe_dtype(dtype: type[np.generic]) -> None:
    sent = np.array([[0, 1, 1, 0]], dtype)
    column = SpaceCodec(VECTOR).decode(batch_of(leaf=sent), 1, "o")[""]
    assert column.dtype == np.float32
    assert column.tolist() == [[0.0, 1.0, 1.0, 0.0]]


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.int32, np.bool_])
def test_a_foreign_client_may_count_in_any_width(dtype: type[np.generic]) -> None:
    column = SpaceCodec(spaces.Discrete(4)).decode(batch_of(leaf=np.array([1, 0], dtype)), 2, "o")
    assert column[""].dtype == np.int64
    assert column[""].tolist() == [1, 0]


def test_a_count_that_does_not_fit_the_dtype_of_its_space_is_refused() -> None:
    codec = SpaceCodec(spaces.MultiBinary(2))
    assert codec.decode(batch_of(leaf=np.array([[1, 0]])), 1, "o")[""].dtype == np.int8
    fault = refusal(codec.decode, batch_of(leaf=np.array([[1, 256]])), 1, "o")
    assert "expected -128 to 127 (int8), got 256 (int64)" in str(fault)


def test_a_number_beyond_float32_is_a_fault_of_its_row_alone() -> None:
    codec = SpaceCodec(VECTOR)
    sent = np.zeros((3, 4))
    sent[1, 2] = 1e300
    columns = codec.decode(batch_of(leaf=sent), 3, "o")
    faults = codec.row_faults(columns, "o")
    assert list(faults) == [1]
    assert faults[1].reason is Reason.NOT_FINITE


@pytest.mark.parametrize(
    "tensor",
    [
        pb.Tensor(dtype=pb.DATA_TYPE_FLOAT32, shape=[1, 4], data=bytes(15)),
        pb.Tensor(dtype=pb.DATA_TYPE_FLOAT32, shape=[1, 4], data=bytes(17)),
        pb.Tensor(dtype=pb.DATA_TYPE_FLOAT32, shape=[1, 4]),
        pb.Tensor(dtype=pb.DATA_TYPE_FLOAT32, shape=[-1, 4], data=bytes(16)),
        pb.Tensor(dtype=pb.DATA_TYPE_FLOAT32, shape=[1, 2**62], data=bytes(16)),
        pb.Tensor(dtype=0, shape=[1, 4], data=bytes(16)),
        pb.Tensor(dtype=77, shape=[1, 4], data=bytes(16)),
    ],
    ids=lambda tensor: f"{tensor.dtype} {list(tensor.shape)} {len(tensor.data)}",
)
def test_a_tensor_that_contradicts_itself_is_malformed(tensor: pb.Tensor) -> None:
    batch = pb.Batch()
    batch.leaves[""].CopyFrom(tensor)
    fault = refusal(SpaceCodec(VECTOR).decode, batch, 1, "groups[0].observations")
    assert fault.reason is Reason.MALFORMED_TENSOR
    assert fault.field == "groups[0].observations"


def test_a_bool_column_with_bytes_beyond_0_and_1_is_malformed() -> None:
    batch = pb.Batch()
    batch.leaves[""].CopyFrom(pb.Tensor(dtype=pb.DATA_TYPE_BOOL, shape=[1, 2], data=b"\x01\x02"))
    fault = refusal(SpaceCodec(spaces.Box(0, 1, (2,), np.bool_)).decode, batch, 1, "o")
    assert fault.reason is Reason.MALFORMED_TENSOR


@given(
    path=st.sampled_from(["", "a", "b"]),
    dtype=st.integers(0, 12),
    shape=st.lists(st.integers(-1, 4) | st.integers(-(2**63), 2**63 - 1), max_size=4),
    data=st.binary(max_size=64),
    n=st.integers(0, 4),
)
def test_whatever_arrives_is_columns_or_a_fault(
    path: str, dtype: int, shape: list[int], data: bytes, n: int
) -> None:
    batch = pb.Batch()
    batch.leaves[path].CopyFrom(pb.Tensor(dtype=dtype, shape=shape, data=data))
    for space in (spaces.Discrete(3), VECTOR, spaces.Dict(a=spaces.Text(2))):
        codec = SpaceCodec(space)
        try:
            columns = codec.decode(batch, n, "observations")
        except Fault as fault:
            assert fault.reason in (Reason.MALFORMED_TENSOR, Reason.SPACE_MISMATCH)  # noqa: PT017
            continue
        faults = codec.row_faults(columns, "observations", bounds=True)
        for row in set(range(n)) - set(faults):
            assert codec.value(columns, row) in space


# -- bad rows


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("shape", [(), (4,), (40, 40, 3)], ids=str)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_number_that_is_not_finite_is_found_in_every_row(
    bad: float, shape: tuple[int, ...], dtype: type[np.floating]
) -> None:
    codec = SpaceCodec(spaces.Box(-1, 1, shape, dtype))
    for row in range(5):
        columns = codec.zeros(5)
        columns[""][row].reshape(-1)[-1:] = bad
        faults = codec.row_faults({"": columns[""]}, "observations")
        assert list(faults) == ([row] if shape else [])
        if not shape:
            columns[""][row] = bad
            assert list(codec.row_faults(columns, "observations")) == [row]


@given(np_st.arrays(np.float32, st.tuples(st.integers(0, 70), st.just(3))))
def test_exactly_the_rows_that_are_not_finite_are_faults(column: np.ndarray) -> None:
    faults = SpaceCodec(spaces.Box(-INF, INF, (3,))).row_faults({"": column}, "o")
    assert sorted(faults) == np.flatnonzero(~np.isfinite(column).all(axis=1)).tolist()


def test_numbers_so_large_that_their_squares_overflow_are_finite() -> None:
    codec = SpaceCodec(spaces.Box(-INF, INF, (4,)))
    column = np.full((64, 4), np.finfo(np.float32).max)
    assert codec.row_faults({"": column}, "o") == {}


def test_a_number_that_is_not_finite_is_told_with_its_place() -> None:
    codec = SpaceCodec(spaces.Dict(speed=spaces.Box(-1, 1, (2, 2))))
    columns = codec.zeros(3)
    columns["speed"][1, 0, 1] = NAN
    (fault,) = codec.row_faults(columns, "groups[0].observations").values()
    assert fault.reason is Reason.NOT_FINITE
    assert fault.field == 'groups[0].observations["speed"]'
    assert fault.message == "expected a finite number at [0, 1], got nan"


def test_a_number_beyond_float32_is_told_as_such() -> None:
    codec = SpaceCodec(spaces.Box(-INF, INF, (2,), np.float64))
    (fault,) = codec.row_faults({"": np.array([[0.0, 1e300]])}, "actions").values()
    assert fault.message == "expected a number that is finite in float32 at [1], got 1e+300"


def test_each_bad_row_has_one_fault_though_several_leaves_are_bad() -> None:
    codec = SpaceCodec(spaces.Dict(a=spaces.Box(-1, 1, (2,)), b=spaces.Discrete(2)))
    columns = codec.zeros(4)
    columns["a"][[1, 2]] = NAN
    columns["b"][[2, 3]] = 9
    faults = codec.row_faults(columns, "o")
    assert {row: fault.reason for row, fault in faults.items()} == {
        1: Reason.NOT_FINITE,
        2: Reason.NOT_FINITE,
        3: Reason.SPACE_MISMATCH,
    }


@pytest.mark.parametrize(
    ("space", "bad"),
    [
        (spaces.Discrete(4), [-1, 4, 2**63 - 1, -(2**63)]),
        (spaces.Discrete(5, start=-2), [-3, 3, 2**63 - 1, -(2**63)]),
        (spaces.Discrete(2, start=2**62), [0, 2**62 - 1, 2**62 + 2, -(2**63)]),
        (spaces.MultiDiscrete([3, 2]), [[3, 0], [0, 2], [-1, 0], [0, -1]]),
        (spaces.MultiDiscrete([3, 3]), [[3, 0], [0, 3], [-1, 0]]),
        (spaces.MultiDiscrete([3, 4], start=[-1, 10]), [[-2, 10], [2, 10], [0, 9], [0, 14]]),
        (spaces.MultiDiscrete([3, 4], dtype=np.uint8), [[3, 0], [0, 255]]),
        (spaces.MultiDiscrete([127], dtype=np.int8, start=[-64]), [[-65], [63], [-128], [127]]),
        (spaces.MultiBinary(3), [[0, 0, 2], [-1, 0, 0]]),
        (spaces.MultiBinary([1, 2]), [[[0, 2]]]),
    ],
    ids=str,
)
def test_a_count_outside_its_space_is_a_fault(space: gym.Space[Any], bad: list[Any]) -> None:
    codec = SpaceCodec(space)
    for value in bad:
        values = [*samples_of(space, 3), np.asarray(value), *samples_of(space, 2)]
        columns = codec.columns_of_batch([np.asarray(value).tolist() for value in values], 6)
        faults = codec.row_faults(columns, "o")
        assert list(faults) == [3]
        assert faults[3].reason is Reason.SPACE_MISMATCH
        alone = codec.columns_of(np.asarray(value))
        assert list(codec.row_faults(alone, "o")) == [0]


def test_a_count_outside_its_space_is_told_with_the_range() -> None:
    codec = SpaceCodec(spaces.Discrete(4, start=1))
    assert str(codec.row_faults(codec.columns_of(0), "o")[0]) == "o: expected 1 to 4, got 0"
    codec = SpaceCodec(spaces.MultiDiscrete([3, 4]))
    assert str(codec.row_faults(codec.columns_of([0, 7]), "o")[0]) == (
        "o: expected 0 to 3 at [1], got 7"
    )


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_leaving_a_box_is_a_fault_only_if_asked_for(dtype: type[np.generic]) -> None:
    codec = SpaceCodec(spaces.Box(-2, 2, (2,), dtype))
    columns = codec.columns_of_batch([[0, 0], [0, 3], [2, -2], [-3, 0]], 4)
    assert codec.row_faults(columns, "actions") == {}
    faults = codec.row_faults(columns, "actions", bounds=True)
    assert list(faults) == [1, 3]
    assert all(fault.reason is Reason.SPACE_MISMATCH for fault in faults.values())
    assert "at [1], got 3" in faults[1].message


def test_infinity_is_never_a_value_though_a_box_is_unbounded() -> None:
    codec = SpaceCodec(spaces.Box(-INF, INF, (2,)))
    faults = codec.row_faults(codec.columns_of([0.0, INF]), "o", bounds=True)
    assert faults[0].reason is Reason.NOT_FINITE


# -- text


def test_text_is_code_points_then_minus_one() -> None:
    codec = SpaceCodec(spaces.Text(4, charset="aé漢🙂"))
    column = codec.columns_of("é🙂")[""]
    assert column.dtype == np.int32
    assert column.tolist() == [[0xE9, 0x1F642, -1, -1]]
    batch = message_of(codec, {"": column})
    assert tensor_from_proto(batch.leaves[""]).tolist() == column.tolist()


@pytest.mark.parametrize(
    ("points", "words"),
    [
        ([-1, -1, -1], "expected at least 1 characters, got 0"),
        ([97, -1, 97], "got -1 in between"),
        ([97, 120, -1], "got code point 120"),
        ([97, -2, -1], "got code point -2"),
        ([2**31 - 1, -1, -1], "got code point 2147483647"),
    ],
)
def test_code_points_that_are_no_text_of_the_space_are_faults(
    points: list[int], words: str
) -> None:
    codec = SpaceCodec(spaces.Text(3, charset="abc"))
    column = np.array([[97, 98, 99], points, [97, -1, -1]], np.int32)
    faults = codec.row_faults(codec.decode(batch_of(leaf=column), 3, "o"), "o")
    assert list(faults) == [1]
    assert words in faults[1].message


def test_text_that_is_too_long_or_no_text_is_refused() -> None:
    codec = SpaceCodec(spaces.Text(3))
    assert "expected at most 3 characters, got 4" in str(refusal(codec.columns_of, "abcd"))
    assert "expected a string, got int 3" in str(refusal(codec.columns_of, 3))
    assert "expected 2 strings, got str 'ab'" in str(refusal(codec.columns_of_batch, "ab", 2))


# -- encode


def test_columns_of_another_safe_dtype_are_encoded_in_that_of_the_leaf() -> None:
    codec = SpaceCodec(spaces.Discrete(4))
    batch = message_of(codec, {"": np.array([1, 2], np.int32)})
    assert batch.leaves[""].dtype == pb.DATA_TYPE_INT64
    assert codec.decode(batch, 2, "actions")[""].tolist() == [1, 2]


def test_columns_of_another_shape_are_not_encoded() -> None:
    assert "expected [4], got [3]" in str(
        refusal(SpaceCodec(VECTOR).encode, {"": np.zeros((2, 3), np.float32)}, pb.Batch())
    )


# -- spaces


@pytest.mark.parametrize(
    "space",
    [
        spaces.Graph(spaces.Box(-1, 1, (2,)), None),
        spaces.Sequence(spaces.Discrete(2)),
        spaces.Box(0, 1, (2,), np.uint64),
        spaces.Dict({0: spaces.Discrete(2)}),
    ],
    ids=lambda space: str(space)[:20],
)
def test_a_space_that_the_contract_lacks_is_refused_when_the_codec_is_built(
    space: gym.Space[Any],
) -> None:
    fault = refusal(SpaceCodec, spaces.Tuple([space]))
    assert fault.reason is Reason.SPACE_MISMATCH
    assert fault.field == "space[0]"
