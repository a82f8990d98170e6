"""Large observations: they pass through, and nothing of them stays."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import psutil
from ray.rllib.connectors.env_to_module import FlattenObservations

from tests.server.exporting import exporting
from tests.server.talk import eventually, program

CAMERA = gym.spaces.Dict({"camera": gym.spaces.Box(0, 255, (84, 84, 4), np.uint8)})
STEPS, AT_A_TIME = 5000, 100

# One episode; prints how much its memory has grown since a fifth of it.
CLIENT = f"""
import sys
import numpy as np
from client_sdk import PolicyClient, Timeouts
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
camera = np.random.default_rng(0).integers(0, 255, (84, 84, 4), np.uint8)
most = warm = 0
with PolicyClient(sys.argv[1], "local", timeouts=Timeouts(close_s=20.0)) as client:
    with client.episode() as episode:
        for step in range({STEPS}):
            camera[0, 0] = step % 256
            episode.act({{"camera": camera}}, float(step > 0))
            most = max(most, resident())
            if step == {STEPS} // 5:
                warm = most
        episode.end({{"camera": camera}}, 1.0, truncated=True)
    most = max(most, resident())
print(most - warm)
"""


def test_memory_stays_flat_on_both_sides_however_many_images_an_episode_has():
    connectors = (FlattenObservations,)
    with (
        exporting(
            None, CAMERA, gym.spaces.Discrete(2), *connectors, capacity_steps=2 * AT_A_TIME
        ) as server,
        program(CLIENT, server.address) as client,
    ):
        try:
            memory = psutil.Process().memory_info
            eventually(lambda: server.ledger()["received"], within_s=60)
            taken, most, warm = 0, 0, 0
            while taken < STEPS:
                for chunk in server.collect(AT_A_TIME):
                    taken += chunk.steps
                    server.buffer.ledger.deliver(chunk.steps)
                    chunk.settle()
                most = max(most, memory().rss)
                if taken <= STEPS // 5:
                    warm = most
            # 113 MB passed through meanwhile.
            assert most - warm < 30e6
            assert server.unaccounted() == 0
            assert client.wait(20) == 0
            assert client.stdout is not None
            assert int(client.stdout.read()) < 30e6
        finally:
            client.kill()
