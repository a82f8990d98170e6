"""What is learnt from is what was acted on: the server's engine and the learner see the same."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from ray.rllib.connectors.env_to_module import FlattenObservations, MeanStdFilter

from policy_server import PolicyServerEnvRunner
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
