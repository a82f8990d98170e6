"""From the options of ``policy-server train`` to RLlib's configuration. No threads, no side effects.

Ray is imported by the functions that need it, so that ``--help`` and bad options stay quick.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np

from client_sdk.wire.faults import Fault
from client_sdk.wire.spaces import space_to_proto
from policy_server.commands.space_files import SpaceFileError, read_spaces
from policy_server.config import ENV_CONFIG_KEY, PolicyServerConfig

if TYPE_CHECKING:
    from ray.rllib.algorithms.algorithm_config import AlgorithmConfig

logger = logging.getLogger(__name__)

ALGORITHMS = ("PPO", "DQN", "SAC")
"""What ``--algo`` offers; any other of RLlib's comes with ``--config``."""

_CLASSES = {
    "PPO": ("ray.rllib.algorithms.ppo", "PPOConfig"),
    "DQN": ("ray.rllib.algorithms.dqn", "DQNConfig"),
    "SAC": ("ray.rllib.algorithms.sac", "SACConfig"),
}
_RL_MODULE_KEY = "model_config"
_METHODS = ("training", "env_runners", "reporting", "learners")
"""Of AlgorithmConfig; ``--set`` takes their arguments."""
_NOT_SETTINGS = {"self", "kwargs", "env_runner_cls", "num_env_runners"}


class OptionError(ValueError):
    """An option that makes no sense; the message is one line for the person who gave it."""


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """What ``policy-server train`` was asked for."""

    algo: str | None = None
    """Name of the algorithm; None with ``config``."""
    env: str | None = None
    """Gymnasium id whose spaces are meant; the environment itself runs elsewhere."""
    spaces: str | None = None
    """JSON file of the spaces."""
    config: str | None = None
    """``package.module:attribute`` of an AlgorithmConfig, or of a function that returns one."""
    server: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of PolicyServerConfig that were given."""
    settings: tuple[tuple[str, Any], ...] = ()
    """Of AlgorithmConfig by name: hyperparameters, and ``model_config`` for the network."""
    num_env_runners: int | None = None
    """None: 1, or what ``config`` says."""
    seed: int | None = None
    """Of weights and learner."""
    stop_return: float | None = None
    """Mean return to stop at."""
    stop_iters: int | None = None
    """Iterations to stop after, resumed ones included."""
    stop_steps: int | None = None
    """Env steps to stop after, resumed ones included."""
    checkpoint_dir: Path | None = None
    """Where checkpoints go; None: nowhere."""
    checkpoint_every: int = 5
    """Iterations between two of them."""
    keep_checkpoints: int = 3
    """How many stay."""
    resume: bool = False
    """Continue from the latest of them."""
    plot: Path | None = None
    """Where the learning curve goes; None: beside the checkpoints, if there are any."""
    quiet: bool = False
    """No progress."""

    @property
    def title(self) -> str:
        """What is trained, in a few words."""
        if self.config is not None:
            return self.config
        return f"{self.algo} on {self.env or self.spaces}"

    @property
    def picture(self) -> Path | None:
        """Where the learning curve goes."""
        if self.plot is None and self.checkpoint_dir is not None:
            return self.checkpoint_dir / "learning_curve.png"
        return self.plot


def build_config(options: TrainOptions) -> AlgorithmConfig:
    """RLlib's configuration of the training that was asked for.

    Raises:
        OptionError: One of the options does not fit; the message names it.
    """
    from policy_server.env_runner import PolicyServerEnvRunner

    config = _load(options.config) if options.config is not None else _plain(options)
    given_env_config = dict(config.env_config)
    server = server_config(options, given_env_config)
    if server.address_file is not None:
        directory = Path(server.address_file).absolute().parent
        if not (directory.is_dir() and os.access(directory, os.W_OK)):
            raise OptionError(f"argument --address-file: cannot write into {directory}")
    runners = options.num_env_runners
    if runners is None:
        runners = config.num_env_runners if options.config is not None else 1
    config.environment(
        env_config={**given_env_config, ENV_CONFIG_KEY: server.to_env_config()[ENV_CONFIG_KEY]}
    )
    config.env_runners(env_runner_cls=PolicyServerEnvRunner, num_env_runners=runners)
    if options.seed is not None:
        config.debugging(seed=options.seed)
    for key, value in options.settings:
        _apply(config, key, value)
    return config


def server_config(
    options: TrainOptions, env_config: Mapping[str, Any] | None = None
) -> PolicyServerConfig:
    """The policy server's part: what the options say, over what the ``env_config`` says.

    Raises:
        OptionError: The two together make no sense, such as an open port without a token.
    """
    try:
        inside = PolicyServerConfig.from_env_config(dict(env_config or {}))
        return dataclasses.replace(inside, **options.server)
    except (TypeError, ValueError) as error:
        raise OptionError(_one_line(error)) from error


def server_config_of(config: AlgorithmConfig) -> PolicyServerConfig:
    """The policy server's part of it."""
    return PolicyServerConfig.from_env_config(config.env_config)


def _plain(options: TrainOptions) -> AlgorithmConfig:
    if options.env is not None:
        observation_space, action_space = _spaces_of_env(options.env)
    elif options.spaces is not None:
        try:
            observation_space, action_space = read_spaces(options.spaces)
        except SpaceFileError as error:
            raise OptionError(f"argument --spaces: {error}") from error
    else:
        raise OptionError("one of the arguments --env --spaces --config is required")
    if options.algo == "DQN" and not isinstance(action_space, gymnasium.spaces.Discrete):
        raise OptionError(
            f"argument --algo: DQN chooses one of n actions (Discrete), not from {action_space}; "
            "PPO does, and SAC from a Box"
        )
    module, name = _CLASSES[options.algo or "PPO"]
    config: AlgorithmConfig = getattr(importlib.import_module(module), name)()
    if options.algo == "SAC":
        _tune_sac(config, runners=1 if options.num_env_runners is None else options.num_env_runners)
    if not _read_as_it_is(observation_space):
        unreadable = _unreadable(observation_space, "observation_space")
        if unreadable is not None:
            option = "--env" if options.env is not None else "--spaces"
            raise OptionError(
                f"argument {option}: RLlib's FlattenObservations cannot read {unreadable}: let "
                "choices count from 0, or bring a connector that reads it with --config"
            )
        config.env_runners(env_to_module_connector=_flatten)
    return config.environment(observation_space=observation_space, action_space=action_space)


def _tune_sac(config: AlgorithmConfig, *, runners: int) -> None:
    """RLlib's values for Pendulum; those of its SACConfig learn slowly.

    Only steps come in fragments here, so that not each costs a round of Ray's. They are paid back
    with one update each.
    """
    batch = 256
    config.training(
        actor_lr=2e-4,
        critic_lr=8e-4,
        alpha_lr=9e-4,
        initial_alpha=1.001,
        n_step=(2, 5),
        train_batch_size_per_learner=batch,
        # RLlib takes it as if there were one runner more.
        training_intensity=batch / (runners + 1),
        num_steps_sampled_before_learning_starts=batch,
        # With each update. Any more would be counted in steps, which stand still while a fragment
        # is paid back: its first update alone would move the targets.
        target_network_update_freq=0,
        replay_buffer_config={
            "type": "PrioritizedEpisodeReplayBuffer",
            "capacity": 100_000,
            "alpha": 1.0,
            "beta": 0.0,
        },
    )
    config.env_runners(rollout_fragment_length=16)
    config.rl_module(
        model_config={
            "fcnet_hiddens": [256, 256],
            "fcnet_activation": "relu",
            "fcnet_kernel_initializer": "xavier_uniform_",
            # Of the critics, which must reach returns far from 0: not with tangents.
            "fusionnet_hiddens": [256, 256, 256],
            "fusionnet_activation": "relu",
        }
    )


def _read_as_it_is(space: gymnasium.Space[Any]) -> bool:
    """Whether RLlib has a default network for it: vectors of floats, and images.

    Images of bytes as well, though it cannot read them: an error that says so is better than one
    vector of all their pixels.
    """
    if not isinstance(space, gymnasium.spaces.Box):
        return False
    return len(space.shape) == 3 or (len(space.shape) == 1 and space.low.dtype.kind == "f")


def _unreadable(space: gymnasium.Space[Any], where: str) -> str | None:
    """The first leaf that RLlib cannot flatten; it would fail at the first action."""
    spaces = gymnasium.spaces
    if isinstance(space, spaces.Dict | spaces.Tuple):
        parts = space.items() if isinstance(space, spaces.Dict) else enumerate(space)
        found = (_unreadable(part, f"{where}[{json.dumps(key)}]") for key, part in parts)
        return next((leaf for leaf in found if leaf is not None), None)
    if isinstance(space, spaces.Discrete):
        readable = (
            int(space.start) <= 0
        )  # RLlib takes the value as an index, and -1 is the last one
    elif isinstance(space, spaces.MultiDiscrete):
        readable = space.nvec.ndim == 1 and not np.any(np.greater(space.start, 0))
    else:
        readable = not isinstance(space, spaces.Text)
    return None if readable else f"{where}: {space}"


def _flatten(*_: Any) -> Any:
    """RLlib's connector that makes one vector of dicts, tuples and discrete values."""
    from ray.rllib.connectors.env_to_module import FlattenObservations

    return FlattenObservations()


def _spaces_of_env(env: str) -> tuple[gymnasium.Space[Any], gymnasium.Space[Any]]:
    try:
        with gymnasium.make(env) as made:
            spaces = {"observation": made.observation_space, "action": made.action_space}
    except (gymnasium.error.Error, ImportError) as error:
        raise OptionError(f"argument --env: {_one_line(error)}") from error
    for name, space in spaces.items():
        try:
            space_to_proto(space)
        except Fault as fault:  # no client could send such values
            raise OptionError(f"argument --env: {name} {fault.field}: {fault.message}") from fault
    return spaces["observation"], spaces["action"]


def _load(path: str) -> AlgorithmConfig:
    """The configuration that a dotted path leads to; modules beside the caller are found too."""
    from ray.rllib.algorithms.algorithm_config import AlgorithmConfig

    module_name, colon, attribute = path.partition(":")
    if not colon or not attribute:
        raise OptionError(f"argument --config: expected package.module:attribute, got {path!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except ImportError as error:
        raise OptionError(f"argument --config: cannot import {module_name}: {error}") from error
    except AttributeError as error:
        raise OptionError(f"argument --config: {module_name} has no {attribute!r}") from error
    try:
        value = found() if callable(found) and not isinstance(found, AlgorithmConfig) else found
    except Exception as error:
        logger.debug("argument --config: %s()", path, exc_info=error)
        raise OptionError(
            f"argument --config: {path}() raised {type(error).__name__}: {_one_line(error)} "
            "(--debug shows more)"
        ) from error
    if not isinstance(value, AlgorithmConfig):
        raise OptionError(
            f"argument --config: expected an AlgorithmConfig or a function that returns one, "
            f"{path} gives {type(value).__name__}"
        )
    if value.action_space is None and value.env is None:
        raise OptionError(f"argument --config: {path} sets neither spaces nor an environment")
    return value.copy(copy_frozen=False)


def _apply(config: AlgorithmConfig, key: str, value: Any) -> None:
    if key == _RL_MODULE_KEY:
        config.rl_module(model_config=value)
        return
    methods = _settings(config)
    if key not in methods:
        close = difflib.get_close_matches(key, [*methods, _RL_MODULE_KEY], n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise OptionError(f"argument --set: {type(config).__name__} has no setting {key!r}{hint}")
    try:
        getattr(config, methods[key])(**{key: value})
    except (TypeError, ValueError) as error:
        raise OptionError(f"argument --set: {key}: {_one_line(error)}") from error


def _settings(config: AlgorithmConfig) -> dict[str, str]:
    """What can be set, and by which method of the config."""
    found: dict[str, str] = {}
    for method in _METHODS:
        for kind in type(config).__mro__:
            if method in vars(kind):
                for name in inspect.signature(vars(kind)[method]).parameters:
                    found.setdefault(name, method)
    return {name: method for name, method in found.items() if name not in _NOT_SETTINGS}


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
