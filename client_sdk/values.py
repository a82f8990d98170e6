"""What the application gives beside observations and actions, checked at its door.

What is refused here was never noted, so the episode goes on; refused by the server, it would be sent
again with every row. Pure; any thread.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import numpy as np

from client_sdk.errors import InvalidValueError, NotFiniteError
from client_sdk.wire import MAX_METRIC_NAME
from client_sdk.wire.leaf_kinds import FLOAT32_MAX


def check_type(value: Any, kinds: type | tuple[type, ...], expected: str, field: str) -> None:
    """Refuse an argument of another type; its value, which may be a secret, is not shown.

    Raises:
        InvalidValueError: It is none of these.
    """
    if not isinstance(value, kinds):
        raise InvalidValueError(f"expected {expected}, got {type(value).__name__}", field=field)


def is_number(value: Any) -> bool:
    """Whether it is a real number: to Python True is one, to whoever wrote it hardly."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_whole(value: Any) -> bool:
    """Whether it is a number without a fraction by its type."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def numbers_of_info(info: Mapping[Any, Any] | None) -> dict[str, float]:
    """What of an ``info`` can be reported beside the return: its numbers, by name.

    Raises:
        InvalidValueError: It is no mapping, or a name is none that can be sent.
        NotFiniteError: A number is NaN or infinite, and would spoil every mean.
    """
    if info is None:
        return {}
    if not isinstance(info, Mapping):
        raise InvalidValueError(f"expected a dict, got {type(info).__name__}", field="info")
    numbers: dict[str, float] = {}
    for name, value in info.items():
        if isinstance(value, np.ndarray) and value.ndim == 0:
            value = value.item()  # noqa: PLW2901
        if not isinstance(value, Real | np.bool_):
            continue
        text = sendable_text(name, "info")
        if len(text) > MAX_METRIC_NAME:
            raise InvalidValueError(
                f"expected names of at most {MAX_METRIC_NAME} characters, got one of {len(text)} "
                f"that begins with {text[:32]!r}",
                field="info",
            )
        number = _as_float(value)
        if not math.isfinite(number):
            raise NotFiniteError(f"expected a finite number, got {number}", field=f"info[{name!r}]")
        numbers[text] = number
    return numbers


def finite_number(value: Any, field: str) -> float:
    """A number that is finite to the learner as well, which computes in float32.

    Raises:
        NotFiniteError: It is not.
        InvalidValueError: It is no number.
    """
    try:
        number = _as_float(value)
    except (TypeError, ValueError):
        raise InvalidValueError(
            f"expected a number, got {type(value).__name__}", field=field
        ) from None
    if not abs(number) <= FLOAT32_MAX:  # so is NaN
        raise not_finite(number, field)
    return number


def sendable_text(value: Any, field: str) -> str:
    """A name as text that fits into a message.

    Raises:
        InvalidValueError: It has lone surrogates, as names of files may have.
    """
    text = str(value)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InvalidValueError(
                f"expected text that can be encoded as UTF-8, got {text[:64]!r}", field=field
            ) from None
    return text


def _as_float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:  # a whole number beyond any float
        return math.inf


def not_finite(value: float, field: str) -> NotFiniteError:
    """The refusal of a number."""
    return NotFiniteError(f"expected a number that is finite in float32, got {value}", field=field)
