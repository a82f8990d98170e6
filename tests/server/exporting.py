"""Servers whose policies have ONNX files, made of RLlib's own modules."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import torch
from ray.rllib.algorithms.ppo import PPOConfig

from policy_server.config import PolicyServerConfig
from policy_server.learner_view import LearnerViews, use_exact_filters
from policy_server.onnx_engine.factory import OnnxEnginePolicy
from tests.inference.modules import Built, build
from tests.servers import CARTPOLE_ACTIONS, CARTPOLE_OBSERVATIONS, ServerUnderTest


class ExportingServer(ServerUnderTest):
    """Publishes what RLlib's module gives, with other weights each time."""

    def __init__(self, built: Built, config: PolicyServerConfig, **settings: Any) -> None:
        self.built = built
        pipeline = use_exact_filters(built.env_to_module, reports=False)
        self.views = LearnerViews(
            pipeline, built.observation_space, lambda: build(built.config).env_to_module
        )
        self.factory = built.factory()
        assert self.factory.name == "onnx", self.factory.reason
        super().__init__(config, built.observation_space, built.action_space, **settings)

    def publish(self, version: int, action: Any = None) -> OnnxEnginePolicy:
        assert action is None
        with torch.no_grad():
            for parameter in self.built.module.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        policy = self.factory.build(version, 0, self.views.freeze(version))
        self.policies.publish(policy)
        return policy


@contextlib.contextmanager
def exporting(
    algorithm: Any = None,
    observation_space: gym.Space[Any] = CARTPOLE_OBSERVATIONS,
    action_space: gym.Space[Any] = CARTPOLE_ACTIONS,
    *connectors: Any,
    capacity_steps: int = 100_000,
    hold: bool = False,
    need_logp: bool = True,
    complete_episodes: bool = False,
    first_version: int | None = 1,
    steps_per_upload: int = 100,
    **settings: Any,
) -> Iterator[ExportingServer]:
    """A server for clients that act alone; ``settings`` go to its configuration."""
    if algorithm is None:
        algorithm = PPOConfig().rl_module(model_config={"fcnet_hiddens": [8]})
    under_test = ExportingServer(
        build(algorithm, observation_space, action_space, *connectors),
        PolicyServerConfig(**{"port": 0, "drain_s": 0.5, **settings}),
        capacity_steps=capacity_steps,
        hold=hold,
        need_logp=need_logp,
        complete_episodes=complete_episodes,
        first_version=first_version,
        remote_only=None,
        steps_per_upload=steps_per_upload,
    )
    try:
        yield under_test
    finally:
        under_test.server.stop()
