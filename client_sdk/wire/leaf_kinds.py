"""What the values of each kind of leaf mean: finite, counted, or text.

``leaf_of`` picks the kind for a gymnasium space. Immutable; any thread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from client_sdk.wire.faults import Fault, Reason
from client_sdk.wire.leaves import (
    Buffer,
    Columns,
    Leaf,
    LeafSpec,
    child_path,
    kind_of,
    unsupported_space,
)

_FEW_ELEMENTS: Final = 8
"""Up to here Python's own sum is the cheapest exact test for NaN and infinity ..."""

_BLAS_ELEMENTS: Final = 4096
"""... and up to here a dot product."""

FLOAT32_MAX: Final = float(np.finfo(np.float32).max)
"""Learners compute in float32: what is beyond becomes infinite there."""


class BoxLeaf(Leaf):
    """Numbers within bounds. Observations may leave them; NaN and infinity are faults.

    So is what float32, in which policies compute, does not hold.
    """

    def __init__(self, spec: LeafSpec, suffix: str) -> None:
        super().__init__(spec, suffix)
        self._low, self._high = spec.space.low, spec.space.high  # type: ignore[attr-defined]
        self._is_float = spec.dtype.kind == "f"
        self._has_blas = spec.dtype.kind == "f" and spec.dtype.itemsize >= 4
        self._is_wide = spec.dtype.kind == "f" and spec.dtype.itemsize > 4
        # Of a sum of squares, each of which it bounds.
        self._sure_below = FLOAT32_MAX if self._is_wide else math.inf

    def is_sure(self, column: NDArray[Any]) -> bool:
        """See ``Leaf``: a number that is not finite spoils any sum."""
        if not self._is_float:
            return True
        if column.size <= _FEW_ELEMENTS and not self._is_wide:
            return math.isfinite(sum(column.ravel().tolist()))
        return (
            self._has_blas
            and column.size <= _BLAS_ELEMENTS
            and bool(np.vdot(column, column) < self._sure_below)
        )

    def find_faults(self, column: NDArray[Any], field: str, faults: dict[int, Fault]) -> None:
        """See ``Leaf``: NaN and infinity."""
        if not self.is_sure(column):  # it may be mere overflow
            finite = np.abs(column) <= FLOAT32_MAX if self._is_wide else np.isfinite(column)
            if not finite.all():
                expected = (
                    "a number that is finite in float32" if self._is_wide else "a finite number"
                )
                self.note(~finite, column, field, faults, Reason.NOT_FINITE, expected)

    def find_outside(self, column: NDArray[Any], field: str, faults: dict[int, Fault]) -> None:
        """See ``Leaf``."""
        outside = (column < self._low) | (column > self._high)
        if outside.any():
            limits = (self._low, self._high)
            self.note(outside, column, field, faults, Reason.SPACE_MISMATCH, limits)


class CountingLeaf(Leaf):
    """Integers from ``low`` to ``high``, both included, elementwise; anything else is a fault."""

    counts = True

    def __init__(
        self, spec: LeafSpec, suffix: str, low: NDArray[np.integer], high: NDArray[np.integer]
    ) -> None:
        super().__init__(spec, suffix)
        self._low, self._high = low.astype(spec.dtype), high.astype(spec.dtype)
        self._unsigned = np.dtype(f"u{spec.dtype.itemsize}")
        # high - low without overflow: modulo 2**bits, read as unsigned.
        spans = (self._high.reshape(-1) - self._low.reshape(-1)).view(self._unsigned)
        self._span = spans.reshape(spec.shape)
        self._one_span = int(self._span.flat[0]) if _uniform(self._span) else None
        self._from_zero = not self._low.any()

    def is_sure(self, column: NDArray[Any]) -> bool:
        """See ``Leaf``."""
        if not column.size:
            return True
        offset = self._offset_of(column)
        if self._one_span is not None:
            return bool(np.maximum.reduce(offset, axis=None) <= self._one_span)
        return bool((offset <= self._span).all())

    def _offset_of(self, column: NDArray[Any]) -> NDArray[Any]:
        """From low: what is below wraps around to far above the span, one comparison for both."""
        return (column if self._from_zero else column - self._low).view(self._unsigned)

    def find_faults(self, column: NDArray[Any], field: str, faults: dict[int, Fault]) -> None:
        """See ``Leaf``: anything that is not in the space."""
        if not self.is_sure(column):
            outside = self._offset_of(column) > self._span
            limits = (self._low, self._high)
            self.note(outside, column, field, faults, Reason.SPACE_MISMATCH, limits)


class DiscreteLeaf(CountingLeaf):
    """One integer. Its column is int64 whatever the space's own dtype is."""

    def __init__(self, spec: LeafSpec, suffix: str) -> None:
        space = spec.space
        start, n = int(space.start), int(space.n)  # type: ignore[attr-defined]
        super().__init__(spec, suffix, np.asarray(start), np.asarray(start + n - 1))
        self._own_dtype = np.dtype(space.dtype)
        self._own_type: Any = self._own_dtype.type if self._own_dtype != spec.dtype else None
        self._first, self._last = start, start + n - 1

    def own(self, row: NDArray[Any]) -> Any:
        """A numpy integer, as the space's ``sample()`` gives."""
        return row[()] if self._own_type is None else self._own_type(row)

    def plain(self, value: Any) -> Buffer | None:
        """See ``Leaf``."""
        if type(value) is np.int64:
            return value.tobytes()
        if type(value) is int and self._first <= value <= self._last:
            return value.to_bytes(8, "little", signed=True)
        return super().plain(value)

    def is_sure(self, column: NDArray[Any]) -> bool:
        """See ``Leaf``."""
        if column.size == 1:  # numpy would take longer
            return bool(self._first <= column.item() <= self._last)
        return super().is_sure(column)

    def batched_value(self, columns: Columns) -> Any:
        """[N], of the space's own dtype."""
        return columns[self.path].astype(self._own_dtype)


class TextLeaf(Leaf):
    """A string: code points, then -1 up to the space's ``max_length``."""

    def __init__(self, spec: LeafSpec, suffix: str) -> None:
        super().__init__(spec, suffix)
        self._space: spaces.Text = spec.space  # type: ignore[assignment]
        self._code_points = np.array(sorted(map(ord, self._space.character_set)), np.int32)

    def sure_columns(self, _value: Any) -> Columns | None:
        """None: strings are no arrays."""
        return None

    def collect(self, value: Any, field: str, columns: Columns) -> None:
        """See ``Leaf``."""
        columns[self.path] = self._row_of(value, field)[None]

    def collect_batch(self, values: Any, n: int, field: str, columns: Columns) -> None:
        """See ``Leaf``."""
        if isinstance(values, str) or not hasattr(values, "__len__"):
            raise self.fault(
                Reason.SPACE_MISMATCH, f"expected {n} strings, got {kind_of(values)}", field
            )
        if len(values) != n:
            raise self.wrong_rows(len(values), n, field)
        column = np.empty((n, *self.shape), self.dtype)
        for index, value in enumerate(values):
            column[index] = self._row_of(value, f"{field}[{index}]")
        columns[self.path] = column

    def _row_of(self, value: Any, field: str) -> NDArray[Any]:
        limit = self._space.max_length
        if not isinstance(value, str):
            raise self.fault(
                Reason.SPACE_MISMATCH, f"expected a string, got {kind_of(value)}", field
            )
        if len(value) > limit:
            raise self.fault(
                Reason.SPACE_MISMATCH,
                f"expected at most {limit} characters, got {len(value)}",
                field,
            )
        row = np.full(limit, -1, self.dtype)
        row[: len(value)] = [ord(character) for character in value]
        return row

    def plain(self, _value: Any) -> None:
        """See ``Leaf``: a string never lies so."""
        return

    def own(self, row: NDArray[Any]) -> Any:
        """A string."""
        points = row.tolist()
        return "".join(map(chr, points[: points.index(-1)] if -1 in points else points))

    def batched_value(self, columns: Columns) -> Any:
        """A tuple of N strings."""
        return tuple(self.value(columns, row) for row in range(len(columns[self.path])))

    def find_faults(self, column: NDArray[Any], field: str, faults: dict[int, Fault]) -> None:
        """See ``Leaf``: too short, or a character of another charset."""
        used = column != -1
        lengths = used.sum(axis=1)
        for row in range(len(column)):
            if row in faults:
                continue
            points, length = column[row], int(lengths[row])
            if not used[row, :length].all():
                message = "expected code points, then -1 to the end, got -1 in between"
            elif length < self._space.min_length:
                message = f"expected at least {self._space.min_length} characters, got {length}"
            elif not (known := np.isin(points[:length], self._code_points)).all():
                stranger = int(points[:length][~known][0])
                message = f"expected characters of the space's charset, got code point {stranger}"
            else:
                continue
            faults[row] = self.fault(Reason.SPACE_MISMATCH, message, field)


def leaf_of(space: gym.Space[Any], parts: Sequence[str], suffix: str) -> Leaf:
    """The leaf for a space at that place.

    Raises:
        Fault: SPACE_MISMATCH; the contract has no such space or dtype.
    """
    path = child_path(parts)

    def spec(dtype: Any, shape: Sequence[int]) -> LeafSpec:
        return LeafSpec(path, np.dtype(dtype).newbyteorder("="), tuple(shape), space)

    try:
        if isinstance(space, spaces.Box):
            return BoxLeaf(spec(space.dtype, space.shape), suffix)
        if isinstance(space, spaces.Discrete):
            return DiscreteLeaf(spec(np.int64, ()), suffix)
        if isinstance(space, spaces.MultiDiscrete):
            highest = space.start + (space.nvec - 1)
            return CountingLeaf(spec(space.dtype, space.shape), suffix, space.start, highest)
        if isinstance(space, spaces.MultiBinary):
            zeros = np.zeros(space.shape, np.int8)
            return CountingLeaf(spec(np.int8, space.shape), suffix, zeros, zeros + np.int8(1))
        if isinstance(space, spaces.Text):
            return TextLeaf(spec(np.int32, (space.max_length,)), suffix)
    except Fault as fault:
        raise Fault(fault.reason, fault.message, f"space{suffix}") from None
    raise unsupported_space(space, suffix)


def _uniform(array: NDArray[Any]) -> bool:
    return array.size > 0 and bool((array == array.flat[0]).all())
