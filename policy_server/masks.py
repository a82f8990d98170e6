"""Action masks in observations, where RLlib's convention is followed. Loop thread only."""

from __future__ import annotations

from typing import Any

import gymnasium as gym

from client_sdk.wire.faults import Fault, Reason

_MASK = "action_mask"
"""Key under which RLlib's action masking modules look for the mask."""


def mask_path(observation_space: gym.Space[Any], action_space: gym.Space[Any]) -> str | None:
    """The leaf that says which actions are allowed, where RLlib's convention is followed."""
    if not isinstance(observation_space, gym.spaces.Dict):
        return None
    mask = observation_space.spaces.get(_MASK)
    if not isinstance(action_space, gym.spaces.Discrete) or mask is None:
        return None
    return _MASK if mask.shape == (int(action_space.n),) else None


def nothing_allowed(field: str) -> Fault:
    """A mask leaves no action."""
    return Fault(
        Reason.SPACE_MISMATCH,
        "expected at least one action that is allowed, got none; end the episode where there is "
        "nothing left to do",
        field,
    )
