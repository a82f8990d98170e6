"""A simulator that drives its own loop and learns from it. Needs no ray and no torch."""

import sys

import gymnasium

from client_sdk import PolicyClient


def main(address: str, episodes: int) -> None:
    simulator = gymnasium.make("CartPole-v1")  # stands for yours
    with PolicyClient(address) as client:
        for number in range(episodes):
            observation, _ = simulator.reset()
            reward, total, terminated, truncated = 0.0, 0.0, False, False
            with client.episode() as episode:
                while not (terminated or truncated):
                    action = episode.act(observation, reward)
                    observation, reward, terminated, truncated, _ = simulator.step(action)
                    total += reward
                episode.end(observation, reward, terminated=terminated, truncated=truncated)
            print(f"episode {number}: return {total:g}, policy version {client.policy_version}")


if __name__ == "__main__":
    where = sys.argv[1] if len(sys.argv) > 1 else "localhost:9900"
    how_many = int(sys.argv[2]) if len(sys.argv) > 2 else 1000
    main(where, how_many)
