"""How values of nested spaces come apart into leaves, and together again.

A tree mirrors its space: Dict and Tuple inside, a ``Leaf`` at each end. Immutable; any thread.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from client_sdk.wire.faults import Fault, Reason
from client_sdk.wire.leaf_kinds import leaf_of
from client_sdk.wire.leaves import Columns, Leaf, Reader, child_suffix


class Tree(Protocol):
    """A space with whatever is inside it. ``SpaceCodec`` tells what each method promises."""

    def leaves(self) -> Iterator[Leaf]:
        """All of them, in the space's order."""
        ...

    def sure_columns(self, value: Any) -> Columns | None:
        """The columns of one value, if a glance tells that there is no fault in it."""
        ...

    def collect(self, value: Any, field: str, columns: Columns) -> None:
        """Add the columns of one value."""
        ...

    def collect_batch(self, values: Any, n: int, field: str, columns: Columns) -> None:
        """Add the columns of n values."""
        ...

    def value(self, columns: Columns, row: int) -> Any:
        """One value of the space."""
        ...

    def reader(self, offsets: Iterator[int]) -> Reader:
        """What finds one value in bytes; takes as many offsets as there are leaves."""
        ...

    def batched_value(self, columns: Columns) -> Any:
        """All values as a gymnasium vector env would give them."""
        ...


class _DictNode:
    def __init__(self, children: dict[str, Tree], suffix: str) -> None:
        self._children = children
        self._suffix = suffix

    def leaves(self) -> Iterator[Leaf]:
        for child in self._children.values():
            yield from child.leaves()

    def _check(self, value: Any, field: str) -> None:
        if not isinstance(value, Mapping):
            raise Fault(
                Reason.SPACE_MISMATCH,
                f"expected a dict with {_listed(self._children)}, got {type(value).__name__}",
                field + self._suffix,
            )
        if value.keys() != self._children.keys():
            raise wrong_keys("key", self._children, value, field + self._suffix)

    def sure_columns(self, _value: Any) -> Columns | None:
        return None  # it takes more than a glance

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

    def reader(self, offsets: Iterator[int]) -> Reader:
        readers = [(key, child.reader(offsets)) for key, child in self._children.items()]
        return lambda data: {key: read(data) for key, read in readers}

    def batched_value(self, columns: Columns) -> Any:
        return {key: child.batched_value(columns) for key, child in self._children.items()}


class _TupleNode:
    def __init__(self, children: tuple[Tree, ...], suffix: str) -> None:
        self._children = children
        self._suffix = suffix

    def leaves(self) -> Iterator[Leaf]:
        for child in self._children:
            yield from child.leaves()

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

    def sure_columns(self, _value: Any) -> Columns | None:
        return None  # it takes more than a glance

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

    def reader(self, offsets: Iterator[int]) -> Reader:
        readers = [child.reader(offsets) for child in self._children]
        return lambda data: tuple(read(data) for read in readers)

    def batched_value(self, columns: Columns) -> Any:
        return tuple(child.batched_value(columns) for child in self._children)


def tree_of(space: gym.Space[Any], parts: tuple[str, ...] = (), suffix: str = "") -> Tree:
    """The tree of a space.

    Args:
        space: At the place that the others tell.
        parts: The keys and indices that lead there.
        suffix: The same as it is written in ``Fault.field``.

    Raises:
        Fault: SPACE_MISMATCH; the contract has no such space or dtype.
    """
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
                key: tree_of(child, (*parts, key), suffix + child_suffix(key))
                for key, child in space.spaces.items()
            },
            suffix,
        )
    if isinstance(space, spaces.Tuple):
        return _TupleNode(
            tuple(
                tree_of(child, (*parts, str(index)), suffix + child_suffix(index))
                for index, child in enumerate(space.spaces)
            ),
            suffix,
        )
    return leaf_of(space, parts, suffix)


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
    for leaf in node.leaves():
        columns[leaf.path] = (
            np.concatenate([row[leaf.path] for row in rows])
            if rows
            else np.zeros((0, *leaf.shape), leaf.dtype)
        )


def wrong_keys(noun: str, expected: Mapping[str, Any], got: Mapping[Any, Any], field: str) -> Fault:
    """The fault of keys that are not those expected; it names the first few."""
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
