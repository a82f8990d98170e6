"""Gymnasium spaces as ``Space`` messages and back, and what two of them disagree on, in words.

Spaces are compared as they are on the wire, where one that merely counts has no dtype of its own.
Pure functions; any thread.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, Final

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.faults import Fault, Reason
from client_sdk.wire.leaves import child_suffix, unsupported_space
from client_sdk.wire.tensors import (
    DTYPES,
    MAX_DIMENSIONS,
    data_type_of,
    tensor_from_proto,
    tensor_to_proto,
)

MAX_SPACE_ELEMENTS: Final = 2**26
"""Numbers in one value of a space that is accepted from a peer, all leaves together."""

_DIFFERENCES_TOLD: Final = 5
_INT64: Final = np.iinfo(np.int64)


def space_to_proto(space: gym.Space[Any]) -> pb.Space:
    """A space as a message.

    Raises:
        Fault: SPACE_MISMATCH; the contract has no such space or dtype.
    """
    proto = pb.Space()
    _fill(proto, space, "")
    return proto


def space_from_proto(proto: pb.Space) -> gym.Space[Any]:
    """The space in a message; equal to the original, but for the dtype of a Discrete (int64).

    Args:
        proto: From anyone; nothing about it is taken for granted.

    Raises:
        Fault: SPACE_MISMATCH or MALFORMED_TENSOR; that is no space.
    """
    if (elements := _elements(proto, "")) > MAX_SPACE_ELEMENTS:
        raise _refused(f"expected at most {MAX_SPACE_ELEMENTS} numbers, got {elements}", "")
    return _built(proto, "")


def diff(client: gym.Space[Any] | pb.Space, server: gym.Space[Any] | pb.Space) -> str | None:
    """What a client's idea of a space and the server's disagree on; None if nothing.

    A message is compared as it is, so that a peer's space need not be built.

    Raises:
        Fault: As in ``space_to_proto`` and ``space_from_proto``.
    """
    left = client if isinstance(client, pb.Space) else space_to_proto(client)
    right = server if isinstance(server, pb.Space) else space_to_proto(server)
    for proto in (left, right):
        _elements(proto, "")  # for its check of every shape, before any of them is told
    found = list(itertools.islice(_differences(left, right, ""), _DIFFERENCES_TOLD + 1))
    if not found:
        return None
    more = "; and more" if len(found) > _DIFFERENCES_TOLD else ""
    return "; ".join(found[:_DIFFERENCES_TOLD]) + more


# -- to the wire


def _fill(proto: pb.Space, space: gym.Space[Any], where: str) -> None:
    if isinstance(space, spaces.Dict):
        proto.dict.SetInParent()
        for key, child in space.spaces.items():
            if not isinstance(key, str):
                raise _refused(f"expected strings as keys, got {key!r}", where)
            _fill(proto.dict.spaces[key], child, where + child_suffix(key))
    elif isinstance(space, spaces.Tuple):
        proto.tuple.SetInParent()
        for index, child in enumerate(space.spaces):
            _fill(proto.tuple.spaces.add(), child, where + child_suffix(index))
    elif isinstance(space, spaces.Box):
        proto.box.dtype = _data_type(space.low.dtype, where)  # type: ignore[assignment]
        proto.box.shape.extend(space.shape)
        tensor_to_proto(_condensed(space.low), proto.box.low)
        tensor_to_proto(_condensed(space.high), proto.box.high)
    elif isinstance(space, spaces.Discrete):
        proto.discrete.n = int(space.n)
        proto.discrete.start = int(space.start)
    elif isinstance(space, spaces.MultiDiscrete):
        _data_type(space.nvec.dtype, where)  # refuses what the contract lacks, and says where
        tensor_to_proto(space.nvec, proto.multi_discrete.nvec)
        if space.start.any():
            tensor_to_proto(space.start, proto.multi_discrete.start)
    elif isinstance(space, spaces.MultiBinary):
        proto.multi_binary.SetInParent()
        proto.multi_binary.shape.extend(space.shape)
    elif isinstance(space, spaces.Text):
        proto.text.min_length = space.min_length
        proto.text.max_length = space.max_length
        proto.text.charset = space.characters
    else:
        raise unsupported_space(space, where)


def _data_type(dtype: np.dtype[Any], where: str) -> int:
    try:
        return data_type_of(dtype)
    except Fault as fault:
        raise _refused(fault.message, where) from None


def _condensed(bound: NDArray[Any]) -> NDArray[Any]:
    """One number where all are the same: an image's bounds are as large as an image."""
    if bound.size and (bound == bound.flat[0]).all():
        return np.asarray(bound.flat[0])
    return bound


# -- from the wire


def _elements(proto: pb.Space, where: str) -> int:
    """How many numbers one value has."""
    kind = proto.WhichOneof("kind")
    if kind == "dict":
        children = proto.dict.spaces.items()
        return sum(_elements(child, where + child_suffix(key)) for key, child in children)
    if kind == "tuple":
        parts = enumerate(proto.tuple.spaces)
        return sum(_elements(child, where + child_suffix(index)) for index, child in parts)
    if kind == "box":
        return math.prod(_shape(proto.box.shape, where))
    if kind == "multi_binary":
        return math.prod(_shape(proto.multi_binary.shape, where))
    if kind == "multi_discrete":
        return math.prod(_shape(proto.multi_discrete.nvec.shape, where))
    if kind == "text":
        return proto.text.max_length
    return 1


def _shape(dimensions: Any, where: str) -> tuple[int, ...]:
    shape = tuple(dimensions)
    if len(shape) > MAX_DIMENSIONS:
        message = f"expected at most {MAX_DIMENSIONS} dimensions, got {len(shape)}"
    elif shape and min(shape) < 0:
        message = f"expected dimensions from 0 up, got {list(shape)}"
    else:
        return shape
    raise Fault(Reason.MALFORMED_TENSOR, message, f"space{where}")


def _built(proto: pb.Space, where: str) -> gym.Space[Any]:
    kind = proto.WhichOneof("kind")
    if kind == "dict":
        return spaces.Dict(
            {
                key: _built(child, where + child_suffix(key))
                for key, child in proto.dict.spaces.items()
            }
        )
    if kind == "tuple":
        return spaces.Tuple(
            [
                _built(child, where + child_suffix(index))
                for index, child in enumerate(proto.tuple.spaces)
            ]
        )
    if kind == "box":
        return _box(proto.box, where)
    if kind == "discrete":
        n, start = proto.discrete.n, proto.discrete.start
        if not 0 < n <= _INT64.max - max(start, 0) + 1:
            raise _refused(f"expected n from 1 up, within int64, got {n} from {start}", where)
        return spaces.Discrete(n, start=start)
    if kind == "multi_discrete":
        return _multi_discrete(proto.multi_discrete, where)
    if kind == "multi_binary":
        shape = _shape(proto.multi_binary.shape, where)
        if 0 in shape:
            raise _refused(f"expected dimensions from 1 up, got {list(shape)}", where)
        return spaces.MultiBinary(shape[0] if len(shape) == 1 else shape)
    if kind == "text":
        text = proto.text
        if text.min_length > text.max_length:
            raise _refused(
                f"expected min_length <= max_length, got {text.min_length} > {text.max_length}",
                where,
            )
        return spaces.Text(text.max_length, min_length=text.min_length, charset=text.charset)
    raise _refused("expected a kind of space known here, got none; is the peer newer?", where)


def _box(proto: pb.BoxSpace, where: str) -> spaces.Box:
    dtype = DTYPES.get(proto.dtype)
    if dtype is None:
        raise _refused(f"expected a DataType from 1 to {max(DTYPES)}, got {proto.dtype}", where)
    shape = _shape(proto.shape, where)
    low = _bound(proto, "low", shape, dtype, where)
    high = _bound(proto, "high", shape, dtype, where)
    if not (low <= high).all():  # true of NaN as well
        raise _refused("expected low <= high everywhere, got the reverse or NaN", where)
    if dtype.kind == "b":  # gymnasium takes the bounds of a bool box as integers only
        low, high = low.astype(np.int8), high.astype(np.int8)
    return spaces.Box(low, high, dtype=dtype.type)


def _bound(
    proto: pb.BoxSpace, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], where: str
) -> NDArray[Any]:
    """One of a box's bounds, in full; a view where one number stands for all."""
    field = f"space{where}.{name}"
    bound = tensor_from_proto(getattr(proto, name), field)
    if bound.shape not in ((), shape):
        raise Fault(
            Reason.SPACE_MISMATCH,
            f"expected {list(shape)} or one number, got {list(bound.shape)}",
            field,
        )
    if not np.can_cast(bound.dtype, dtype, "safe"):
        raise Fault(Reason.SPACE_MISMATCH, f"expected {dtype}, got {bound.dtype}", field)
    return np.broadcast_to(bound.astype(dtype), shape)


def _multi_discrete(proto: pb.MultiDiscreteSpace, where: str) -> spaces.MultiDiscrete:
    nvec, start = _counts(proto, where)
    last = np.iinfo(nvec.dtype).max
    if not ((nvec > 0) & (nvec - 1 <= last - np.maximum(start, 0))).all():
        raise _refused(f"expected nvec from 1 up, within {nvec.dtype}", where)
    return spaces.MultiDiscrete(nvec, dtype=nvec.dtype.type, start=start)


def _counts(
    proto: pb.MultiDiscreteSpace, where: str
) -> tuple[NDArray[np.integer[Any]], NDArray[np.integer[Any]]]:
    """Nvec and start in full, in the dtype of nvec."""
    nvec = tensor_from_proto(proto.nvec, f"space{where}.nvec")
    if nvec.dtype.kind not in "iu":
        raise _refused(f"expected integers as nvec, got {nvec.dtype}", where)
    nvec = nvec.astype(nvec.dtype.newbyteorder("="), copy=False)
    if not proto.HasField("start"):
        return nvec, np.zeros_like(nvec)
    start = tensor_from_proto(proto.start, f"space{where}.start")
    if start.shape != nvec.shape or not np.can_cast(start.dtype, nvec.dtype, "safe"):
        raise _refused(
            f"expected start to be {nvec.dtype} {list(nvec.shape)} as nvec is, got "
            f"{start.dtype} {list(start.shape)}",
            where,
        )
    return nvec, start.astype(nvec.dtype)


def _refused(message: str, where: str) -> Fault:
    return Fault(Reason.SPACE_MISMATCH, message, f"space{where}")


# -- differences


def _differences(client: pb.Space, server: pb.Space, where: str) -> Iterator[str]:
    kind = server.WhichOneof("kind")
    if kind != client.WhichOneof("kind"):
        yield _disagreement(where, _described(client), _described(server))
    elif kind == "dict":
        ours, theirs = server.dict.spaces, client.dict.spaces
        for key in sorted(set(ours) | set(theirs)):
            inside = where + child_suffix(key)
            if key not in theirs:
                yield _disagreement(inside, "nothing", _described(ours[key]))
            elif key not in ours:
                yield _disagreement(inside, _described(theirs[key]), "nothing")
            else:
                yield from _differences(theirs[key], ours[key], inside)
    elif kind == "tuple":
        parts = itertools.zip_longest(client.tuple.spaces, server.tuple.spaces)
        for index, (left, right) in enumerate(parts):
            inside = where + child_suffix(index)
            if left is None or right is None:
                yield _disagreement(inside, _described(left), _described(right))
            else:
                yield from _differences(left, right, inside)
    elif (left := _described(client)) != (right := _described(server)):
        yield _disagreement(where, left, right)
    elif kind == "box":
        shape, dtype = _shape(server.box.shape, where), DTYPES[server.box.dtype]
        for name in ("low", "high"):
            yield from _element_differences(
                _bound(client.box, name, shape, dtype, where),
                _bound(server.box, name, shape, dtype, where),
                _inside(where, name),
            )
    elif kind == "multi_discrete":
        arrays = zip(
            _counts(client.multi_discrete, where),
            _counts(server.multi_discrete, where),
            ("nvec", "start"),
            strict=True,
        )
        for left_array, right_array, name in arrays:
            yield from _element_differences(left_array, right_array, _inside(where, name))
    elif kind == "text" and set(client.text.charset) != set(server.text.charset):
        yield _disagreement(
            _inside(where, "charset"),
            f"{client.text.charset!r:.60}",
            f"{server.text.charset!r:.60}",
        )


def _element_differences(client: NDArray[Any], server: NDArray[Any], where: str) -> Iterator[str]:
    different = client != server
    if different.any():
        at = tuple(np.argwhere(different)[0].tolist())
        place = where + (str(list(at)) if at else "")
        yield _disagreement(place, str(client[at].item()), str(server[at].item()))


def _inside(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _disagreement(where: str, client: str, server: str) -> str:
    return f"{where}{': ' if where else ''}the client has {client}, the server {server}"


def _described(proto: pb.Space | None) -> str:
    """A space in a few words; leaves that differ in more than their elements differ here."""
    kind = proto.WhichOneof("kind") if proto is not None else None
    if proto is None or kind is None:
        return "nothing"
    if kind == "box":
        return f"Box {DTYPES.get(proto.box.dtype, 'of unknown dtype')} {list(proto.box.shape)}"
    if kind == "discrete":
        start = f", start={proto.discrete.start}" if proto.discrete.start else ""
        return f"Discrete({proto.discrete.n}{start})"
    if kind == "multi_discrete":
        nvec = proto.multi_discrete.nvec
        dtype = DTYPES.get(nvec.dtype, "of unknown dtype")
        return f"MultiDiscrete {dtype} {list(nvec.shape)}"
    if kind == "multi_binary":
        return f"MultiBinary {list(proto.multi_binary.shape)}"
    if kind == "text":
        return f"Text of {proto.text.min_length} to {proto.text.max_length} characters"
    if kind == "dict":
        return f"Dict of {len(proto.dict.spaces)}"
    return f"Tuple of {len(proto.tuple.spaces)}"
