"""What is learnt from is what was acted on: the server's engine and the learner see the same."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from ray.rllib.algorithms.sac import SACConfig
from ray.rllib.connectors.env_to_module import FlattenObservations, MeanStdFilter
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.replay_buffers.episode_replay_buffer import EpisodeReplayBuffer
from ray.rllib.utils.spaces.space_utils import unsquash_action

from client_sdk.config import Timeouts
from client_sdk.runner import run_gymnasium
from policy_server import PolicyServerConfig, PolicyServerEnvRunner
from tests.runner.support import OBSERVATIONS, ppo_config, running, simulating
from tests.runner.test_learner_view import Doubling

NESTED = gym.spaces.Dict(
    {"speed": gym.spaces.Box(-5, 5, (2,), np.float32), "gear": gym.spaces.Discrete(3)}
)
BOUNDED = gym.spaces.Box(-3, 5, (2,), np.float32)


def _publish(runner: PolicyServerEnvRunner, seq_no: int, rng: np.random.Generator) -> None:
    weights = {
        name: (array + 0.3 * rng.normal(size=array.shape)).astype(array.dtype)
        for name, array in runner.module.get_state().items()
    }
    runner.set_state({"rl_module": weights, "weights_seq_no": seq_no})


def _dist_inputs(runner: PolicyServerEnvRunner, episode: Any) -> np.ndarray[Any, Any]:
    observations = torch.from_numpy(np.asarray(episode.get_observations()[:-1], np.float32))
    with torch.no_grad():
        outputs = runner.module.forward_inference({"obs": observations})
    return outputs["action_dist_inputs"].numpy()


@pytest.mark.parametrize(
    ("space", "connectors", "engine"),
    [
        (OBSERVATIONS, [], "onnx"),
        (NESTED, [FlattenObservations], "onnx"),
        (BOUNDED, [MeanStdFilter], "onnx"),
        (NESTED, [FlattenObservations, MeanStdFilter], "onnx"),
        (BOUNDED, [Doubling], "rl_module"),
        (BOUNDED, [Doubling, MeanStdFilter], "rl_module"),
    ],
    ids=["raw", "flattened", "filtered", "flattened and filtered", "custom", "custom and filtered"],
)
def test_the_behaviour_is_reproduced_from_what_the_learner_gets(space, connectors, engine):
    config = ppo_config(
        {"while_learning": "serve"},
        env_to_module_connector=lambda env, spaces, device: [make() for make in connectors],
    ).environment(observation_space=space)
    rng = np.random.default_rng(3)
    with running(config) as runner:
        assert runner._factory.name == engine, runner._factory.reason
        with simulating(runner.address, space=space, rows=3):
            for seq_no in range(1, 5):
                runner.sample()
                _publish(runner, seq_no, rng)
            # Steps of versions before come first.
            episodes = [episode for _ in range(4) for episode in runner.sample()]
        compared = 0
        for episode in episodes:
            newest = episode.get_extra_model_outputs("weights_seq_no") == seq_no
            np.testing.assert_allclose(
                episode.get_extra_model_outputs("action_dist_inputs")[newest],
                _dist_inputs(runner, episode)[newest],
                atol=2e-4,
            )
            compared += newest.sum()
        assert compared > 20


PENDULUM_STEPS = 200


def _replayed_by_sac(inference_mode: str, num_envs: int) -> list[SingleAgentEpisode]:
    """Whole episodes of Pendulum, as SAC's replay buffer has them after many chunks."""
    env = gym.make("Pendulum-v1")
    config = (
        SACConfig()
        .environment(
            observation_space=env.observation_space,
            action_space=env.action_space,
            env_config=PolicyServerConfig(port=0, drain_s=0.2).to_env_config(),
        )
        .env_runners(env_runner_cls=PolicyServerEnvRunner, rollout_fragment_length=32)
        .rl_module(model_config={"fcnet_hiddens": [8]})
    )
    replay = EpisodeReplayBuffer(capacity=10_000)
    with ThreadPoolExecutor(1) as thread, running(config) as runner:
        simulating = thread.submit(
            run_gymnasium,
            "Pendulum-v1",
            runner.address,
            inference_mode=inference_mode,
            num_envs=num_envs,
            episodes=num_envs,
            timeouts=Timeouts(connect_s=5.0),
        )
        while replay.get_num_timesteps() < num_envs * PENDULUM_STEPS:
            episodes = runner.sample()
            assert episodes or not simulating.done(), simulating.result()
            replay.add(episodes)
    return [episode for episode in replay.episodes if episode.is_done]


@pytest.mark.parametrize("inference_mode", ["remote", "local"])
def test_what_sac_replays_is_what_the_simulator_did(inference_mode):
    episodes = _replayed_by_sac(inference_mode, num_envs=2)
    assert [len(episode) for episode in episodes] == [PENDULUM_STEPS] * 2
    pendulum = gym.make("Pendulum-v1").unwrapped
    space = pendulum.action_space
    pendulum.reset()
    for episode in episodes:
        # It only ever runs out of time, and its last value counts.
        assert episode.is_truncated
        assert not episode.is_terminated
        actions = episode.get_actions()
        assert actions.dtype == np.float32
        assert np.abs(actions).max() <= 1.0 < 2 * np.abs(actions).max()
        observations = episode.get_observations()
        for step, action in enumerate(actions):
            x, y, speed = map(float, observations[step])
            pendulum.state = np.array([np.arctan2(y, x), speed])
            after, reward, *_ = pendulum.step(unsquash_action(action, space))
            np.testing.assert_allclose(observations[step + 1], after, atol=1e-4)
            assert episode.get_rewards(step) == pytest.approx(reward, abs=1e-3)
