"""Tensors: every dtype and layout goes round, and nothing malformed gets in."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as np_st

from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.faults import Fault, Reason
from client_sdk.wire.tensors import DTYPES, data_type_of, tensor_from_proto, tensor_to_proto

ALL_DTYPES = list(DTYPES.values())


def over_the_wire(array: np.ndarray) -> np.ndarray:
    sent = tensor_to_proto(array).SerializeToString()
    return tensor_from_proto(pb.Tensor.FromString(sent))


def refusal(tensor: pb.Tensor) -> Fault:
    with pytest.raises(Fault) as caught:
        tensor_from_proto(tensor, 'observations["camera"]')
    assert caught.value.reason is Reason.MALFORMED_TENSOR
    assert caught.value.field == 'observations["camera"]'
    return caught.value


def test_every_data_type_of_the_contract_has_a_dtype() -> None:
    contract = set(pb.DataType.values()) - {pb.DATA_TYPE_UNSPECIFIED}
    assert set(DTYPES) == contract
    for number, dtype in DTYPES.items():
        assert pb.DataType.Name(number) == f"DATA_TYPE_{dtype.name.upper()}"


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (0,), (4, 0, 2), (1,) * 32])
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_every_dtype_and_shape_goes_round(dtype: np.dtype, shape: tuple[int, ...]) -> None:
    array = (np.arange(np.prod(shape, dtype=int)) % 2).reshape(shape).astype(dtype)
    back = over_the_wire(array)
    assert back.dtype == dtype
    assert back.shape == shape
    np.testing.assert_array_equal(back, array)


@given(
    st.sampled_from(ALL_DTYPES).flatmap(
        lambda dtype: np_st.arrays(dtype, np_st.array_shapes(min_dims=0, min_side=0))
    )
)
def test_any_array_goes_round_bit_by_bit(array: np.ndarray) -> None:
    back = over_the_wire(array)
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert back.tobytes() == array.tobytes()


def test_bytes_on_the_wire_are_little_endian_whatever_the_array_is() -> None:
    for order in "<>":
        tensor = tensor_to_proto(np.array([1, 258], f"{order}i4"))
        assert tensor.data == b"\x01\x00\x00\x00\x02\x01\x00\x00"


def test_bytes_on_the_wire_are_row_major_whatever_the_array_is() -> None:
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    for layout in (array, np.asfortranarray(array), np.repeat(array, 2, axis=1)[:, ::2]):
        assert tensor_to_proto(layout).data == bytes(range(6))


def test_a_decoded_tensor_is_a_read_only_view() -> None:
    array = tensor_from_proto(tensor_to_proto(np.zeros(4, np.float32)))
    assert not array.flags.writeable
    assert not array.flags.owndata


def test_a_message_given_is_filled_in_place_and_replaced() -> None:
    tensor = tensor_to_proto(np.zeros((2, 2), np.float32))
    assert tensor_to_proto(np.ones(3, np.int8), tensor) is tensor
    np.testing.assert_array_equal(tensor_from_proto(tensor), np.ones(3, np.int8))


@pytest.mark.parametrize("dtype", ["u8", "c8", "U4", "O", "M8[s]", "g"])
def test_a_dtype_that_the_contract_lacks_is_refused_by_name(dtype: str) -> None:
    with pytest.raises(Fault, match=r"expected one of bool, uint8, .*, got ") as caught:
        data_type_of(np.dtype(dtype))
    assert caught.value.reason is Reason.SPACE_MISMATCH
    assert str(np.dtype(dtype)) in str(caught.value)


def test_too_few_and_too_many_bytes_are_told_by_number() -> None:
    for size in (0, 15, 17, 1000):
        tensor = pb.Tensor(dtype=pb.DATA_TYPE_FLOAT32, shape=[2, 2], data=bytes(size))
        message = refusal(tensor).message
        assert f"expected 16 bytes for float32 [2, 2], got {size}" in message


@pytest.mark.parametrize(
    "shape",
    [
        [-1],
        [-1, -4],
        [2, -2],
        [-(2**63)],
        [2**62],
        [2**32, 2**32],
        [2**63 - 1, 2**63 - 1, 2**63 - 1],
        [0, 2**62],
        [2**62, 0, 2**62],
        [1] * 33,
        [1] * 10_000,
    ],
    ids=lambda shape: str(shape)[:30],
)
@pytest.mark.parametrize("data", [b"", bytes(16)], ids=["empty", "16 bytes"])
def test_an_absurd_shape_is_a_fault_and_not_an_allocation(shape: list[int], data: bytes) -> None:
    refusal(pb.Tensor(dtype=pb.DATA_TYPE_FLOAT32, shape=shape, data=data))


@pytest.mark.parametrize("number", [0, 12, 999, -1])
def test_an_unknown_data_type_is_refused(number: int) -> None:
    tensor = pb.Tensor(dtype=number, shape=[1], data=bytes(4))
    assert f"got {number}" in refusal(tensor).message


def test_a_bool_is_one_byte_of_0_or_1() -> None:
    good = pb.Tensor(dtype=pb.DATA_TYPE_BOOL, shape=[2], data=b"\x00\x01")
    assert tensor_from_proto(good).tolist() == [False, True]
    bad = pb.Tensor(dtype=pb.DATA_TYPE_BOOL, shape=[2], data=b"\x00\x02")
    assert "got 2" in refusal(bad).message


@given(
    dtype=st.integers(-2, 14),
    shape=st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 4), max_size=40),
    data=st.binary(max_size=64),
)
def test_whatever_arrives_is_an_array_or_a_fault(dtype: int, shape: list[int], data: bytes) -> None:
    tensor = pb.Tensor(dtype=dtype, shape=shape, data=data)
    try:
        array = tensor_from_proto(tensor)
    except Fault as fault:
        assert fault.reason is Reason.MALFORMED_TENSOR  # noqa: PT017
    else:
        assert array.tobytes() == data
