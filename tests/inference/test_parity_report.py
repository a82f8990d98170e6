"""How a policy file is compared with RLlib's module, as ``policy-server export`` does it."""

from __future__ import annotations

from typing import Any, cast

import gymnasium as gym
import numpy as np
import torch
from kinds import ppo
from modules import build
from ray.rllib.connectors.env_to_module import FlattenObservations

from policy_server.onnx_engine.check import TOLERANCE
from policy_server.onnx_engine.factory import OnnxEnginePolicy
from policy_server.onnx_engine.parity import Parity, measure


def compared(observations: gym.Space[Any], change: float = 0.0) -> Parity:
    """The file of a module, and that module with one of its weights changed afterwards."""
    built = build(ppo(), observations, gym.spaces.Discrete(6), FlattenObservations)
    policy = cast("OnnxEnginePolicy", built.factory().build(1, 0, cast("Any", None)))
    with torch.no_grad():
        *_, bias = built.module.pi.parameters()
        bias[0] += change
    return measure(
        policy.onnx,
        built.module,
        built.env_to_module,
        built.module_to_env,
        observations,
        built.action_space,
    )


def test_a_change_of_one_weight_is_noticed() -> None:
    small = gym.spaces.Box(-1.0, 1.0, (3,))
    assert compared(small).passes
    assert not compared(small, change=1e-3).passes


def test_what_rllib_itself_rounds_away_is_no_difference() -> None:
    """Large sums of large numbers: no two ways to add them up agree in single precision."""
    pixels = gym.spaces.Box(0, 255, (40, 40), np.uint8)
    parity = compared(pixels)
    assert parity.inputs_difference > TOLERANCE
    assert parity.passes
    assert not compared(pixels, change=0.1).passes
