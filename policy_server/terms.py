"""On what terms clients act here: what the spaces and the algorithm ask for.

Beside ``PolicyServerConfig``, which says what the operator admits. Immutable; any thread.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import gymnasium as gym


@dataclasses.dataclass(frozen=True)
class Terms:
    """What everyone who checks, answers or holds back a client has to know."""

    observation_space: gym.Space[Any]
    """Of the application's observations, before any connector."""
    action_space: gym.Space[Any]
    """Of the actions that the application executes."""
    hold: bool
    """Actions for training episodes wait while nobody asks for experience."""
    logged_actions_need_logp: bool
    """The algorithm corrects for the behaviour's log-density."""
    normalize_actions: bool = True
    """RLlib's setting of that name."""
    remote_only: str | None = None
    """Why clients cannot act alone; None: the policies have ONNX files."""
    steps_per_upload: int = 100
    """How many steps clients that act alone send at a time."""
