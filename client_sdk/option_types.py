"""Numbers on a command line: what each must be, and one line that says so where it is not.

For argparse, as the ``type`` of an option. And the parser itself, which both commands share.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from typing import Any, NoReturn

EXIT_USAGE = 2


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """End the process with that message."""
        self.exit(EXIT_USAGE, f"{self.prog}: {message} (see {self.prog} --help)\n")


def whole_number(low: int, high: int | None = None) -> Callable[[str], int]:
    """Takes whole numbers from ``low`` to ``high``, both included."""
    expected = f"a whole number from {low} " + ("up" if high is None else f"to {high}")

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise _refused(expected, text) from None
        if value < low or (high is not None and value > high):
            raise _refused(expected, text)
        return value

    return parse


def number(low: float, high: float) -> Callable[[str], float]:
    """Takes numbers from ``low`` to ``high``, both included."""
    expected = f"a number from {low:g} to {high:g}"
    return lambda text: _parsed(text, lambda value: low <= value <= high, expected)


def finite_number(text: str) -> float:
    """Takes any number but NaN and infinity."""
    return _parsed(text, math.isfinite, "a finite number")


def positive_seconds(text: str) -> float:
    """Takes a time."""
    return _parsed(text, lambda value: 0 < value < math.inf, "a positive number of seconds")


def seconds_from_zero(text: str) -> float:
    """Takes a time, or none."""
    return _parsed(text, lambda value: 0 <= value < math.inf, "a number of seconds from 0 up")


def json_object(text: str) -> dict[str, Any]:
    """Takes a JSON object."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a JSON object: {error}") from None
    if not isinstance(value, dict):
        raise _refused("a JSON object", text)
    return value


def _parsed(text: str, fits: Callable[[float], bool], expected: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise _refused(expected, text) from None
    if not fits(value):  # NaN never does
        raise _refused(expected, text)
    return value


def _refused(expected: str, text: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
