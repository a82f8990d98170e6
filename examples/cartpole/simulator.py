"""The client of remote.py and local.py: CartPoles that drive their own loop. Without ray or torch."""

import contextlib
import sys

import gymnasium

from client_sdk import PolicyClient


def main(inference_mode: str, num_envs: int, address: str) -> None:
    envs = gymnasium.make_vec("CartPole-v1", num_envs, vectorization_mode="sync")
    with PolicyClient(address, inference_mode) as client, client.episodes(num_envs) as batch:
        observations, _ = envs.reset()
        actions = batch.act(observations)
        while True:
            actions = batch.act(*envs.step(actions)[:4])


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
