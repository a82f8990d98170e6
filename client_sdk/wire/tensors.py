"""Numpy arrays as ``Tensor`` messages and back.

Bytes on the wire are little-endian and row-major whatever the host is. Pure functions; any thread.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.faults import Fault, Reason

DTYPES: Final[dict[int, np.dtype[Any]]] = {
    int(pb.DATA_TYPE_BOOL): np.dtype(np.bool_),
    int(pb.DATA_TYPE_UINT8): np.dtype(np.uint8),
    int(pb.DATA_TYPE_UINT16): np.dtype(np.uint16),
    int(pb.DATA_TYPE_UINT32): np.dtype(np.uint32),
    int(pb.DATA_TYPE_INT8): np.dtype(np.int8),
    int(pb.DATA_TYPE_INT16): np.dtype(np.int16),
    int(pb.DATA_TYPE_INT32): np.dtype(np.int32),
    int(pb.DATA_TYPE_INT64): np.dtype(np.int64),
    int(pb.DATA_TYPE_FLOAT16): np.dtype(np.float16),
    int(pb.DATA_TYPE_FLOAT32): np.dtype(np.float32),
    int(pb.DATA_TYPE_FLOAT64): np.dtype(np.float64),
}
"""Every ``DataType`` of the contract, and what it is in memory: numpy's, in the host's order."""

# By numpy's code without the byte order ("f4"), which aliases such as longlong share.
_DATA_TYPES: Final[dict[str, int]] = {dtype.str[1:]: number for number, dtype in DTYPES.items()}
MAX_DIMENSIONS: Final = 32
"""Of a tensor or a space that is accepted from a peer."""


def data_type_of(dtype: np.dtype[Any]) -> int:
    """The ``DataType`` of a numpy dtype, in either byte order.

    Raises:
        Fault: SPACE_MISMATCH; the contract has no such type.
    """
    number = _DATA_TYPES.get(dtype.str[1:])
    if number is None:
        known = ", ".join(str(known) for known in DTYPES.values())
        raise Fault(Reason.SPACE_MISMATCH, f"expected one of {known}, got {dtype}")
    return number


def wire_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """That dtype as its bytes lie on the wire: little-endian."""
    return dtype.newbyteorder("<")


def tensor_to_proto(array: NDArray[Any], tensor: pb.Tensor | None = None) -> pb.Tensor:
    """An array as a message; the bytes are copied.

    Args:
        array: Of a dtype in ``DTYPES``, in any byte order and memory layout.
        tensor: Filled in place if given.

    Raises:
        Fault: SPACE_MISMATCH; the contract has no such dtype.
    """
    if tensor is None:
        tensor = pb.Tensor()
    tensor.dtype = data_type_of(array.dtype)  # type: ignore[assignment]
    tensor.shape[:] = array.shape
    tensor.data = array.astype(wire_dtype(array.dtype), copy=False).tobytes()
    return tensor


def tensor_from_proto(tensor: pb.Tensor, field: str = "tensor") -> NDArray[Any]:
    """The array in a message: a read-only view of its bytes, nothing copied.

    Args:
        tensor: From anyone; nothing about it is taken for granted.
        field: Path to it, for the fault.

    Raises:
        Fault: MALFORMED_TENSOR; dtype, shape and bytes do not belong together.
    """
    dtype = DTYPES.get(tensor.dtype)
    if dtype is None:
        raise _malformed(f"expected a DataType from 1 to {max(DTYPES)}, got {tensor.dtype}", field)
    shape = tuple(tensor.shape)
    if len(shape) > MAX_DIMENSIONS:
        raise _malformed(f"expected at most {MAX_DIMENSIONS} dimensions, got {len(shape)}", field)
    if shape and min(shape) < 0:
        raise _malformed(f"expected dimensions from 0 up, got {list(shape)}", field)
    data = tensor.data
    # Python's integers do not overflow: an absurd shape is a wrong length, not a huge allocation.
    size_bytes = math.prod(shape) * dtype.itemsize
    if len(data) != size_bytes:
        raise _malformed(
            f"expected {size_bytes} bytes for {dtype} {list(shape)}, got {len(data)}. Send the "
            "elements row-major, little-endian and without padding.",
            field,
        )
    if dtype.kind == "b" and data and max(data) > 1:
        raise _malformed(f"expected bytes of 0 or 1 for bool, got {max(data)}", field)
    try:
        return np.ndarray(shape, wire_dtype(dtype), data)
    except ValueError:  # no elements, yet one dimension beyond what an array can count
        raise _malformed(f"expected a shape that fits memory, got {list(shape)}", field) from None


def _malformed(message: str, field: str) -> Fault:
    return Fault(Reason.MALFORMED_TENSOR, message, field)
