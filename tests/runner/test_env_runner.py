from __future__ import annotations

import copy
import inspect
import logging
import threading
import time
from unittest import mock

import gymnasium as gym
import numpy as np
import pytest
import ray
from ray.rllib.algorithms.appo import APPOConfig
from ray.rllib.algorithms.dqn import DQNConfig
from ray.rllib.connectors.env_to_module import FlattenObservations, MeanStdFilter
from ray.rllib.env import INPUT_ENV_SINGLE_SPACES

from client_sdk import PolicyClient
from client_sdk.config import Timeouts
from client_sdk.errors import PolicyClientError
from client_sdk.wire import policyserver_pb2 as pb
from policy_server import PolicyServerConfig, PolicyServerEnvRunner
from policy_server.server import ServerStartError
from tests.runner.support import ACTIONS, OBSERVATIONS, ppo_config, running, simulating
from tests.server.talk import TERMINATED, Talker, rows


def _weights(runner, seq_no, *, scale=1.0):
    weights = {name: array * scale for name, array in runner.module.get_state().items()}
    return {"rl_module": weights, "weights_seq_no": seq_no}


def _version(runner):
    return runner._policies.current.version


def _ledger_is_even(runner):
    ledger = runner._buffer.ledger.snapshot()
    received = ledger.pop("received")
    return received == sum(ledger.values()) + runner._buffer.held


# Experience goes out.


def test_a_fragment_of_what_simulators_experience_is_handed_over():
    with running(ppo_config()) as runner, simulating(runner.address):
        episodes = runner.sample()
        assert 20 <= sum(len(episode) for episode in episodes) <= 25
        for episode in episodes:
            assert episode.is_numpy
            assert set(episode.extra_model_outputs) == {
                "action_logp",
                "action_dist_inputs",
                "weights_seq_no",
            }
            episode.validate()


def test_a_batch_is_exceeded_by_one_chunk_at_most_over_several_calls():
    with running(ppo_config(rollout_fragment_length=50)) as runner:
        with simulating(runner.address):
            first = sum(map(len, runner.sample(num_timesteps=20)))
            second = sum(map(len, runner.sample()))
        assert 20 <= first <= 25
        assert 50 <= first + second <= 55


def test_under_the_same_weights_another_fragment_can_be_had():
    with running(ppo_config()) as runner, simulating(runner.address):
        for _ in range(4):
            assert sum(map(len, runner.sample())) >= 20


def test_whole_episodes_where_they_may_not_be_cut():
    with running(ppo_config(batch_mode="complete_episodes")) as runner:
        with simulating(runner.address, rows=3):
            episodes = runner.sample()
        assert sum(map(len, episodes)) >= 20
        assert all(episode.is_done and episode.t_started == 0 for episode in episodes)


def test_nobody_connected_is_answered_at_once(caplog):
    with running(ppo_config()) as runner:
        begin = time.monotonic()
        assert runner.sample() == []
        assert time.monotonic() - begin < 0.1 + 0.1  # the machine may be busy
        for _ in range(3):
            runner.sample()
        assert caplog.text.count(f"no simulator connected at {runner.address}") == 1


def test_nothing_to_report_costs_no_memory_in_rllib():
    with running(ppo_config()) as runner:
        runner.sample()
        assert runner.get_metrics() == {}


def test_a_connected_simulator_that_does_nothing_is_waited_for_and_no_longer():
    with running(ppo_config({"sample_wait_s": 0.3})) as runner, PolicyClient(runner.address):
        begin = time.monotonic()
        assert runner.sample() == []
        assert 0.25 < time.monotonic() - begin < 2.0


def test_what_is_there_is_handed_over_when_time_is_up():
    with (
        running(ppo_config({"sample_wait_s": 0.5, "while_learning": "serve"})) as runner,
        PolicyClient(runner.address) as client,
        client.episode() as episode,
    ):
        for _ in range(4):
            episode.act(OBSERVATIONS.sample())
        assert sum(map(len, runner.sample())) == 3


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_episodes": 3},
        {"random_actions": True},
        {"force_reset": True},
        {"explore": False},
    ],
)
def test_what_only_an_env_loop_can_do_is_refused(arguments):
    with running(ppo_config()) as runner, pytest.raises(ValueError, match=next(iter(arguments))):
        runner.sample(**arguments)


def test_what_the_config_says_anyway_is_accepted():
    with running(ppo_config()) as runner:
        assert runner.sample(explore=True, random_actions=False, force_reset=False) == []


def test_evaluation_episodes_are_reported_apart_and_not_learnt_from():
    with running(ppo_config({"sample_wait_s": 0.3})) as runner:
        with simulating(runner.address, explore=False):
            episodes = []
            for _ in range(20):
                episodes += runner.sample()
                if runner._episode_metrics._names:
                    break
        metrics = runner.get_metrics()
        assert episodes == []
        assert metrics["evaluation"]["episode_return_mean"].peek() == 5.0
        assert metrics["evaluation"]["goals"].peek() == 3.0
        assert "episode_return_mean" not in metrics
        assert runner._buffer.ledger.snapshot()["discarded_evaluation"] > 0
        assert _ledger_is_even(runner)


def test_an_episode_whose_return_is_unknown_is_not_counted():
    config = ppo_config({"while_learning": "serve"})
    with running(config) as runner, Talker(runner.address) as talker:
        nothing = np.zeros((1, 2), np.float32)
        talker.act(rows([1], [0], nothing), starts=[pb.EpisodeStart(episode=1, resumed=True)])
        talker.act(rows([1], [1], nothing, rewards=[1.0], statuses=[TERMINATED]))
        runner.sample(num_timesteps=1)
        metrics = runner.get_metrics()
        assert metrics["num_env_steps_sampled"].peek() == 1
        assert metrics["num_episodes"].peek() == 0
        assert "episode_return_mean" not in metrics


def test_standard_metrics_are_finite_after_the_first_episode():
    with running(ppo_config()) as runner, simulating(runner.address):
        runner.sample()
        metrics = runner.get_metrics()
        for name in (
            "episode_return_mean",
            "episode_return_min",
            "episode_return_max",
            "episode_len_mean",
            "episode_duration_sec_mean",
            "num_env_steps_sampled",
            "num_env_steps_sampled_lifetime",
            "num_episodes",
            "weights_seq_no",
            "goals",
        ):
            assert np.isfinite(metrics[name].peek()), name
        assert metrics["policy_server"]["sessions"].peek() == 1
        assert metrics["policy_server"]["policy_version"].peek() == 0
        ledger = {name: stats.peek() for name, stats in metrics["policy_server"]["ledger"].items()}
        received = ledger.pop("received")
        assert received == sum(ledger.values()) > 0


def test_every_step_is_accounted_for_through_to_the_end():
    with running(ppo_config({"while_learning": "serve"})) as runner:
        with simulating(runner.address), simulating(runner.address, training_enabled=False):
            for _ in range(5):
                runner.sample()
        runner.stop()
        assert _ledger_is_even(runner)
        assert runner._buffer.held == 0


def test_the_callback_at_the_end_of_sampling_sees_the_samples():
    seen = []
    config = ppo_config().callbacks(on_sample_end=lambda *, samples, **_: seen.append(len(samples)))
    with running(config) as runner, simulating(runner.address):
        episodes = runner.sample()
    assert seen == [len(episodes)]


# Weights come in.


def test_the_first_policy_comes_with_the_first_weights():
    runner = PolicyServerEnvRunner(config=ppo_config(), worker_index=0, num_workers=0)
    try:
        assert runner._policies.current is None
        runner.set_state({"num_env_steps_sampled_lifetime": 5})
        assert runner._policies.current is None
        runner.set_state(_weights(runner, 0))
        assert _version(runner) == 0
    finally:
        runner.stop()


def test_weights_that_rllib_begins_with_are_not_served_where_a_checkpoint_is_awaited():
    config = ppo_config({"awaits_checkpoint": True})
    runner = PolicyServerEnvRunner(config=config, worker_index=0, num_workers=0)
    try:
        runner.set_state(_weights(runner, 0))
        assert runner._policies.current is None
        runner.set_state(_weights(runner, 57))
        assert _version(runner) == 57
    finally:
        runner.stop()


def test_a_checkpoint_from_before_the_first_update_is_served_once_it_is_restored():
    config = ppo_config({"awaits_checkpoint": True})
    runner = PolicyServerEnvRunner(config=config, worker_index=0, num_workers=0)
    try:
        runner.set_state(_weights(runner, 0))
        assert runner._policies.current is None
        runner.checkpoint_restored()
        assert _version(runner) == 0
        runner.set_state(_weights(runner, 1))
        assert _version(runner) == 1
        runner.checkpoint_restored()
        assert _version(runner) == 1
    finally:
        runner.stop()


def test_versions_follow_rllibs_numbers():
    with running(ppo_config()) as runner:
        for seq_no in (1, 2, 5):
            runner.set_state(_weights(runner, seq_no))
            assert _version(runner) == seq_no


def test_the_same_number_again_is_no_news():
    with running(ppo_config()) as runner:
        runner.set_state(_weights(runner, 3))
        policy = runner._policies.current
        runner.set_state(_weights(runner, 3))
        assert runner._policies.current is policy


def test_weights_without_a_number_are_always_published():
    with running(ppo_config()) as runner:
        runner.set_state(_weights(runner, 3))
        runner.set_state({"rl_module": _weights(runner, 0)["rl_module"]})
        assert _version(runner) == 4
        assert runner._weights_seq_no == 3
        runner.set_state(_weights(runner, 4))
        assert _version(runner) == 5


def test_a_restored_checkpoint_becomes_the_next_version():
    with running(ppo_config()) as runner:
        for seq_no, version in ((7, 7), (3, 8), (4, 9), (4, 9), (6, 11)):
            runner.set_state(_weights(runner, seq_no))
            assert _version(runner) == version
        assert runner._policies.current.view.weights_seq_no == 6


def test_a_new_process_starts_from_the_checkpoints_number():
    with running(ppo_config()) as runner:
        runner.set_state(_weights(runner, 57))
        assert _version(runner) == 57


def test_broken_weights_are_not_published_and_inference_goes_on(caplog):
    with running(ppo_config({"while_learning": "serve"})) as runner:
        good = runner.module.get_state()
        bad = copy.deepcopy(_weights(runner, 1))
        name = next(iter(bad["rl_module"]))
        bad["rl_module"][name].flat[0] = np.nan
        runner.set_state(bad)
        assert _version(runner) == 0
        np.testing.assert_array_equal(runner.module.get_state()[name], good[name])
        assert "not finite" in caplog.text
        assert name in caplog.text
        with PolicyClient(runner.address) as client, client.episode() as episode:
            assert ACTIONS.contains(episode.act(OBSERVATIONS.sample()))
        runner.set_state(_weights(runner, 2))
        assert _version(runner) == 2


def _broken(runner, seq_no):
    state = copy.deepcopy(_weights(runner, seq_no))
    next(iter(state["rl_module"].values())).flat[0] = np.nan
    return state


def test_broken_weights_are_refused_once_however_often_they_come(caplog):
    with running(ppo_config()) as runner:
        degraded = []
        runner._server.set_degraded = degraded.append
        for seq_no in (1, 1, 1, 2):
            runner.set_state(_broken(runner, seq_no))
        assert caplog.text.count("not finite") == len(degraded) == 2
        runner.set_state(_weights(runner, 2))  # of a restored training, which counts anew
        assert _version(runner) == 2
        assert degraded[2:] == [None]
        runner.set_state(_broken(runner, 3))
        assert len(degraded) == 4


@pytest.mark.parametrize(
    "error",
    [ray.exceptions.GetTimeoutError("late"), ray.exceptions.ObjectLostError("0" * 56, "", "")],
)
def test_weights_that_do_not_arrive_in_time_leave_the_old_ones_in_place(monkeypatch, caplog, error):
    asked = []

    def get(ref, *, timeout):
        asked.append(timeout)
        raise error

    monkeypatch.setattr(ray, "get", get)
    with running(ppo_config()) as runner:
        good = runner.module.get_state()
        runner.set_state({"rl_module": ray.ObjectRef.nil(), "weights_seq_no": 1})
        assert asked == [60]
        assert "weights 1 did not arrive" in caplog.text
        assert (_version(runner), runner._weights_seq_no) == (0, 0)
        for name, array in good.items():
            np.testing.assert_array_equal(runner.module.get_state()[name], array)
        runner.set_state(_weights(runner, 1))
        assert _version(runner) == 1


def test_a_state_server_that_does_not_answer_stops_nobody(monkeypatch, caplog):
    def get(ref, *, timeout):
        assert timeout == 60
        raise ray.exceptions.GetTimeoutError("late")

    monkeypatch.setattr(ray, "get", get)
    with running(ppo_config()) as runner, simulating(runner.address):
        runner._env_runner_state_server = mock.Mock()
        assert sum(map(len, runner.sample())) >= 20
    assert "no weights from the state server (GetTimeoutError)" in caplog.text


def test_weights_sets_of_all_modules_are_understood():
    with running(ppo_config()) as runner:
        state = _weights(runner, 1)
        runner.set_state({**state, "rl_module": {"default_policy": state["rl_module"]}})
        assert _version(runner) == 1


def test_a_set_state_that_never_comes_stops_nobody():
    with running(ppo_config()) as runner, simulating(runner.address, rows=4):
        for _ in range(5):
            assert sum(map(len, runner.sample())) >= 20


def test_exploration_schedules_see_how_far_training_has_come():
    config = (
        DQNConfig()
        .environment(
            observation_space=OBSERVATIONS,
            action_space=ACTIONS,
            env_config=PolicyServerConfig(port=0, drain_s=0.2).to_env_config(),
        )
        .env_runners(env_runner_cls=PolicyServerEnvRunner, num_env_runners=0)
        .training(epsilon=[(0, 1.0), (1000, 0.0)])
    )
    with running(config) as runner:
        built = []
        runner._factory.build = lambda version, env_steps, view: (
            built.append(env_steps) or runner._policies.current
        )
        runner.set_state({**_weights(runner, 1), "num_env_steps_sampled_lifetime": 500})
        with simulating(runner.address):
            steps = sum(map(len, runner.sample(num_timesteps=30)))
        runner.set_state(_weights(runner, 2))
        assert built == [500, 500 + steps]


def test_state_survives_the_way_to_another_runner():
    with running(ppo_config()) as runner, running(ppo_config()) as other:
        runner.set_state(_weights(runner, 4, scale=0.5))
        runner.num_env_steps_sampled_lifetime = 77
        other.set_state(runner.get_state())
        assert _version(other) == 4
        assert other.num_env_steps_sampled_lifetime == 77
        for name, array in runner.module.get_state().items():
            np.testing.assert_array_equal(other.module.get_state()[name], array)


def test_only_what_is_asked_for_is_in_the_state():
    with running(ppo_config()) as runner:
        assert "rl_module" not in runner.get_state(not_components="rl_module")
        assert "rl_module" not in runner.get_state(components=["env_to_module_connector"])


# The engine.


def test_the_engine_is_logged_once_with_the_reason(caplog):
    caplog.set_level(logging.INFO, "policy_server")
    with running(ppo_config()) as runner:
        runner.set_state(_weights(runner, 1))
        (record,) = [record for record in caplog.records if "engine" in record.getMessage()]
        assert record.getMessage() == f"acting by {runner.engine}"
        assert record.levelno == logging.INFO
        assert runner.engine.startswith("the onnx engine: the graph of ")


def test_the_slower_engine_is_a_warning_that_says_why(caplog):
    config = ppo_config().rl_module(model_config={"use_lstm": True, "max_seq_len": 5})
    with running(config) as runner:
        (record,) = [record for record in caplog.records if "engine" in record.getMessage()]
        assert record.levelno == logging.WARNING
        assert runner.engine.startswith("the rl_module engine: ")
        assert len(runner.engine) > len("the rl_module engine: ")


# Life.


def test_no_coroutine_on_the_class_or_ray_would_reorder_its_calls():
    assert not [
        name for name, _ in inspect.getmembers(PolicyServerEnvRunner, inspect.iscoroutinefunction)
    ]


def test_spaces_come_from_the_config_without_an_env():
    with running(ppo_config()) as runner:
        spaces = runner.get_spaces()
        assert spaces[INPUT_ENV_SINGLE_SPACES] == (OBSERVATIONS, ACTIONS)
        assert spaces["default_policy"] == (OBSERVATIONS, ACTIONS)


def test_spaces_come_from_the_env_that_the_config_names():
    config = ppo_config()
    config.observation_space = config.action_space = None
    config.environment("CartPole-v1")
    with running(config) as runner:
        env = gym.make("CartPole-v1")
        assert runner.get_spaces()[INPUT_ENV_SINGLE_SPACES] == (
            env.observation_space,
            env.action_space,
        )


def test_no_spaces_is_said_clearly():
    config = ppo_config()
    config.observation_space = config.action_space = None
    with pytest.raises(ValueError, match="no spaces: set environment"):
        PolicyServerEnvRunner(config=config, worker_index=0)


def test_the_local_runner_beside_remote_ones_serves_nobody():
    runner = PolicyServerEnvRunner(config=ppo_config(num_env_runners=2), worker_index=0)
    assert runner.address == ""
    runner.set_state(_weights(runner, 3))
    assert runner.get_state()["weights_seq_no"] == 3
    with pytest.raises(ValueError, match="serves nobody"):
        runner.sample()
    runner.stop()


def test_evaluation_runners_are_refused():
    config = ppo_config()
    config.in_evaluation = True
    with pytest.raises(ValueError, match="evaluation env runners cannot be policy servers"):
        PolicyServerEnvRunner(config=config, worker_index=0)


def test_holding_with_an_asynchronous_algorithm_is_refused():
    config = (
        APPOConfig()
        .environment(
            observation_space=OBSERVATIONS,
            action_space=ACTIONS,
            env_config=PolicyServerConfig(port=0, while_learning="hold").to_env_config(),
        )
        .env_runners(num_env_runners=0)
    )
    with pytest.raises(ValueError, match="samples and learns at the same time"):
        PolicyServerEnvRunner(config=config, worker_index=0)


def test_a_port_in_use_is_named():
    with running(ppo_config()) as runner:
        port = int(runner.address.rsplit(":", 1)[1])
        with pytest.raises(ServerStartError, match=str(port)):
            PolicyServerEnvRunner(config=ppo_config({"port": port}), worker_index=0)


def test_several_servers_on_one_port_are_refused():
    config = ppo_config({"port": 9900}, num_env_runners=2)
    with pytest.raises(ValueError, match=r"num_env_runners=2 with port=9900.*num_env_runners=1"):
        PolicyServerEnvRunner(config=config, worker_index=1)


def test_stopping_twice_is_fine_and_releases_who_is_held():
    with running(ppo_config()) as runner:
        client = PolicyClient(runner.address, timeouts=Timeouts(reconnect_s=0.2))
        errors = []

        def act():
            try:
                client.episode().act(OBSERVATIONS.sample())
            except PolicyClientError as error:
                errors.append(error)

        held = threading.Thread(target=act)
        held.start()
        deadline = time.monotonic() + 5
        while not runner._server.stats()["requests_waiting"] and time.monotonic() < deadline:
            held.join(0.01)
        begin = time.monotonic()
        runner.stop()
        runner.stop()
        assert time.monotonic() - begin < 5.0
        held.join(5)
        assert not held.is_alive()
        assert len(errors) == 1
        client.close()


def test_healthy_means_constructed():
    with running(ppo_config()) as runner:
        runner.assert_healthy()


def test_filter_statistics_on_the_driver_are_those_of_all_that_was_handed_over():
    def config():
        return ppo_config(
            {"while_learning": "serve"},
            env_to_module_connector=lambda env, spaces, device: MeanStdFilter(),
            num_env_runners=1,
        )

    driver = PolicyServerEnvRunner(config=config(), worker_index=0, num_workers=1)
    runner = PolicyServerEnvRunner(config=config(), worker_index=1, num_workers=1)
    connectors = ["env_to_module_connector", "module_to_env_connector"]
    seen = {}
    try:
        runner.set_state(_weights(runner, 0))
        with simulating(runner.address):
            for seq_no in range(1, 6):
                handed = runner.sample()
                for episode in handed:
                    seen[episode.id_] = max(seen.get(episode.id_, 0), episode.t)
                merged = driver._env_to_module.merge_states(
                    [runner.get_state(components=connectors)["env_to_module_connector"]]
                )
                driver.set_state({"env_to_module_connector": merged})
                if seq_no != 3:  # lost
                    runner.set_state({"env_to_module_connector": merged})
                runner.set_state(_weights(runner, seq_no))
        # Each episode has one observation more than it has steps.
        observations = sum(seen.values()) + len(seen)
        for one in (driver, runner):
            (statistics,) = one._env_to_module.connectors[0].running()
            assert statistics.num_pushes == observations
    finally:
        runner.stop()
        driver.stop()


@pytest.fixture
def driver_and_runner():
    config = ppo_config({"while_learning": "serve"}, num_env_runners=1)
    driver = PolicyServerEnvRunner(config=config, worker_index=0, num_workers=1)
    runner = PolicyServerEnvRunner(config=config, worker_index=1, num_workers=1)
    yield driver, runner
    runner.stop()
    driver.stop()


def _sync_connectors(driver, runner):
    name = "env_to_module_connector"
    merged = driver._env_to_module.merge_states([runner.get_state(components=[name])[name]])
    for one in (driver, runner):
        one.set_state({name: merged})
    return merged


def test_weights_that_were_lost_come_with_the_next_connector_states(driver_and_runner):
    driver, runner = driver_and_runner
    runner.set_state(_weights(runner, 0))
    driver.set_state(_weights(driver, 4, scale=2.0))  # the runner's copy was lost
    _sync_connectors(driver, runner)
    assert _version(runner) == 4
    for name, array in driver.module.get_state().items():
        np.testing.assert_array_equal(runner.module.get_state()[name], array)


def test_weights_that_arrived_are_not_sent_again(driver_and_runner):
    driver, runner = driver_and_runner
    for one in (driver, runner):
        one.set_state(_weights(one, 4))
    assert _sync_connectors(driver, runner) == {}
    runner.set_state(_weights(runner, 5))  # asynchronous algorithms leave the driver behind
    _sync_connectors(driver, runner)
    assert _version(runner) == 5


def test_weights_that_were_refused_are_not_sent_again(driver_and_runner):
    driver, runner = driver_and_runner
    runner.set_state(_weights(runner, 4))
    driver.set_state(_weights(driver, 5))
    runner.set_state(_broken(runner, 5))
    assert _sync_connectors(driver, runner) == {}
    assert _version(runner) == 4
    driver.set_state(_weights(driver, 6))  # lost
    _sync_connectors(driver, runner)
    assert _version(runner) == 6


def test_a_filter_behind_stateless_connectors_is_merged_on_the_driver():
    config = ppo_config(
        {"while_learning": "serve"},
        env_to_module_connector=lambda env, spaces, device: [
            FlattenObservations(),
            MeanStdFilter(),
        ],
        num_env_runners=1,
    )
    driver = PolicyServerEnvRunner(config=config, worker_index=0, num_workers=1)
    runner = PolicyServerEnvRunner(config=config, worker_index=1, num_workers=1)
    try:
        runner._views.count({"": np.ones((7, 2), np.float32)})
        _sync_connectors(driver, runner)
        assert driver._env_to_module.connectors[1].running()[0].num_pushes == 7
    finally:
        runner.stop()
        driver.stop()
