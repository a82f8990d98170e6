"""``SpaceCodec``: values of a space as columns, and columns as ``Batch`` messages.

*Columns* hold N values leaf by leaf. Both sides work on columns and make single values only at the
application's door. Immutable once built; any thread.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np

from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.faults import Fault
from client_sdk.wire.leaves import Buffer, Columns, Leaf, LeafSpec, Reader
from client_sdk.wire.trees import tree_of, wrong_keys

__all__ = ["Buffer", "Columns", "LeafSpec", "Reader", "SpaceCodec"]


class SpaceCodec:
    """Everything that happens to values of one space between an application and the wire.

    Build it once per space::

        codec = SpaceCodec(env.observation_space)
        columns = codec.columns_of(observation)
        codec.encode(columns, rows.observations)          # ... sent, received:
        columns = codec.decode(rows.observations, n, "observations")
        faults = codec.row_faults(columns, "observations")
        observation = codec.value(columns, 0)

    Attributes:
        space: The gymnasium space.
        paths: Its leaves, in the space's order; the keys of ``Columns``.

    Raises:
        Fault: SPACE_MISMATCH; the contract has no such space or dtype.
    """

    def __init__(self, space: gym.Space[Any]) -> None:
        self.space = space
        self._tree = tree_of(space)
        self._leaves = {leaf.path: leaf for leaf in self._tree.leaves()}
        self.paths: tuple[str, ...] = tuple(self._leaves)

    def leaf(self, path: str) -> LeafSpec:
        """What the leaf of that path looks like."""
        return self._leaves[path].spec

    def sure_columns(self, value: Any) -> Columns | None:
        """As ``columns_of``, of a value in which ``row_faults`` finds nothing: if a glance tells so.

        None: look closer. Most observations are single arrays and not looked at again.
        """
        return self._tree.sure_columns(value)

    def columns_of(self, value: Any, field: str = "observation") -> Columns:
        """One value of the space as columns of N = 1.

        Args:
            value: Arrays, numbers, strings, lists of numbers; mappings and sequences of them.
            field: What it is called in a fault.

        Returns:
            Columns that may share memory with ``value``: encode them before it changes.

        Raises:
            Fault: SPACE_MISMATCH; keys, a shape or a dtype is not the space's. Ranges and NaN are
                for ``row_faults``.
        """
        columns: Columns = {}
        self._tree.collect(value, field, columns)
        return columns

    def columns_of_batch(self, values: Any, n: int, field: str = "observations") -> Columns:
        """Many values of the space as columns.

        Args:
            values: As a gymnasium vector env gives them (an array ``[n, ...]``, dicts and tuples
                of arrays), or a list of n values.
            n: How many there must be.
            field: What they are called in a fault.

        Returns:
            Columns that may share memory with ``values``: encode them before those change.

        Raises:
            Fault: SPACE_MISMATCH; as in ``columns_of``, or there are not n.
        """
        columns: Columns = {}
        self._tree.collect_batch(values, n, field, columns)
        return columns

    def encode(self, columns: Columns, batch: pb.Batch) -> None:
        """Write columns into an empty message.

        Raises:
            Fault: SPACE_MISMATCH; a column has another shape or dtype than its leaf.
        """
        leaves = batch.leaves
        for path, leaf in self._leaves.items():
            leaf.encode(columns[path], leaves[path])

    def decode(self, batch: pb.Batch, n: int, field: str) -> Columns:
        """The columns in a message: read-only views of its bytes where the dtype is the leaf's.

        Args:
            batch: From anyone; nothing about it is taken for granted.
            n: How many rows there must be.
            field: Path to it, for the fault.

        Raises:
            Fault: MALFORMED_TENSOR, a tensor contradicts itself; SPACE_MISMATCH, a leaf is missing,
                unknown, or of another shape or dtype.
        """
        leaves = batch.leaves
        if len(leaves) != len(self._leaves):
            raise self._wrong_leaves(leaves, field)
        columns: Columns = {}
        for path, leaf in self._leaves.items():
            tensor = leaves.get(path)
            if tensor is None:
                raise self._wrong_leaves(leaves, field)
            columns[path] = leaf.decode(tensor, n, field)
        return columns

    @property
    def is_plain(self) -> bool:
        """Whether columns lie in messages as they lie in memory, and any bytes are values."""
        return all(leaf.is_plain for leaf in self._leaves.values())

    def byte_sizes(self, n: int) -> list[int]:
        """Of the columns of n rows, in the order of ``paths``."""
        return [n * leaf.row_bytes for leaf in self._leaves.values()]

    def buffers(self, columns: Columns) -> list[memoryview]:
        """Plain columns as they lie in messages, in the order of ``paths``: views if possible."""
        return [np.ascontiguousarray(columns[path]).data for path in self.paths]

    def columns_in(self, offsets: Sequence[int], n: int) -> Callable[[bytes], Columns]:
        """What finds plain columns of n rows in bytes where they begin at those offsets.

        The columns are read-only views of the bytes.
        """
        places = [
            (leaf.path, (n, *leaf.shape), leaf.dtype, offset)
            for leaf, offset in zip(self._leaves.values(), offsets, strict=True)
        ]
        if len(places) == 1:  # as nearly always
            ((path, shape, dtype, offset),) = places
            return lambda data: {path: np.ndarray(shape, dtype, data, offset)}
        return lambda data: {
            path: np.ndarray(shape, dtype, data, offset) for path, shape, dtype, offset in places
        }

    def specimens(self, n: int) -> Iterator[Columns]:
        """Plain columns of n rows, all of whose bits are 0; then for each leaf, its own are 1.

        Messages of them differ where the leaf's bytes are: see ``FixedLayout``.
        """
        sizes = self.byte_sizes(n)
        *offsets, end = 0, *itertools.accumulate(sizes)
        columns_in = self.columns_in(offsets, n)
        zeros = bytes(end)
        yield columns_in(zeros)
        for offset, size in zip(offsets, sizes, strict=True):
            yield columns_in(zeros[:offset] + b"\xff" * size + zeros[offset + size :])

    def reader(self, offsets: Sequence[int]) -> Reader:
        """What finds one value in bytes whose plain columns of one row begin at those offsets."""
        return self._tree.reader(iter(offsets))

    @property
    def sole_leaf(self) -> Leaf | None:
        """The leaf that the space is; None: it has leaves inside it."""
        return self._tree if isinstance(self._tree, Leaf) else None

    def row_faults(self, columns: Columns, field: str, bounds: bool = False) -> dict[int, Fault]:
        """The rows that are no values of the space, with the first fault of each.

        Args:
            columns: Of this codec.
            field: Path to the batch, for the faults.
            bounds: Whether leaving a Box is a fault too. Observations may, actions must not.

        Returns:
            NOT_FINITE or SPACE_MISMATCH by row; empty when all is well.
        """
        faults: dict[int, Fault] = {}
        for path, leaf in self._leaves.items():
            leaf.find_faults(columns[path], field, faults)
            if bounds:
                leaf.find_outside(columns[path], field, faults)
        return faults

    def value(self, columns: Columns, row: int) -> Any:
        """One value of the space; its arrays are the caller's to keep."""
        return self._tree.value(columns, row)

    def batched_value(self, columns: Columns) -> Any:
        """All values as a gymnasium vector env gives them; the arrays are the caller's to keep."""
        return self._tree.batched_value(columns)

    def zeros(self, n: int) -> Columns:
        """Columns of n rows of zeros, whether or not the space contains zero."""
        return {path: np.zeros((n, *leaf.shape), leaf.dtype) for path, leaf in self._leaves.items()}

    def _wrong_leaves(self, leaves: Mapping[str, pb.Tensor], field: str) -> Fault:
        fault = wrong_keys("leaf", self._leaves, leaves, field)
        cure = 'Keys are JSON pointers without the first slash; "" where the space is a leaf.'
        return Fault(fault.reason, f"{fault.message} {cure}", field)
