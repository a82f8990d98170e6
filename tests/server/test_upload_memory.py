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

# One episode that never ends, as chunks of 2.8 MB.
CLIENT = f"""
import sys
import numpy as np
from tests.server.uploading import Uploader
client = Uploader(sys.argv[1], options=[("grpc.max_receive_message_length", 2**26)])
client.fly()
rng = np.random.default_rng(0)
for first in range(0, {STEPS}, {AT_A_TIME}):
    camera = rng.integers(0, 255, ({AT_A_TIME} + 1, 84, 84, 4), np.uint8)
    client.deliver(client.chunk(1, first, {{"camera": camera}}))
client.close_session()
"""


def test_memory_stays_flat_however_many_images_come():
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
        finally:
            client.kill()
