"""Servers for clients of either inference mode, whose policy does what a test wants."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import torch
from ray.rllib.algorithms.ppo import PPOConfig

from policy_server.config import PolicyServerConfig
from policy_server.onnx_engine.factory import OnnxEnginePolicy
from tests.client.support import LOCAL_KINDS
from tests.inference.modules import build
from tests.server.exporting import ExportingServer
from tests.servers import CARTPOLE_ACTIONS, CARTPOLE_OBSERVATIONS, ServerUnderTest, serving

CERTAIN = 20.0
"""Logits so far apart that noise changes nothing."""


class ConstantServer(ExportingServer):
    """Publishes policies that always choose the same action of a Discrete space."""

    def publish(self, version: int, action: Any = None) -> OnnxEnginePolicy:
        logits = torch.full((int(self.action_space_given.n),), -CERTAIN)
        logits[0 if action is None else action] = CERTAIN
        with torch.no_grad():
            for parameter in self.built.module.parameters():
                parameter.zero_()
            *_, bias = self.built.module.pi.parameters()
            bias.copy_(logits)
        policy = self.factory.build(version, 0, self.views.freeze(version))
        self.policies.publish(policy)
        return policy

    @property
    def action_space_given(self) -> Any:
        return self.built.action_space


@contextlib.contextmanager
def serving_alone(
    observation_space: gym.Space[Any] = CARTPOLE_OBSERVATIONS,
    action_space: gym.Space[Any] = CARTPOLE_ACTIONS,
    *connectors: Any,
    capacity_steps: int = 100_000,
    hold: bool = False,
    need_logp: bool = True,
    first_version: int | None = 1,
    steps_per_upload: int = 100,
    **settings: Any,
) -> Iterator[ConstantServer]:
    """A server whose clients act alone; ``settings`` go to its configuration."""
    algorithm = PPOConfig().rl_module(model_config={"fcnet_hiddens": [8]})
    under_test = ConstantServer(
        build(algorithm, observation_space, action_space, *connectors),
        PolicyServerConfig(**{"port": 0, "drain_s": 0.5, **settings}),
        capacity_steps=capacity_steps,
        hold=hold,
        need_logp=need_logp,
        complete_episodes=False,
        first_version=first_version,
        remote_only=None,
        steps_per_upload=steps_per_upload,
    )
    try:
        yield under_test
    finally:
        under_test.server.stop()


def serving_for(
    kind: str, *spaces: Any, **settings: Any
) -> contextlib.AbstractContextManager[ServerUnderTest]:
    """A server for that kind of client."""
    return (serving_alone if kind in LOCAL_KINDS else serving)(*spaces, **settings)
