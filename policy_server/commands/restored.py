"""A policy as a checkpoint of RLlib's holds it: module, connectors, counters; no Algorithm, no Ray.

Main thread of a command. Checkpoints hold pickles: reading one runs what is in it.
"""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any, Final

import gymnasium as gym
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core import (
    COMPONENT_ENV_RUNNER,
    COMPONENT_ENV_TO_MODULE_CONNECTOR,
    COMPONENT_LEARNER,
    COMPONENT_LEARNER_GROUP,
    COMPONENT_RL_MODULE,
    DEFAULT_MODULE_ID,
)
from ray.rllib.core.rl_module.rl_module import RLModule
from ray.rllib.env import INPUT_ENV_SINGLE_SPACES, INPUT_ENV_SPACES
from ray.rllib.utils.metrics import NUM_ENV_STEPS_SAMPLED_LIFETIME, WEIGHTS_SEQ_NO

from policy_server.commands.checkpoints import LATEST
from policy_server.learner_view import use_exact_filters

_MARK: Final = "rllib_checkpoint.json"
_CONSTRUCTION: Final = "class_and_ctor_args.pkl"
_STATE: Final = "state.pkl"


class CheckpointError(ValueError):
    """Not a checkpoint that can be read; the message is one line that names it."""


@dataclasses.dataclass(frozen=True)
class RestoredPolicy:
    """What is left of a training."""

    config: AlgorithmConfig
    module: RLModule
    """With its trained weights."""
    env_to_module: Any
    """With the filters' statistics."""
    module_to_env: Any
    observation_space: gym.Space[Any]
    """Of the application's observations."""
    action_space: gym.Space[Any]
    """Of the actions that it executes."""
    version: int
    """RLlib's weights sequence number."""
    env_steps: int
    """How far training had come; exploration schedules depend on it."""


def restore(path: Path) -> RestoredPolicy:
    """Read the policy of a checkpoint.

    Args:
        path: Of an Algorithm's checkpoint, or a directory of them with a ``latest``.

    Raises:
        CheckpointError: There is none, it is damaged, or it has more than one policy.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory")
    if not (path / _MARK).is_file() and (path / LATEST).is_dir():
        path /= LATEST
    modules = path / COMPONENT_LEARNER_GROUP / COMPONENT_LEARNER / COMPONENT_RL_MODULE
    if not (path / _MARK).is_file() or not modules.is_dir():
        raise CheckpointError(f"{path} is no checkpoint of an RLlib Algorithm")
    policies = sorted(each.name for each in modules.iterdir() if each.is_dir())
    if policies != [DEFAULT_MODULE_ID]:
        raise CheckpointError(
            f"{path}: expected the one policy {DEFAULT_MODULE_ID!r}, found {', '.join(policies)}"
        )
    try:
        return _restore(path.absolute(), modules.absolute() / DEFAULT_MODULE_ID)
    except Exception as error:  # whatever unpickling and constructors raise
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(f"cannot read {path}: {said}") from error


def _restore(path: Path, module_path: Path) -> RestoredPolicy:
    (state,), _ = _unpickle(path / _CONSTRUCTION)["ctor_args_and_kwargs"]
    config = AlgorithmConfig.from_state(state)
    runner = path / COMPONENT_ENV_RUNNER
    # The spaces are written down there, so that no environment need be made.
    connectors = runner / COMPONENT_ENV_TO_MODULE_CONNECTOR
    pair = _unpickle(connectors / _CONSTRUCTION)["ctor_args_and_kwargs"][0]
    observation_space, action_space = pair
    spaces = {INPUT_ENV_SPACES: pair, INPUT_ENV_SINGLE_SPACES: pair}
    env_to_module = use_exact_filters(
        config.build_env_to_module_connector(spaces=spaces), reports=False
    )
    env_to_module.restore_from_path(connectors)
    return RestoredPolicy(
        config=config,
        module=RLModule.from_checkpoint(module_path),
        env_to_module=env_to_module,
        module_to_env=config.build_module_to_env_connector(spaces=spaces),
        observation_space=observation_space,
        action_space=action_space,
        version=int(_unpickle(module_path.parents[1] / _STATE).get(WEIGHTS_SEQ_NO, 0)),
        env_steps=int(_unpickle(runner / _STATE).get(NUM_ENV_STEPS_SAMPLED_LIFETIME, 0)),
    )


def _unpickle(path: Path) -> Any:
    with path.open("rb") as file:
        return pickle.load(file)  # noqa: S301 - the form of RLlib's checkpoints
