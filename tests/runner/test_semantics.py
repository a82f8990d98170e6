from __future__ import annotations

import pytest
from ray.rllib.algorithms.appo import APPOConfig
from ray.rllib.algorithms.dqn import DQNConfig
from ray.rllib.algorithms.impala import IMPALAConfig
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.algorithms.sac import SACConfig

from policy_server import PolicyServerConfig
from policy_server.semantics import resolve


def test_synchronous_on_policy_learning_holds_and_takes_at_most_the_version_before():
    semantics = resolve(PPOConfig(), PolicyServerConfig(), 0)
    assert semantics.hold
    assert semantics.max_policy_lag == 1


@pytest.mark.parametrize("config", [DQNConfig, SACConfig, APPOConfig, IMPALAConfig])
def test_all_others_serve_on_and_take_experience_of_any_age(config):
    semantics = resolve(config(), PolicyServerConfig(), 0)
    assert not semantics.hold
    assert semantics.max_policy_lag is None


def test_a_config_derived_from_a_known_one_is_treated_like_it():
    class Mine(PPOConfig):
        pass

    assert resolve(Mine(), PolicyServerConfig(), 0).hold


@pytest.mark.parametrize(
    ("config", "needed"),
    [(PPOConfig, True), (APPOConfig, True), (IMPALAConfig, True), (DQNConfig, False)],
)
def test_logged_actions_need_a_logp_where_the_learner_corrects_for_it(config, needed):
    assert resolve(config(), PolicyServerConfig(), 0).logged_actions_need_logp is needed


@pytest.mark.parametrize("config", [APPOConfig, IMPALAConfig])
def test_holding_actions_back_for_an_algorithm_that_never_stops_sampling_is_refused(config):
    with pytest.raises(ValueError, match=r'while_learning="hold".*"serve"'):
        resolve(config(), PolicyServerConfig(while_learning="hold"), 0)


def test_what_is_set_is_taken():
    server = PolicyServerConfig(while_learning="serve", max_policy_lag=None)
    assert not resolve(PPOConfig(), server, 0).hold
    assert resolve(PPOConfig(), server, 0).max_policy_lag is None
    server = PolicyServerConfig(while_learning="hold", max_policy_lag=5)
    assert resolve(DQNConfig(), server, 0).hold
    assert resolve(DQNConfig(), server, 0).max_policy_lag == 5


def test_the_buffer_holds_two_fragments():
    config = PPOConfig().training(train_batch_size=4000)
    config.env_runners(num_env_runners=1, num_envs_per_env_runner=2)
    semantics = resolve(config, PolicyServerConfig(), 0)
    assert semantics.fragment_steps == 4000
    assert semantics.capacity_steps == 8000
    assert resolve(config, PolicyServerConfig(buffer_fragments=1.5), 0).capacity_steps == 6000


def test_only_algorithms_that_replay_join_chunks():
    assert resolve(DQNConfig(), PolicyServerConfig(), 0).joins_chunks
    assert not resolve(PPOConfig(), PolicyServerConfig(), 0).joins_chunks


def test_clients_that_act_alone_are_asked_for_a_part_of_a_fragment_at_a_time():
    config = PPOConfig().training(train_batch_size=4000).env_runners(num_env_runners=1)
    assert resolve(config, PolicyServerConfig(), 0).steps_per_upload == 500
    assert resolve(config, PolicyServerConfig(steps_per_upload=7), 0).steps_per_upload == 7
    assert resolve(DQNConfig(), PolicyServerConfig(), 0).steps_per_upload == 16
    config = PPOConfig().training(train_batch_size=1_000_000)
    assert resolve(config, PolicyServerConfig(), 0).steps_per_upload == 1000
    config = PPOConfig().training(train_batch_size=4)
    assert resolve(config, PolicyServerConfig(), 0).steps_per_upload == 1
