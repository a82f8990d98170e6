"""Python dicts as ``Struct`` messages and back: infos, options, keyword arguments, metadata.

A Struct holds what JSON does: its only number is the double. Pure functions; any thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from google.protobuf import struct_pb2

_MAX_DEPTH: Final = 32
"""Of dicts and lists inside each other; protobuf's parsers stop at 100 messages."""


class Unsendable(ValueError):
    """A value that a Struct cannot hold; the message says which and where."""


def fill_struct(struct: struct_pb2.Struct, values: Mapping[Any, Any]) -> None:
    """Write a dict into an empty message. Integers become doubles, arrays and tuples lists.

    Raises:
        Unsendable: A key is no string, a value nothing of the kind, or an integer not the double
            that it becomes.
    """
    _fill_struct(struct, values, "", 0, exact=True)


def fill_struct_leniently(struct: struct_pb2.Struct, values: Mapping[Any, Any]) -> list[str]:
    """Likewise, but round integers where a double must, and leave out what cannot be sent.

    Returns:
        What was left out and why, one sentence each.
    """
    left_out: list[str] = []
    fields = struct.fields
    for key, value in values.items():
        try:
            _check_key(key, "")
            _fill_value(fields[key], value, repr(key), 0, exact=False)
        except Unsendable as error:
            if isinstance(key, str):
                del fields[key]
            left_out.append(str(error))
    return left_out


def dict_of_struct(struct: struct_pb2.Struct, *, whole_numbers: bool = False) -> dict[str, Any]:
    """The dict in a message.

    Args:
        struct: From anyone.
        whole_numbers: Doubles without a fraction become ints, as most settings once were.
    """
    return {
        key: _value_of(value, whole_numbers=whole_numbers) for key, value in struct.fields.items()
    }


def _fill_struct(
    struct: struct_pb2.Struct, values: Mapping[Any, Any], where: str, depth: int, *, exact: bool
) -> None:
    if not isinstance(values, Mapping):
        raise Unsendable(f"expected a dict, got {type(values).__name__}")
    struct.SetInParent()
    for key, value in values.items():
        _check_key(key, where)
        path = f"{where}[{key!r}]" if where else repr(key)
        _fill_value(struct.fields[key], value, path, depth, exact=exact)


def _fill_value(
    target: struct_pb2.Value, value: Any, where: str, depth: int, *, exact: bool
) -> None:
    if depth > _MAX_DEPTH:
        raise Unsendable(f"{where}: expected at most {_MAX_DEPTH} dicts or lists inside each other")
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if value is None:
        target.null_value = struct_pb2.NULL_VALUE
    elif isinstance(value, bool):
        target.bool_value = value
    elif isinstance(value, int | float):
        try:
            target.number_value = value
        except OverflowError:
            raise Unsendable(f"{where}: expected a number within a double's range") from None
        if exact and isinstance(value, int) and target.number_value != value:
            raise Unsendable(
                f"{where}: expected a number that a double holds, got {value}. Send it as a string"
            )
    elif isinstance(value, str):
        try:
            target.string_value = value
        except ValueError:  # a lone surrogate
            raise Unsendable(f"{where}: expected a string that UTF-8 can hold") from None
    elif isinstance(value, Mapping):
        _fill_struct(target.struct_value, value, where, depth + 1, exact=exact)
    elif isinstance(value, list | tuple):
        items = target.list_value
        items.SetInParent()
        for index, item in enumerate(value):
            _fill_value(items.values.add(), item, f"{where}[{index}]", depth + 1, exact=exact)
    else:
        raise Unsendable(
            f"{where}: expected a number, a string, a bool, None, or lists and dicts of them, got "
            f"{type(value).__name__}"
        )


def _check_key(key: Any, where: str) -> None:
    if not isinstance(key, str):
        raise Unsendable(f"{where or 'keys'}: expected a string as key, got {key!r:.60}")
    try:
        key.encode()
    except UnicodeEncodeError:
        raise Unsendable(f"{where or 'keys'}: expected a key that UTF-8 can hold") from None


def _value_of(value: struct_pb2.Value, *, whole_numbers: bool) -> Any:
    kind = value.WhichOneof("kind")
    if kind == "number_value":
        number = value.number_value
        return int(number) if whole_numbers and number.is_integer() else number
    if kind == "struct_value":
        return dict_of_struct(value.struct_value, whole_numbers=whole_numbers)
    if kind == "list_value":
        return [_value_of(each, whole_numbers=whole_numbers) for each in value.list_value.values]
    if kind in {"bool_value", "string_value"}:
        return getattr(value, kind)
    return None
