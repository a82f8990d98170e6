"""``SpaceCodec``: values of a space as columns, and columns as ``Batch`` messages.

*Columns* hold N values leaf by leaf. Both sides work on columns and make single values only at the
application's door. Immutable once built; any thread.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, TypeAlias

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.faults import Fault, Reason
from client_sdk.wire.leaves import Leaf, LeafSpec, child_suffix, leaf_of

__all__ = ["Columns", "LeafSpec", "SpaceCodec"]

Columns: TypeAlias = dict[str, NDArray[Any]]
"""N values of a space: ``[N, *shape]`` for each leaf, by the leaf's path."""


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
        self._tree = _tree_of(space, (), "")
        self._leaves: dict[str, Leaf] = {}
        self._tree.register(self._leaves)
        self.paths: tuple[str, ...] = tuple(self._leaves)
        # Most spaces are a single leaf, and then the dictionaries have one known key.
        self._only = self._tree.leaf if isinstance(self._tree, _LeafNode) else None

    def leaf(self, path: str) -> LeafSpec:
        """What the leaf of that path looks like."""
        return self._leaves[path].spec

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
        only = self._only
        if only is not None:
            only.encode(columns[""], leaves[""])
            return
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
        return _wrong_keys("leaf", self._leaves, leaves, field)


class _LeafNode:
    """The end of a branch."""

    def __init__(self, leaf: Leaf) -> None:
        self.leaf = leaf
        self._path = leaf.path
        self.collect = leaf.collect
        self.collect_batch = leaf.collect_batch

    def register(self, leaves: dict[str, Leaf]) -> None:
        leaves[self._path] = self.leaf

    def value(self, columns: Columns, row: int) -> Any:
        return self.leaf.value(columns[self._path], row)

    def batched_value(self, columns: Columns) -> Any:
        return self.leaf.batched_value(columns[self._path])


class _DictNode:
    def __init__(self, children: dict[str, _Tree], suffix: str) -> None:
        self._children = children
        self._suffix = suffix

    def register(self, leaves: dict[str, Leaf]) -> None:
        for child in self._children.values():
            child.register(leaves)

    def _check(self, value: Any, field: str) -> None:
        if not isinstance(value, Mapping):
            raise Fault(
                Reason.SPACE_MISMATCH,
                f"expected a dict with {_listed(self._children)}, got {type(value).__name__}",
                field + self._suffix,
            )
        if value.keys() != self._children.keys():
            raise _wrong_keys("key", self._children, value, field + self._suffix)

    def collect(self, value: Any, field: str, columns: Columns) -> None:
        self._check(value, field)
        for key, child in self._children.items():
            child.collect(value[key], field, columns)

    def collect_batch(self, values: Any, n: int, field: str, columns: Columns) -> None:
        if _is_list_of_values(values):
            _collect_list(self, values, n, field, self._suffix, columns)
            return
        self._check(values, field)
        for key, child in self._children.items():
            child.collect_batch(values[key], n, field, columns)

    def value(self, columns: Columns, row: int) -> Any:
        return {key: child.value(columns, row) for key, child in self._children.items()}

    def batched_value(self, columns: Columns) -> Any:
        return {key: child.batched_value(columns) for key, child in self._children.items()}


class _TupleNode:
    def __init__(self, children: tuple[_Tree, ...], suffix: str) -> None:
        self._children = children
        self._suffix = suffix

    def register(self, leaves: dict[str, Leaf]) -> None:
        for child in self._children:
            child.register(leaves)

    def _check(self, value: Any, field: str) -> None:
        if not isinstance(value, tuple | list):
            got = type(value).__name__
        elif len(value) != len(self._children):
            got = str(len(value))
        else:
            return
        raise Fault(
            Reason.SPACE_MISMATCH,
            f"expected a tuple of {len(self._children)}, got {got}",
            field + self._suffix,
        )

    def collect(self, value: Any, field: str, columns: Columns) -> None:
        self._check(value, field)
        for child, part in zip(self._children, value, strict=True):
            child.collect(part, field, columns)

    def collect_batch(self, values: Any, n: int, field: str, columns: Columns) -> None:
        if _is_list_of_values(values):
            _collect_list(self, values, n, field, self._suffix, columns)
            return
        self._check(values, field)
        for child, part in zip(self._children, values, strict=True):
            child.collect_batch(part, n, field, columns)

    def value(self, columns: Columns, row: int) -> Any:
        return tuple(child.value(columns, row) for child in self._children)

    def batched_value(self, columns: Columns) -> Any:
        return tuple(child.batched_value(columns) for child in self._children)


_Tree: TypeAlias = _LeafNode | _DictNode | _TupleNode


def _tree_of(space: gym.Space[Any], parts: tuple[str, ...], suffix: str) -> _Tree:
    if isinstance(space, spaces.Dict):
        for key in space.spaces:
            if not isinstance(key, str):
                raise Fault(
                    Reason.SPACE_MISMATCH,
                    f"expected strings as keys, got {key!r} ({type(key).__name__})",
                    f"space{suffix}",
                )
        return _DictNode(
            {
                key: _tree_of(child, (*parts, key), suffix + child_suffix(key))
                for key, child in space.spaces.items()
            },
            suffix,
        )
    if isinstance(space, spaces.Tuple):
        return _TupleNode(
            tuple(
                _tree_of(child, (*parts, str(index)), suffix + child_suffix(index))
                for index, child in enumerate(space.spaces)
            ),
            suffix,
        )
    return _LeafNode(leaf_of(space, parts, suffix))


def _is_list_of_values(values: Any) -> bool:
    return isinstance(values, list) or (isinstance(values, np.ndarray) and values.dtype == object)


def _collect_list(
    node: _DictNode | _TupleNode, values: Any, n: int, field: str, suffix: str, columns: Columns
) -> None:
    """Add the columns of n single values of a composite space."""
    if len(values) != n:
        raise Fault(
            Reason.SPACE_MISMATCH,
            f"expected {n} rows, got {len(values)}. Send one value per row.",
            field + suffix,
        )
    rows: list[Columns] = []
    for index, value in enumerate(values):
        row: Columns = {}
        node.collect(value, f"{field}[{index}]", row)
        rows.append(row)
    leaves: dict[str, Leaf] = {}
    node.register(leaves)
    for path, leaf in leaves.items():
        columns[path] = (
            np.concatenate([row[path] for row in rows])
            if rows
            else np.zeros((0, *leaf.shape), leaf.dtype)
        )


def _wrong_keys(
    noun: str, expected: Mapping[str, Any], got: Mapping[Any, Any], field: str
) -> Fault:
    missing = [key for key in expected if key not in got]
    # A peer may send any number of keys, of any length: look no further than is told.
    extra = itertools.islice((key for key in got if key not in expected), 3)
    said = [f"missing {noun} {key!r}" for key in missing[:3]]
    said += [f"unknown {noun} {key!r:.80}" for key in extra]
    return Fault(
        Reason.SPACE_MISMATCH, f"{'; '.join(said)}. Expected exactly {_listed(expected)}.", field
    )


def _listed(keys: Mapping[str, Any], limit: int = 20) -> str:
    names = [repr(key) for key in keys]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "nothing") + more
