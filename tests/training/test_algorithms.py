"""RLlib's own machinery around the env runner: results, checkpoints, callbacks, interruption."""

from __future__ import annotations

import contextlib
import signal
import threading
import time

import gymnasium
import numpy as np
import pytest
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.appo import APPOConfig
from ray.rllib.algorithms.dqn import DQNConfig
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.algorithms.sac import SACConfig
from ray.rllib.algorithms.sac.torch.default_sac_torch_rl_module import DefaultSACTorchRLModule
from ray.rllib.connectors.env_to_module import MeanStdFilter
from ray.rllib.core.rl_module.rl_module import RLModuleSpec

from policy_server.commands.training import _HISTORY, _Run
from policy_server.commands.training_config import TrainOptions
from tests.runner.support import simulating
from tests.server.talk import program
from tests.training.support import address_of, building, over_cartpole


class OwnSAC(DefaultSACTorchRLModule):
    """Has no graph, because a user made it."""


pytestmark = pytest.mark.timeout(120)


def _small_ppo(num_env_runners=0, **settings):
    config = over_cartpole(PPOConfig(), num_env_runners=num_env_runners, **settings)
    config.training(train_batch_size=100, minibatch_size=50, num_epochs=1)
    return config.rl_module(model_config={"fcnet_hiddens": [8]})


def _small_dqn(**settings):
    config = over_cartpole(DQNConfig(), **settings)
    config.training(
        num_steps_sampled_before_learning_starts=40,
        replay_buffer_config={"type": "EpisodeReplayBuffer", "capacity": 1000},
    ).env_runners(rollout_fragment_length=20)
    config.reporting(min_sample_timesteps_per_iteration=100, min_time_s_per_iteration=0)
    return config.rl_module(model_config={"fcnet_hiddens": [8]})


def _small_sac(**settings):
    config = over_cartpole(SACConfig(), **settings)
    config.environment(action_space=gymnasium.spaces.Box(-2.0, 3.0, (2,))).training(
        train_batch_size_per_learner=32,
        num_steps_sampled_before_learning_starts=40,
        replay_buffer_config={"type": "EpisodeReplayBuffer", "capacity": 1000},
    ).env_runners(rollout_fragment_length=20)
    config.reporting(min_sample_timesteps_per_iteration=100, min_time_s_per_iteration=0)
    return config.rl_module(model_config={"fcnet_hiddens": [8]})


def _simulating(algo, address=None, **options):
    space = algo.config.observation_space
    space = type(space)(-1, 1, space.shape, space.dtype)  # CartPole's own bounds are infinite
    return simulating(address or address_of(algo), space=space, rows=4, **options)


def _leaves(result, path=()):
    for key, value in result.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value


def _not_finite(result):
    return ["/".join(map(str, path)) for path, value in _leaves(result) if not np.isfinite(value)]


@pytest.mark.parametrize("num_env_runners", [0, 2])
def test_results_are_finite_and_total_after_the_first_episode(ray_session, num_env_runners):
    # So short a wait that an iteration takes many sample() calls.
    config = _small_ppo(num_env_runners, sample_wait_s=0.02)
    with building(config) as algo, contextlib.ExitStack() as stack:
        addresses = algo.env_runner_group.foreach_env_runner(lambda runner: runner.address)
        for address in filter(None, addresses):
            stack.enter_context(_simulating(algo, address))
        for _ in range(3):
            result = algo.train()
    runners = result["env_runners"]
    assert _not_finite(runners) == []
    assert runners["num_env_steps_sampled_lifetime"] >= 300
    assert runners["weights_seq_no"] == 2
    server = runners["policy_server"]
    assert server["sessions_opened"] == max(1, num_env_runners)
    ledger = dict(server["ledger"])
    assert ledger["delivered"] == runners["num_env_steps_sampled_lifetime"]
    assert ledger.pop("received") == sum(ledger.values())


@pytest.mark.parametrize(("small", "num_env_runners"), [(_small_ppo, 1), (_small_dqn, 0)])
def test_results_stay_finite_where_no_episode_ends(ray_session, small, num_env_runners):
    with building(small(num_env_runners=num_env_runners)) as algo:
        with _simulating(algo):
            results = [algo.train()["env_runners"]]
        with _simulating(algo, length=100_000):
            while results[-1]["num_episodes"] > 0:  # what the first simulator has left behind
                results.append(algo.train()["env_runners"])
            results.append(algo.train()["env_runners"])
    *_, latest, without, again = results
    assert latest["num_episodes"] > 0
    assert again["num_episodes"] == 0
    for runners in (without, again):
        assert _not_finite(runners) == []
        assert runners["episode_return_mean"] == latest["episode_return_mean"]
        assert runners["episode_len_max"] == latest["episode_len_max"]


def test_results_last_again_after_a_resume(ray_session, tmp_path):
    options = TrainOptions(env="CartPole-v1")
    with building(_small_ppo()) as algo:
        with _simulating(algo):
            assert "episode_return_mean" in algo.train()["env_runners"]
        run = _Run(options, algo.config)
        algo.save_to_path(tmp_path)
    (tmp_path / _HISTORY).write_text("[]", encoding="utf-8")
    with building(_small_ppo(awaits_checkpoint=True)) as resumed:
        run._restore(resumed, tmp_path)
        # RLlib's own, which would make NaN of iterations without an episode, are gone.
        assert "episode_return_mean" not in resumed.metrics.stats["env_runners"]
        assert "num_env_steps_sampled_lifetime" in resumed.metrics.stats["env_runners"]


def test_a_batch_exceeds_its_size_by_less_than_one_fragment(ray_session):
    with building(_small_ppo(sample_wait_s=0.05)) as algo, _simulating(algo):
        for _ in range(5):
            sampled = algo.train()["env_runners"]["num_env_steps_sampled"]
            assert 100 <= sampled < 200


@pytest.mark.parametrize("num_env_runners", [0, 1])
def test_a_checkpoint_continues_with_its_version_and_counters(
    ray_session, tmp_path, num_env_runners
):
    with building(_small_ppo(num_env_runners)) as algo, _simulating(algo):
        for _ in range(3):
            before = algo.train()
        algo.save_to_path(tmp_path)
        weights = algo.learner_group.get_weights()
    restored = Algorithm.from_checkpoint(str(tmp_path))
    try:
        np.testing.assert_equal(restored.learner_group.get_weights(), weights)
        with _simulating(restored):
            after = restored.train()
    finally:
        restored.env_runner_group.foreach_env_runner("stop", timeout_seconds=10)
        restored.stop()
    assert after["training_iteration"] == 4
    runners, runners_before = after["env_runners"], before["env_runners"]
    assert runners["policy_server"]["policy_version"] == 3
    assert runners["weights_seq_no"] == 3
    sampled = runners["num_env_steps_sampled_lifetime"]
    assert sampled >= runners_before["num_env_steps_sampled_lifetime"] + 100
    assert runners["policy_server"]["ledger"]["delivered"] == sampled


def test_restoring_an_older_checkpoint_takes_its_weights_under_a_newer_version(
    ray_session, tmp_path
):
    with building(_small_ppo()) as algo, _simulating(algo):
        algo.train()
        algo.save_to_path(tmp_path)
        for _ in range(2):
            algo.train()
        runner = algo.env_runner
        assert runner._policies.current.version == 3
        algo.restore_from_path(tmp_path)
        assert runner._policies.current.version == 4
        assert runner._policies.current.view.weights_seq_no == 1
        algo.train()
        assert runner._policies.current.version == 5


def test_weights_that_never_arrive_do_not_stop_the_training(ray_session, monkeypatch):
    with building(_small_ppo()) as algo, _simulating(algo):
        algo.train()
        monkeypatch.setattr(algo.env_runner_group, "sync_weights", lambda **_: None)
        for _ in range(2):
            result = algo.train()
        assert result["env_runners"]["policy_server"]["policy_version"] == 1


def test_dqn_replays_chunks_under_changing_statistics_of_a_filter(ray_session):
    config = _small_dqn().env_runners(
        env_to_module_connector=lambda env, spaces, device: MeanStdFilter()
    )
    with building(config) as algo, _simulating(algo, length=50):
        for _ in range(3):
            result = algo.train()
    assert result["env_runners"]["policy_server"]["handover_errors"] == 0
    assert result["env_runners"]["policy_server"]["policy_version"] > 5
    assert np.isfinite(result["learners"]["default_policy"]["qf_loss"])


@pytest.mark.parametrize(
    ("engine", "mode"), [("onnx", "remote"), ("onnx", "local"), ("rl_module", "remote")]
)
def test_sac_learns_from_its_own_actions_before_they_are_scaled(ray_session, engine, mode):
    config = _small_sac()
    if engine == "rl_module":
        config.rl_module(rl_module_spec=RLModuleSpec(module_class=OwnSAC))
    with building(config) as algo, _simulating(algo, length=50, inference_mode=mode):
        assert algo.env_runner.engine.startswith(f"the {engine} engine")
        for _ in range(3):
            result = algo.train()
        replayed = algo.local_replay_buffer.episodes
    assert result["env_runners"]["policy_server"]["handover_errors"] == 0
    assert result["env_runners"]["policy_server"]["policy_version"] > 5
    losses = result["learners"]["default_policy"]
    assert np.isfinite([losses["qf_loss"], losses["policy_loss"], losses["alpha_loss"]]).all()
    actions = np.concatenate([episode.get_actions() for episode in replayed])
    assert actions.shape[1:] == (2,)
    assert np.abs(actions).max() <= 1.0


def test_a_recurrent_module_learns_from_chunks(ray_session):
    config = _small_ppo().rl_module(
        model_config={"fcnet_hiddens": [8], "use_lstm": True, "lstm_cell_size": 8, "max_seq_len": 5}
    )
    with building(config) as algo, _simulating(algo, length=30):
        for _ in range(3):
            result = algo.train()
    assert result["env_runners"]["policy_server"]["handover_errors"] == 0
    assert np.isfinite(result["learners"]["default_policy"]["total_loss"])


def test_whole_episodes_can_be_learnt_from(ray_session):
    config = _small_ppo(max_policy_lag=None).env_runners(batch_mode="complete_episodes")
    with building(config) as algo, _simulating(algo):
        for _ in range(2):
            result = algo.train()
    assert result["env_runners"]["num_env_steps_sampled"] >= 100


# Acts alone for some steps, and is gone in the middle of an episode.
DYING = """
import os, sys
import numpy as np
from client_sdk import PolicyClient
episode = PolicyClient(sys.argv[1], "local").episode()
for step in range(130):
    episode.act(np.full(4, 0.01 * step, np.float32), float(step > 0))
os._exit(0)
"""


def test_clients_that_die_in_the_middle_of_an_iteration_do_not_stop_it(ray_session):
    over = threading.Event()
    clients = []

    def come_and_go(address):
        while not over.is_set():
            with program(DYING, address) as client:
                clients.append(client)
                client.wait(100)

    with building(_small_ppo()) as algo:
        coming = threading.Thread(target=come_and_go, args=(address_of(algo),))
        coming.start()
        try:
            for _ in range(3):
                result = algo.train()
        finally:
            over.set()
            while coming.is_alive():  # the last one is held
                clients[-1].kill()
                coming.join(0.1)
    assert len(clients) > 1
    assert result["env_runners"]["policy_server"]["policy_version"] == 2
    assert result["env_runners"]["policy_server"]["handover_errors"] == 0


def test_a_callback_that_raises_does_not_end_the_training(ray_session):
    def fail(**kwargs):
        raise RuntimeError("the user's own bug")

    config = _small_ppo().callbacks(on_episode_end=fail, on_sample_end=fail)
    with building(config) as algo, _simulating(algo):
        result = algo.train()
    assert result["env_runners"]["policy_server"]["callback_errors"] > 0


def test_holding_actions_back_with_appo_is_refused_when_built(ray_session):
    config = over_cartpole(APPOConfig(), num_env_runners=1, while_learning="hold")
    with pytest.raises(ValueError, match="samples and learns at the same time"):
        config.build_algo()


@pytest.mark.parametrize("num_env_runners", [0, 1])
def test_training_without_simulators_can_be_interrupted(ray_session, num_env_runners):
    with building(_small_ppo(num_env_runners)) as algo:
        interrupted = threading.Timer(1.0, signal.raise_signal, [signal.SIGINT])
        interrupted.start()
        begin = time.monotonic()
        with contextlib.suppress(KeyboardInterrupt):
            algo.train()
            pytest.fail("train() returned without experience")
        assert 0.9 < time.monotonic() - begin < 6.0


def test_an_engine_that_was_killed_comes_back_and_goes_on(ray_session):
    config = _small_ppo(1).fault_tolerance(
        restart_failed_env_runners=True, delay_between_env_runner_restarts_s=0.1
    )
    with building(config) as algo:
        with _simulating(algo):
            algo.train()
        with contextlib.suppress(Exception):
            algo.env_runner_group.foreach_env_runner(
                lambda runner: __import__("os")._exit(1),
                local_env_runner=False,
                timeout_seconds=5,
            )
        deadline = time.monotonic() + 60
        address = None
        while address is None and time.monotonic() < deadline:
            algo.restore_env_runners(algo.env_runner_group)
            with contextlib.suppress(Exception):
                address = address_of(algo)
        with _simulating(algo):
            result = algo.train()
    assert result["env_runners"]["policy_server"]["policy_version"] >= 1
