"""RLlib's own TCP example, its client and its learner, as a peer: prints env steps/s.

    python -m benchmarks.rllib_tcp

Its one client acts by a copy of the module in torch, and waits while the learner learns.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import socket
import statistics
import time

import gymnasium as gym


def _play(port: int) -> None:
    from ray.rllib.examples.envs.classes.utils.dummy_external_client import _dummy_external_client

    with contextlib.redirect_stdout(io.StringIO()):
        _dummy_external_client(port)


def steps_per_s(iterations: int) -> list[float]:
    """Of each iteration but the first."""
    from ray.rllib.algorithms.ppo import PPOConfig
    from ray.rllib.env.external.env_runner_server_for_external_inference import (
        EnvRunnerServerForExternalInference,
    )

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    env = gym.make("CartPole-v1")
    config = (
        PPOConfig()
        .environment(
            observation_space=env.observation_space,
            action_space=env.action_space,
            env_config={"port": port},
        )
        .env_runners(
            env_runner_cls=EnvRunnerServerForExternalInference,
            num_env_runners=0,
            create_env_on_local_worker=True,
            rollout_fragment_length=4000,
        )
        .training(train_batch_size_per_learner=4000, minibatch_size=128, num_epochs=6, lr=0.0003)
        .rl_module(model_config={"fcnet_hiddens": [64, 64], "vf_share_layers": True})
    )
    client = multiprocessing.get_context("spawn").Process(target=_play, args=(port,), daemon=True)
    algo = config.build_algo()
    client.start()
    try:
        found, before = [], 0
        for _ in range(iterations + 1):
            start = time.perf_counter()
            steps = algo.train()["num_env_steps_sampled_lifetime"]
            found.append((steps - before) / (time.perf_counter() - start))
            before = steps
        return found[1:]
    finally:
        client.kill()
        client.join(10.0)
        algo.stop()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="RLlib's TCP example: env steps/s.")
    parser.add_argument("--iterations", type=int, default=5)
    print(statistics.median(steps_per_s(parser.parse_args().iterations)), flush=True)


if __name__ == "__main__":
    main()
