"""Spaces written down as JSON, for simulators that no Python environment describes.

Owns the format of ``policy-server train --spaces FILE``; docs/cli.md shows it. No threads.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces


class SpaceFileError(ValueError):
    """A file that does not describe spaces; the message says where and what was expected."""


def read_spaces(path: str | Path) -> tuple[gymnasium.Space[Any], gymnasium.Space[Any]]:
    """The observation space and the action space that a file describes.

    Args:
        path: A JSON object with the keys ``observation_space`` and ``action_space``.

    Raises:
        SpaceFileError: The file cannot be read, or is not such a description.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SpaceFileError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise SpaceFileError(f"{path}: not JSON: {error}") from error
    expected = {"observation_space", "action_space"}
    if not isinstance(content, dict) or set(content) != expected:
        raise SpaceFileError(
            f"{path}: expected an object with the keys observation_space and action_space, "
            f"got {_short(content)}"
        )
    try:
        observation_space = space_from_json(content["observation_space"], "observation_space")
        action_space = space_from_json(content["action_space"], "action_space")
    except SpaceFileError as error:
        raise SpaceFileError(f"{path}: {error}") from error
    return observation_space, action_space


def space_from_json(value: object, where: str = "space") -> gymnasium.Space[Any]:
    """One space from its JSON form, such as ``{"type": "Discrete", "n": 4}``.

    Args:
        value: What ``json.loads`` gave.
        where: Path to it, for messages.

    Raises:
        SpaceFileError: Not a space; the message names the path.
    """
    if not isinstance(value, dict) or value.get("type") not in _KINDS:
        raise SpaceFileError(
            f'{where}: expected an object whose "type" is one of {", ".join(_KINDS)}, '
            f"got {_short(value)}"
        )
    required, optional, build = _KINDS[value["type"]]
    given = set(value) - {"type"}
    if missing := sorted(required - given):
        raise SpaceFileError(f'{where}: a {value["type"]} needs "{missing[0]}"')
    if unknown := sorted(given - required - optional):
        raise SpaceFileError(
            f'{where}: a {value["type"]} has no "{unknown[0]}"; '
            f"known: {', '.join(sorted(required | optional))}"
        )
    try:
        return build(value, where)
    except SpaceFileError:
        raise
    # Gymnasium checks its arguments with asserts, too.
    except (ValueError, TypeError, AssertionError, OverflowError) as error:
        raise SpaceFileError(f"{where}: not a {value['type']}: {error}") from error


def _box(value: dict[str, Any], where: str) -> gymnasium.Space[Any]:
    dtype = np.dtype(value.get("dtype", "float32"))
    if dtype.kind not in "fiu":
        raise SpaceFileError(f"{where}.dtype: expected a float or integer type, got {dtype.name}")
    low, high = (_bound(value[key], dtype) for key in ("low", "high"))
    shape = tuple(value["shape"]) if "shape" in value else np.broadcast(low, high).shape
    return spaces.Box(
        low=np.broadcast_to(low, shape).copy(),
        high=np.broadcast_to(high, shape).copy(),
        shape=shape,
        dtype=dtype.type,
    )


def _bound(value: object, dtype: np.dtype[Any]) -> np.ndarray[Any, np.dtype[Any]]:
    """Numbers, or the words "-inf" and "inf", which JSON has no numbers for."""
    return np.asarray(value, dtype=np.float64 if dtype.kind == "f" else dtype).astype(dtype)


def _dict(value: dict[str, Any], where: str) -> gymnasium.Space[Any]:
    if not isinstance(value["spaces"], dict):
        raise SpaceFileError(f"{where}.spaces: expected an object, got {_short(value['spaces'])}")
    return spaces.Dict(
        {key: space_from_json(inner, f'{where}["{key}"]') for key, inner in value["spaces"].items()}
    )


def _tuple(value: dict[str, Any], where: str) -> gymnasium.Space[Any]:
    if not isinstance(value["spaces"], list):
        raise SpaceFileError(f"{where}.spaces: expected a list, got {_short(value['spaces'])}")
    return spaces.Tuple(
        [space_from_json(inner, f"{where}[{i}]") for i, inner in enumerate(value["spaces"])]
    )


def _discrete(value: dict[str, Any], _where: str) -> gymnasium.Space[Any]:
    return spaces.Discrete(value["n"], start=value.get("start", 0))


def _multi_discrete(value: dict[str, Any], _where: str) -> gymnasium.Space[Any]:
    return spaces.MultiDiscrete(value["nvec"], start=value.get("start"))


def _multi_binary(value: dict[str, Any], _where: str) -> gymnasium.Space[Any]:
    return spaces.MultiBinary(value["n"])


def _text(value: dict[str, Any], _where: str) -> gymnasium.Space[Any]:
    options = {key: value[key] for key in ("min_length", "charset") if key in value}
    return spaces.Text(value["max_length"], **options)


_Builder = Callable[[dict[str, Any], str], gymnasium.Space[Any]]

_KINDS: dict[str, tuple[set[str], set[str], _Builder]] = {
    "Box": ({"low", "high"}, {"shape", "dtype"}, _box),
    "Discrete": ({"n"}, {"start"}, _discrete),
    "MultiDiscrete": ({"nvec"}, {"start"}, _multi_discrete),
    "MultiBinary": ({"n"}, set(), _multi_binary),
    "Dict": ({"spaces"}, set(), _dict),
    "Tuple": ({"spaces"}, set(), _tuple),
    "Text": ({"max_length"}, {"min_length", "charset"}, _text),
}
"""By type: required keys, optional keys, builder."""


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
