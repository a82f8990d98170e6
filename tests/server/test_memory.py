"""Messages that are refilled for each step: nothing of what they held stays."""

from __future__ import annotations

import gc
from collections.abc import Callable

import gymnasium as gym
import numpy as np
import psutil

from client_sdk import PolicyClient
from client_sdk.wire.batches import SpaceCodec
from policy_server.answers import _Template
from tests.servers import CARTPOLE_ACTIONS, CountingPolicy, serving

CAMERA = gym.spaces.Box(0, 255, (84, 84, 4), np.uint8)
WARM_UP, STEPS = 500, 3000


class Forgetful(CountingPolicy):
    """Remembers nothing."""

    def infer(self, observations, greedy, contexts):
        batch = super().infer(observations, greedy, contexts)
        self.asked.clear()
        return batch


def growth_bytes(step: Callable[[int], object]) -> int:
    """Of this process, over ``STEPS`` calls; without what the collector would find."""
    memory = psutil.Process().memory_info
    for number in range(WARM_UP):
        step(number)
    gc.collect()  # an episode and its agents refer to each other
    before = memory().rss
    for number in range(STEPS):
        step(number)
        if number % 100 == 0:
            gc.collect()
    gc.collect()
    return memory().rss - before


def test_images_that_were_sent_are_gone():
    with serving(observation_space=CAMERA) as server, PolicyClient(server.address) as client:
        server.policies.publish(Forgetful(2, CARTPOLE_ACTIONS, 1))
        camera = CAMERA.sample()
        with client.episode(training_enabled=False) as episode:
            grown = growth_bytes(lambda _: episode.act(camera))
            episode.abandon()
    # 85 MB went out, and came in.
    assert grown < 20e6


def test_images_of_first_steps_are_gone_as_well():
    with serving(observation_space=CAMERA) as server, PolicyClient(server.address) as client:
        server.policies.publish(Forgetful(2, CARTPOLE_ACTIONS, 1))
        camera = CAMERA.sample()

        def one_step(_: int) -> None:
            with client.episode(training_enabled=False) as episode:
                episode.act(camera)

        assert growth_bytes(one_step) < 20e6


def test_actions_that_were_answered_are_gone():
    codec = SpaceCodec(gym.spaces.Box(-1, 1, (25_000,), np.float32))
    template, columns = _Template(codec, 1), codec.zeros(1)
    # 300 MB.
    assert growth_bytes(lambda number: template.fill(number, 1, columns)) < 20e6
