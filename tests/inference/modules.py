"""RLModules and pipelines straight from algorithm configurations: no Ray, no environment."""

from __future__ import annotations

import dataclasses
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.env import INPUT_ENV_SINGLE_SPACES, INPUT_ENV_SPACES

from policy_server.experience import RowContext
from policy_server.inference import PolicyFactory, build_factory

# As in a runner: more threads only wait for each other here.
torch.set_num_threads(1)

CARTPOLE = gym.spaces.Box(
    np.array([-4.8, -np.inf, -0.4, -np.inf], np.float32),
    np.array([4.8, np.inf, 0.4, np.inf], np.float32),
)


@dataclasses.dataclass
class Built:
    """What an env runner holds of one module."""

    config: Any
    observation_space: gym.Space[Any]
    action_space: gym.Space[Any]
    module: Any
    env_to_module: Any
    module_to_env: Any

    def factory(self, worker_index: int = 0) -> PolicyFactory:
        return build_factory(
            self.config,
            self.module,
            self.observation_space,
            self.action_space,
            self.env_to_module,
            self.module_to_env,
            worker_index=worker_index,
        )


def build(
    config: Any,
    observation_space: gym.Space[Any] = CARTPOLE,
    action_space: gym.Space[Any] | None = None,
    *connectors: Any,
    seed: int = 1,
) -> Built:
    """Build everything as RLlib's own env runner does."""
    action_space = gym.spaces.Discrete(2) if action_space is None else action_space
    config = config.environment(observation_space=observation_space, action_space=action_space)
    if connectors:
        config = config.env_runners(
            env_to_module_connector=lambda env, spaces, device: [each() for each in connectors]
        )
    torch.manual_seed(seed)
    pair = (observation_space, action_space)
    spaces = {INPUT_ENV_SPACES: pair, INPUT_ENV_SINGLE_SPACES: pair}
    env_to_module = config.build_env_to_module_connector(spaces=spaces)
    spaces[DEFAULT_MODULE_ID] = (env_to_module.observation_space, action_space)
    module = config.get_rl_module_spec(spaces=spaces, inference_only=True).build()
    with torch.no_grad():
        for parameter in module.parameters():
            # RLlib's heads begin near zero; far from it a difference shows.
            parameter.add_(torch.randn_like(parameter) * 0.3)
    module_to_env = config.build_module_to_env_connector(spaces=spaces)
    return Built(config, observation_space, action_space, module, env_to_module, module_to_env)


def contexts(n: int) -> list[RowContext]:
    return [RowContext() for _ in range(n)]


def flags(n: int, *, greedy: bool) -> np.ndarray[Any, Any]:
    return np.full(n, greedy)
