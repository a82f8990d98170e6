"""From options to RLlib's configuration."""

import json
import re

import gymnasium
import numpy as np
import pytest
import torch
from ray.rllib.algorithms.dqn import DQNConfig
from ray.rllib.algorithms.dqn.dqn import calculate_rr_weights
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.algorithms.sac import SACConfig
from ray.rllib.utils.metrics import NUM_ENV_STEPS_SAMPLED_LIFETIME

from policy_server import PolicyServerConfig, PolicyServerEnvRunner
from policy_server.commands.training_config import (
    OptionError,
    TrainOptions,
    build_config,
    server_config_of,
)

BOX = gymnasium.spaces.Box(-1.0, 1.0, (3,))
DISCRETE = gymnasium.spaces.Discrete(3)


def made_elsewhere():
    """What ``--config tests.cli.test_training_config:made_elsewhere`` names."""
    server = PolicyServerConfig(port=9123, client_config={"level": 3})
    return (
        PPOConfig()
        .environment(
            observation_space=BOX,
            action_space=DISCRETE,
            env_config={"mine": 1, **server.to_env_config()},
        )
        .training(lr=0.5)
    )


HERE = "tests.cli.test_training_config"
FROZEN = made_elsewhere().copy(copy_frozen=True)


class Talkative(gymnasium.Env):
    observation_space = gymnasium.spaces.Dict(words=gymnasium.spaces.Sequence(DISCRETE))
    action_space = DISCRETE


def test_an_environment_of_other_spaces_than_the_contracts_is_refused_with_the_place():
    gymnasium.register("Talkative-v0", entry_point=Talkative)
    try:
        with pytest.raises(
            OptionError, match=r'--env: observation space\["words"\]: .* got Sequence'
        ):
            build_config(TrainOptions(algo="PPO", env="Talkative-v0", server={"port": 0}))
    finally:
        del gymnasium.registry["Talkative-v0"]


def test_spaces_come_from_a_gymnasium_id():
    config = build_config(TrainOptions(algo="DQN", env="CartPole-v1", server={"port": 0}))
    env = gymnasium.make("CartPole-v1")
    assert isinstance(config, DQNConfig)
    assert config.observation_space == env.observation_space
    assert config.action_space == env.action_space
    assert config.env is None
    assert config.env_runner_cls is PolicyServerEnvRunner
    assert config.num_env_runners == 1
    assert server_config_of(config).port == 0


@pytest.mark.parametrize("runners", [0, 1])
def test_sac_makes_one_update_for_each_step(runners):
    options = TrainOptions(algo="SAC", env="Pendulum-v1", num_env_runners=runners)
    config = build_config(options)
    assert isinstance(config, SACConfig)
    config.validate()
    assert calculate_rr_weights(config) == [1, config.get_rollout_fragment_length()]


def test_sac_moves_its_targets_with_each_of_the_updates_of_a_fragment():
    config = build_config(TrainOptions(algo="SAC", env="Pendulum-v1"))
    learner = config.build_learner(env=gymnasium.make("Pendulum-v1"))
    module = learner.module["default_policy"]
    (weight, *_), (target, *_) = (list(net.parameters()) for net in (module.qf, module.target_qf))
    with torch.no_grad():
        weight.copy_(target + 1.0)
    for _ in range(3):
        learner.after_gradient_based_update(timesteps={NUM_ENV_STEPS_SAMPLED_LIFETIME: 16})
    np.testing.assert_allclose((weight - target).detach(), (1 - config.tau) ** 3, rtol=1e-5)


def test_settings_override_what_sac_is_tuned_with():
    settings = (("actor_lr", 0.5), ("model_config", {"fcnet_hiddens": [8]}))
    config = build_config(TrainOptions(algo="SAC", env="Pendulum-v1", settings=settings))
    assert (config.actor_lr, config.critic_lr) == (0.5, 8e-4)
    assert config.model_config["fcnet_hiddens"] == [8]


def test_spaces_come_from_a_file(tmp_path):
    path = tmp_path / "robot.json"
    described = {
        "observation_space": {"type": "Box", "low": -1, "high": 1, "shape": [3]},
        "action_space": {"type": "Discrete", "n": 3},
    }
    path.write_text(json.dumps(described))
    config = build_config(TrainOptions(algo="PPO", spaces=str(path)))
    assert (config.observation_space, config.action_space) == (BOX, DISCRETE)


@pytest.mark.parametrize(
    ("space", "flattened"),
    [
        ({"type": "Box", "low": 0, "high": 1, "shape": [3]}, False),
        ({"type": "Box", "low": 0, "high": 255, "shape": [84, 84, 3], "dtype": "uint8"}, False),
        ({"type": "Box", "low": 0, "high": 1, "shape": [3, 3]}, True),
        ({"type": "Box", "low": 0, "high": 255, "shape": [3], "dtype": "uint8"}, True),
        ({"type": "MultiBinary", "n": 3}, True),
        ({"type": "Discrete", "n": 3}, True),
        ({"type": "Dict", "spaces": {"a": {"type": "Discrete", "n": 3}}}, True),
    ],
)
def test_what_rllib_has_no_network_for_is_flattened(tmp_path, space, flattened):
    path = tmp_path / "robot.json"
    action_space = {"type": "Discrete", "n": 3}
    path.write_text(json.dumps({"observation_space": space, "action_space": action_space}))
    config = build_config(TrainOptions(algo="PPO", spaces=str(path)))
    assert (config._env_to_module_connector is not None) == flattened


@pytest.mark.parametrize(
    ("space", "says"),
    [
        ({"type": "Discrete", "n": 3, "start": 1}, "observation_space: Discrete(3, start=1)"),
        (
            {"type": "Dict", "spaces": {"name": {"type": "Text", "max_length": 5}}},
            'observation_space["name"]: Text',
        ),
        (
            {"type": "Tuple", "spaces": [{"type": "MultiDiscrete", "nvec": [[2, 3]]}]},
            "observation_space[0]: MultiDiscrete",
        ),
    ],
)
def test_what_rllib_cannot_flatten_is_refused_by_its_name(tmp_path, space, says):
    path = tmp_path / "robot.json"
    action_space = {"type": "Discrete", "n": 3}
    path.write_text(json.dumps({"observation_space": space, "action_space": action_space}))
    with pytest.raises(OptionError, match=f"--spaces: .* cannot read {re.escape(says)}"):
        build_config(TrainOptions(algo="PPO", spaces=str(path)))


@pytest.mark.parametrize("name", ["made_elsewhere", "FROZEN"])
def test_everything_comes_from_a_dotted_path_and_options_override_it(name):
    options = TrainOptions(
        config=f"{HERE}:{name}",
        server={"port": 0},
        settings=(("gamma", 0.9),),
        num_env_runners=0,
        seed=7,
    )
    config = build_config(options)
    server = server_config_of(config)
    assert server.port == 0
    assert server.client_config == {"level": 3}
    assert config.env_config["mine"] == 1
    assert (config.lr, config.gamma, config.seed) == (0.5, 0.9, 7)
    assert config.num_env_runners == 0
    assert config.env_runner_cls is PolicyServerEnvRunner
    assert not FROZEN.env_runner_cls  # the caller's own stays as it was


def test_settings_reach_the_method_that_takes_them():
    settings = (
        ("lr", 0.001),
        ("rollout_fragment_length", 64),
        ("min_sample_timesteps_per_iteration", 500),
        ("model_config", {"fcnet_hiddens": [32]}),
    )
    config = build_config(TrainOptions(algo="DQN", env="CartPole-v1", settings=settings))
    assert config.lr == 0.001
    assert config.rollout_fragment_length == 64
    assert config.min_sample_timesteps_per_iteration == 500
    assert config.model_config["fcnet_hiddens"] == [32]


@pytest.mark.parametrize("key", ["env_runner_cls", "num_env_runners", "self", "lrr"])
def test_what_is_no_setting_is_refused_by_name(key):
    with pytest.raises(OptionError, match=key):
        build_config(TrainOptions(algo="PPO", env="CartPole-v1", settings=((key, 1),)))


def test_server_options_that_contradict_each_other_are_refused():
    with pytest.raises(OptionError, match="insecure"):
        build_config(TrainOptions(algo="PPO", env="CartPole-v1", server={"host": "0.0.0.0"}))
