"""One training per mode, until it has clearly learnt."""

from __future__ import annotations

import pytest
from ray.rllib.algorithms.dqn import DQNConfig
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.algorithms.sac import SACConfig

from tests.training.support import (
    address_of,
    building,
    mean_return,
    over,
    over_cartpole,
    simulators,
    train_until,
)

INFERENCE = pytest.mark.parametrize("inference", ["remote", "local"])


@pytest.mark.learning
@pytest.mark.timeout(240)
@INFERENCE
def test_ppo_learns_from_simulators(ray_session, inference):
    config = over_cartpole(PPOConfig(), num_env_runners=1)
    config.training(
        lr=3e-4, train_batch_size=2000, minibatch_size=128, num_epochs=6, vf_loss_coeff=0.01
    ).rl_module(model_config={"fcnet_hiddens": [64, 64], "vf_share_layers": False})
    with (
        building(config) as algo,
        simulators("CartPole-v1", address_of(algo), 8, "--inference", inference),
    ):
        result = train_until(algo, lambda result: mean_return(result) >= 150, iterations=40)
    server = result["env_runners"]["policy_server"]
    assert server["sessions"] == 1
    assert server["incidents"] == server["handover_errors"] == 0


@pytest.mark.slow
@pytest.mark.learning
@pytest.mark.timeout(240)
@INFERENCE
def test_dqn_learns_from_simulators(ray_session, inference):
    config = over_cartpole(DQNConfig(), num_env_runners=0)
    config.training(
        lr=5e-4,
        train_batch_size=32,
        n_step=3,
        epsilon=[(0, 1.0), (3_000, 0.05)],
        num_steps_sampled_before_learning_starts=500,
        target_network_update_freq=500,
        training_intensity=8,
        replay_buffer_config={"type": "EpisodeReplayBuffer", "capacity": 50_000},
    ).env_runners(rollout_fragment_length=32).reporting(
        min_sample_timesteps_per_iteration=500, min_time_s_per_iteration=0
    ).rl_module(model_config={"fcnet_hiddens": [64, 64]})
    # A random policy gets 20.
    with (
        building(config) as algo,
        simulators("CartPole-v1", address_of(algo), 4, "--inference", inference),
    ):
        result = train_until(algo, lambda result: mean_return(result) >= 50, iterations=80)
    assert result["env_runners"]["policy_server"]["handover_errors"] == 0


@pytest.mark.slow
@pytest.mark.learning
@pytest.mark.timeout(900)
def test_sac_learns_from_simulators_that_act_alone(ray_session):
    config = over("Pendulum-v1", SACConfig(), num_env_runners=1)
    config.training(
        actor_lr=1e-3,
        critic_lr=1e-3,
        alpha_lr=1e-3,
        train_batch_size_per_learner=64,
        num_steps_sampled_before_learning_starts=500,
        # One update for each step; RLlib counts a runner more than there are.
        training_intensity=64 / 2,
    ).env_runners(rollout_fragment_length=16).reporting(
        min_sample_timesteps_per_iteration=800, min_time_s_per_iteration=0
    ).rl_module(
        model_config={
            "fcnet_hiddens": [64, 64],
            "fcnet_activation": "relu",
            "fusionnet_hiddens": [64, 64],
            "fusionnet_activation": "relu",
        }
    )
    # A random policy gets -1200.
    with (
        building(config) as algo,
        simulators("Pendulum-v1", address_of(algo), 4, "--inference", "local"),
    ):
        result = train_until(algo, lambda result: mean_return(result) >= -400, iterations=20)
    server = result["env_runners"]["policy_server"]
    assert server["incidents"] == server["handover_errors"] == 0
