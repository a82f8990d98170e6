"""Every kind of space that the contract has, for tests that enumerate them."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from client_sdk.wire.tensors import DTYPES


def _boxes() -> dict[str, gym.Space[Any]]:
    found: dict[str, gym.Space[Any]] = {}
    for dtype in DTYPES.values():
        found[f"box {dtype}"] = spaces.Box(0, 1, (2, 3), dtype.type)
        if dtype.kind in "iu":
            limits = np.iinfo(dtype)
            low, high = np.array([limits.min, 0]), np.array([0, min(limits.max, 2**63 - 2)])
            found[f"box {dtype}, whole range"] = spaces.Box(
                low.astype(dtype), high.astype(dtype), dtype=dtype.type
            )
        if dtype.kind == "f":
            found[f"box {dtype}, unbounded"] = spaces.Box(-np.inf, np.inf, (3,), dtype.type)
            found[f"box {dtype}, mixed bounds"] = spaces.Box(
                np.array([-1, -np.inf, 0], dtype), np.array([1, 0, np.inf], dtype), dtype=dtype.type
            )
    return found


SPACES: dict[str, gym.Space[Any]] = {
    **_boxes(),
    "box without dimensions": spaces.Box(-1, 1, ()),
    "box without elements": spaces.Box(-1, 1, (0, 3)),
    "image": spaces.Box(0, 255, (8, 8, 3), np.uint8),
    "discrete": spaces.Discrete(4),
    "discrete from below zero": spaces.Discrete(5, start=-2),
    "discrete, far away": spaces.Discrete(2, start=2**62),
    "multi discrete": spaces.MultiDiscrete([3, 2, 5]),
    "multi discrete, all alike": spaces.MultiDiscrete([3, 3]),
    "multi discrete of two dimensions": spaces.MultiDiscrete([[2, 3], [4, 5]]),
    "multi discrete with start": spaces.MultiDiscrete([3, 4], start=[-1, 10]),
    "multi discrete int32": spaces.MultiDiscrete([3, 4], dtype=np.int32),
    "multi discrete uint8": spaces.MultiDiscrete([3, 255], dtype=np.uint8, start=[0, 1]),
    "multi discrete int8, whole range": spaces.MultiDiscrete([127], dtype=np.int8, start=[-64]),
    "multi binary": spaces.MultiBinary(4),
    "multi binary of two dimensions": spaces.MultiBinary([2, 3]),
    "text": spaces.Text(6),
    "text, may be empty": spaces.Text(3, min_length=0, charset="ab"),
    "text of any script": spaces.Text(4, charset="aé漢🙂"),
    "dict": spaces.Dict(
        camera=spaces.Box(0, 255, (4, 4, 3), np.uint8), speed=spaces.Box(-1, 1, (1,))
    ),
    "dict with awkward keys": spaces.Dict(
        {
            "": spaces.Discrete(2),
            "a/b": spaces.Discrete(3),
            "a~b": spaces.Discrete(4),
            "a~1b": spaces.Discrete(5),
            'quoted "key"': spaces.Discrete(6),
            "schlüssel": spaces.Discrete(7),
            "a": spaces.Dict(b=spaces.Discrete(8)),
            "0": spaces.Discrete(9),
        }
    ),
    "tuple": spaces.Tuple([spaces.Discrete(3), spaces.Box(-1, 1, (2,))]),
    "nested": spaces.Dict(
        inner=spaces.Dict(
            tuple=spaces.Tuple(
                [
                    spaces.Discrete(3),
                    spaces.Dict(deep=spaces.Box(-1, 1, (2, 2), np.float64)),
                    spaces.Tuple([spaces.MultiBinary(2), spaces.Text(3)]),
                ]
            )
        ),
        outer=spaces.Box(-1, 1, (3,)),
    ),
    "dict with an empty dict": spaces.Dict(empty=spaces.Dict(), full=spaces.Discrete(2)),
    "empty dict": spaces.Dict(),
    "empty tuple": spaces.Tuple([]),
}
"""By a name for the test's id."""
