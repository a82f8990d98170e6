"""What the four ways share: PPO as RLlib has tuned it for CartPole, and the loop around train()."""

from __future__ import annotations

import argparse
import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import ray
import torch
from ray.rllib.algorithms.ppo import PPOConfig

from policy_server.measuring import MeasuredTraining

ENVS = 8


def ppo() -> PPOConfig:
    """The hyperparameters of RLlib's own tuned example, for batches of 4,000 steps."""
    return (
        PPOConfig()
        .training(lr=3e-4, num_epochs=6, vf_loss_coeff=0.01)
        .training(train_batch_size_per_learner=4000, minibatch_size=128)
        .rl_module(model_config={"fcnet_hiddens": [64, 64], "vf_share_layers": True})
    )


def learn(config: PPOConfig, simulators: Sequence[str] = ()) -> None:
    """Train until --stop-return.

    Args:
        config: Of the training.
        simulators: A program beside this one, and its arguments but the last, which is the address
            of the server; none, where RLlib steps the environment.
    """
    parser = argparse.ArgumentParser(description="PPO on CartPole-v1")
    parser.add_argument("--seed", type=int, default=1, help="default: 1")
    parser.add_argument("--stop-return", type=float, default=450.0, help="default: 450")
    parser.add_argument("--stop-iters", type=int, default=150, help="default: 150")
    parser.add_argument("--report", type=Path, help="write there what it cost, as JSON")
    options = parser.parse_args()

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends all in order, as Ctrl-C
    torch.set_num_threads(1)  # all ways alike; threads wait for each other on small machines
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    with contextlib.ExitStack() as ends:
        ends.callback(ray.shutdown)
        algo = config.debugging(seed=options.seed).build_algo()
        ends.callback(algo.stop)
        if simulators:
            (address,) = filter(None, algo.env_runner_group.foreach_env_runner(lambda r: r.address))
            ends.enter_context(running([*simulators, address]))
        training = MeasuredTraining(algo)
        for progress in training.iterations(options.stop_return, options.stop_iters):
            print(progress.line(), flush=True)
        if options.report is not None:
            training.write(options.report)


@contextlib.contextmanager
def running(arguments: Sequence[str]) -> Iterator[None]:
    """A program of this directory, which ends with the context."""
    program, *others = arguments
    process = subprocess.Popen([sys.executable, str(Path(__file__).with_name(program)), *others])
    try:
        yield
    finally:
        process.terminate()
        process.wait()
