"""Structs of columns: an array, or dicts and tuples of them, as a space of dicts and tuples has it.

Pure functions; any thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def map_struct(function: Callable[..., Any], *structs: Any) -> Any:
    """What a function makes of the arrays in each place of structs that are alike, as a struct.

    ``tree.map_structure`` knows many more kinds of structs. For the single array that most
    observations and actions are, it costs more than what is done to it.
    """
    first = structs[0]
    if isinstance(first, dict):
        return {key: map_struct(function, *[struct[key] for struct in structs]) for key in first}
    if isinstance(first, tuple):
        return tuple([map_struct(function, *place) for place in zip(*structs, strict=True)])
    return function(*structs)
