"""The spaces of an env runner without envs. Actor thread only."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.env import INPUT_ENV_SINGLE_SPACES
from ray.rllib.env.env_context import EnvContext
from ray.tune.registry import ENV_CREATOR, _global_registry

from policy_server.config import ENV_CONFIG_KEY


def spaces_of(
    config: AlgorithmConfig, known: dict[str, Any] | None
) -> tuple[gym.Space[Any], gym.Space[Any]]:
    """From the config, from another runner, or from the env that the config names.

    Args:
        config: Of the algorithm.
        known: What another runner's ``get_spaces`` gave, if RLlib passed it on.

    Returns:
        Of the application's observations, and of the actions that it executes.

    Raises:
        ValueError: Nobody knows them.
    """
    if config.observation_space is not None and config.action_space is not None:
        return config.observation_space, config.action_space
    if known and INPUT_ENV_SINGLE_SPACES in known:
        observation_space, action_space = known[INPUT_ENV_SINGLE_SPACES]
        return observation_space, action_space
    if config.env is None:
        raise ValueError(
            "no spaces: set environment(observation_space=..., action_space=...), or env= to a "
            "Gymnasium id with the same spaces as the simulators have"
        )
    env = _make_env(config)
    try:
        return env.observation_space, env.action_space
    finally:
        env.close()


def _make_env(config: AlgorithmConfig) -> Any:
    env_config = {key: value for key, value in config.env_config.items() if key != ENV_CONFIG_KEY}
    if isinstance(config.env, str) and not _global_registry.contains(ENV_CREATOR, config.env):
        return gym.make(config.env, **env_config)
    creator = (
        _global_registry.get(ENV_CREATOR, config.env) if isinstance(config.env, str) else config.env
    )
    return creator(EnvContext(env_config, worker_index=0))
