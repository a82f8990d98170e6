"""Environments that hosts in other processes make, by the name of a function."""

import time

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class _Sleepy(gym.Wrapper):
    def step(self, action):
        print("stepping", flush=True)
        time.sleep(30)
        return super().step(action)


def sleepy():
    """CartPole, half a minute per step, and says so."""
    return _Sleepy(gym.make("CartPole-v1"))


class _Big(gym.Env):
    observation_space = spaces.Dict(
        {
            "camera": spaces.Box(0, 255, (1024, 1024, 3), np.uint8),
            "depth": spaces.Box(0.0, 1.0, (1536, 3072), np.float32),
        }
    )
    action_space = spaces.Dict({"paint": spaces.Box(0, 255, (1024, 1024, 3), np.uint8)})

    def _observe(self, camera):
        return {"camera": camera, "depth": np.zeros((1536, 3072), np.float32)}, {}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._observe(np.zeros((1024, 1024, 3), np.uint8))

    def step(self, action):
        observation, info = self._observe(action["paint"])
        return observation, 0.0, False, False, info


def big():
    """Observations of 21 MiB, actions of 3."""
    return _Big()
