"""One leaf of a space: checks, casts and tensors for columns of its values.

A *leaf* is what a Dict or Tuple space is made of in the end; its *column* is an array ``[N, *shape]``
of N values. ``batches.SpaceCodec`` puts leaves together. Immutable; any thread.

Casts that keep the value are done: widening, integers to floats, floats to narrower floats (rounded).
Others are refused with both dtypes named. Where a value has no dtype of its own (lists, numbers),
and in spaces that merely count (Discrete and its kin), integers may be of any width if they fit.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.faults import Fault, Reason
from client_sdk.wire.tensors import data_type_of, tensor_from_proto, wire_dtype

Columns: TypeAlias = dict[str, NDArray[Any]]
"""N values of a space: ``[N, *shape]`` for each leaf, by the leaf's path."""

Buffer: TypeAlias = bytes | memoryview
"""Of values, to be put into a message."""

Reader: TypeAlias = Callable[[bytes], Any]
"""Finds a value of a space in a message."""


@dataclasses.dataclass(frozen=True, slots=True)
class LeafSpec:
    """What one leaf of a space looks like in columns and on the wire."""

    path: str
    """JSON pointer without the first slash; "" for a space that is itself a leaf."""
    dtype: np.dtype[Any]
    """Of its column."""
    shape: tuple[int, ...]
    """Of one value; a column is ``[N, *shape]``."""
    space: gym.Space[Any]
    """The gymnasium space there."""


def child_path(parts: Sequence[str]) -> str:
    """The key of the leaf that is reached by those keys and indices."""
    return "/".join(part.replace("~", "~0").replace("/", "~1") for part in parts)


def child_suffix(key: str | int) -> str:
    """How a key or index is written in ``Fault.field``: ``["camera"]`` or ``[0]``."""
    return f"[{key}]" if isinstance(key, int) else f"[{json.dumps(key, ensure_ascii=False)}]"


class Leaf:
    """Values of a leaf space as columns; this base knows shapes and dtypes, not meanings.

    The end of a branch in ``trees``.
    """

    # Integers of any width are welcome if they fit.
    counts = False

    def __init__(self, spec: LeafSpec, suffix: str) -> None:
        self.spec = spec
        self.path = spec.path
        self.suffix = suffix
        self.dtype = spec.dtype
        self.shape = spec.shape
        self._shape_list = list(spec.shape)
        self._data_type = data_type_of(spec.dtype)
        self._wire_dtype = wire_dtype(spec.dtype)
        self.row_bytes = math.prod(spec.shape) * spec.dtype.itemsize
        # A column is a view of a message's bytes, but a bool must be looked at: it is 0 or 1.
        self.is_plain = self._wire_dtype == spec.dtype and spec.dtype.kind != "b"

    def leaves(self) -> Iterator[Leaf]:
        """Itself alone."""
        yield self

    # -- values to columns

    def sure_columns(self, value: Any) -> Columns | None:
        """The column of one value as it is, if a glance tells that it has no fault; else None."""
        if (
            type(value) is np.ndarray
            and value.shape == self.shape
            and value.dtype == self.dtype
            and self.is_sure(value)
        ):
            return {self.path: value[None]}
        return None

    def collect(self, value: Any, field: str, columns: Columns) -> None:
        """Add the column ``[1, *shape]`` of one value; may share its memory."""
        array = value if type(value) is np.ndarray else self._array_of(value, field)
        if array.shape != self.shape:
            raise self._wrong_shape(array.shape, field)
        if array.dtype != self.dtype:
            array = self._cast(array, field, array is not value)
        columns[self.path] = array[None]

    def collect_batch(self, values: Any, n: int, field: str, columns: Columns) -> None:
        """Add the column of n values, stacked or in a sequence; may share their memory."""
        if type(values) is np.ndarray and values.dtype != object:
            array = values
        else:
            array = self._stack_of(values, n, field)
        self._check_rows(array.shape, n, field)
        if array.dtype != self.dtype:
            array = self._cast(array, field, array is not values)
        columns[self.path] = array

    def _array_of(self, value: Any, field: str) -> NDArray[Any]:
        try:
            array = np.asarray(value)
        except (ValueError, TypeError, OverflowError):  # ragged lists, foreign array types
            array = np.asarray(None)
        if array.dtype.kind not in "biuf":
            raise self.fault(
                Reason.SPACE_MISMATCH,
                f"expected {self._wanted()}, got {kind_of(value)}. Send numbers of that shape.",
                field,
            )
        return array

    def _stack_of(self, values: Any, n: int, field: str) -> NDArray[Any]:
        if not hasattr(values, "__len__"):
            raise self.fault(
                Reason.SPACE_MISMATCH,
                f"expected {n} values, stacked or in a list, got {kind_of(values)}",
                field,
            )
        if len(values) == 0:
            return np.zeros((0, *self.shape), self.dtype)
        try:
            array = np.asarray(values)
        except (ValueError, TypeError, OverflowError):
            array = np.asarray(None)
        if array.dtype.kind in "biuf":
            return array
        # One of them is wrong; say which.
        if len(values) != n:
            raise self.wrong_rows(len(values), n, field)
        rows: list[NDArray[Any]] = []
        for index, value in enumerate(values):
            found: Columns = {}
            self.collect(value, f"{field}[{index}]", found)
            rows.append(found[self.path])
        return np.concatenate(rows)

    # -- the wire

    def encode(self, column: NDArray[Any], tensor: pb.Tensor) -> None:
        """Fill an empty message."""
        if column.dtype != self.dtype:
            column = self._cast(column, "", False)
        if column.shape[1:] != self.shape:
            raise self._wrong_shape(column.shape[1:], "")
        tensor.dtype = self._data_type  # type: ignore[assignment]
        tensor.shape.extend(column.shape)
        if self._wire_dtype != self.dtype:
            column = column.astype(self._wire_dtype)
        tensor.data = column.tobytes()

    def decode(self, tensor: pb.Tensor, n: int, field: str) -> NDArray[Any]:
        """The column of n rows in a message: a read-only view, unless it had to be cast."""
        if (
            self.is_plain
            and tensor.dtype == self._data_type
            and tensor.shape == [n, *self._shape_list]
        ):
            data = tensor.data
            if len(data) == n * self.row_bytes:
                return np.ndarray((n, *self.shape), self.dtype, data)
        array = tensor_from_proto(tensor, field + self.suffix)
        self._check_rows(array.shape, n, field)
        if array.dtype != self.dtype:
            array = self._cast(array, field, False)
        return array

    # -- columns to values

    def value(self, columns: Columns, row: int) -> Any:
        """One value of the space; the caller's to keep."""
        return self.own(columns[self.path][row])

    def reader(self, offsets: Iterator[int]) -> Reader:
        """What finds one value, as plain columns have it, in bytes from the next offset on."""
        own, shape, dtype, offset = self.own, self.shape, self.dtype, next(offsets)
        return lambda data: own(np.ndarray(shape, dtype, data, offset))

    def sure_reader(self, offset: int) -> Reader:
        """As ``reader``, but None comes of a value that has a fault, or may have one."""
        own, is_sure, shape, dtype = self.own, self.is_sure, self.shape, self.dtype

        def read(data: bytes) -> Any:
            row: NDArray[Any] = np.ndarray(shape, dtype, data, offset)
            return own(row) if is_sure(row) else None

        return read

    def plain(self, value: Any) -> Buffer | None:
        """One value as it lies in messages, where ``is_plain``; it may share the value's memory.

        None: it is for ``collect``, and may be no value at all.
        """
        if (
            type(value) is np.ndarray
            and value.dtype == self.dtype
            and value.shape == self.shape
            and value.flags.c_contiguous
        ):
            return value.data
        return None

    def own(self, row: NDArray[Any]) -> Any:
        """The value in a row of a column; the caller's to keep."""
        return np.array(row)

    def batched_value(self, columns: Columns) -> Any:
        """All values as a gymnasium vector env would give them; the caller's to keep."""
        return np.array(columns[self.path])

    def is_sure(self, column: NDArray[Any]) -> bool:
        """Whether ``find_faults`` finds none there, or in a single row, as far as a glance tells."""
        return not column.size

    def find_faults(self, column: NDArray[Any], field: str, faults: dict[int, Fault]) -> None:
        """Add a fault for each row that cannot be learnt from and has none yet."""

    def find_outside(self, column: NDArray[Any], field: str, faults: dict[int, Fault]) -> None:
        """Add a fault for each row outside the bounds of a Box that has none yet."""

    # -- faults

    def note(
        self,
        bad: NDArray[np.bool_],
        column: NDArray[Any],
        field: str,
        faults: dict[int, Fault],
        reason: Reason,
        expected: str | tuple[NDArray[Any], NDArray[Any]],
    ) -> None:
        """One fault for each row with a bad element, naming the first such element.

        Args:
            bad: ``[N, *shape]``.
            column: ``[N, *shape]``.
            field: Path to the batch.
            faults: By row; rows that are there stay as they are.
            reason: Of all of them.
            expected: In words, or lowest and highest value, each of shape ``shape``.
        """
        for row in np.flatnonzero(bad.reshape(len(bad), -1).any(axis=1)).tolist():
            if row in faults:
                continue
            at = tuple(np.argwhere(bad[row])[0].tolist())
            if isinstance(expected, str):
                wanted = expected
            else:
                wanted = f"{expected[0][at].item()} to {expected[1][at].item()}"
            where = f" at {list(at)}" if at else ""
            message = f"expected {wanted}{where}, got {column[row][at].item()}"
            faults[row] = self.fault(reason, message, field)

    def _wanted(self) -> str:
        return f"{self.dtype} {self._shape_list}"

    def fault(self, reason: Reason, message: str, field: str) -> Fault:
        """A fault of this leaf within the batch at that path."""
        return Fault(reason, message, field + self.suffix)

    def _check_rows(self, shape: tuple[int, ...], n: int, field: str) -> None:
        if shape == (n, *self.shape):
            return
        if shape[1:] == self.shape and shape:
            raise self.wrong_rows(shape[0], n, field)
        if shape[:1] == (n,):
            raise self._wrong_shape(shape[1:], field)
        raise self.fault(
            Reason.SPACE_MISMATCH,
            f"expected {[n, *self.shape]}, got {list(shape)}. The first dimension counts rows.",
            field,
        )

    def wrong_rows(self, got: int, n: int, field: str) -> Fault:
        """There are not n of them."""
        return self.fault(
            Reason.SPACE_MISMATCH, f"expected {n} rows, got {got}. Send one value per row.", field
        )

    def _wrong_shape(self, got: tuple[int, ...], field: str) -> Fault:
        return self.fault(
            Reason.SPACE_MISMATCH,
            f"expected {self._shape_list}, got {list(got)}. Reshape it to what the space says.",
            field,
        )

    def _cast(self, array: NDArray[Any], field: str, by_value: bool) -> NDArray[Any]:
        """That array in this leaf's dtype.

        Args:
            array: Of another dtype.
            field: Path to the batch.
            by_value: Its dtype means nothing: integers may be narrowed if they fit.
        """
        source, target = array.dtype, self.dtype
        if np.can_cast(source, target, "safe"):
            return array.astype(target)
        if target.kind == "f" and source.kind in "iuf":
            # What is beyond the range becomes infinite, and so a fault of its own row.
            with np.errstate(over="ignore", invalid="ignore"):
                return array.astype(target)
        if by_value or self.counts:
            if array.size == 0:
                return array.astype(target)
            if source.kind in "iu":
                low, high = (0, 1) if target.kind == "b" else _integers_of(target)
                least, most = int(array.min()), int(array.max())
                if low <= least and most <= high:
                    return array.astype(target)
                raise self.fault(
                    Reason.SPACE_MISMATCH,
                    f"expected {low} to {high} ({target}), got "
                    f"{least if least < low else most} ({source})",
                    field,
                )
        raise self.fault(
            Reason.SPACE_MISMATCH,
            f"expected {target} {self._shape_list}, got {source} {self._shape_list}. That cast may "
            "lose information: convert before sending, or change the space.",
            field,
        )


def unsupported_space(space: Any, suffix: str) -> Fault:
    """The fault of a space that the contract does not have."""
    return Fault(
        Reason.SPACE_MISMATCH,
        "expected Box, Discrete, MultiDiscrete, MultiBinary, Text, Dict or Tuple, got "
        f"{type(space).__name__}. Wrap the environment so that its spaces are made of those.",
        f"space{suffix}",
    )


def _integers_of(dtype: np.dtype[Any]) -> tuple[int, int]:
    limits = np.iinfo(dtype)
    return int(limits.min), int(limits.max)


def kind_of(value: Any) -> str:
    """What something unexpected is, in a few words."""
    if value is None:
        return "None"
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    return f"{type(value).__name__} {value!r:.60}"
