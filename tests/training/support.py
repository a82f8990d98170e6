"""Trainings with simulators in other processes, as in the field."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium as gym
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig

from policy_server import PolicyServerConfig, PolicyServerEnvRunner


def over(
    env_id: str, config: AlgorithmConfig, *, num_env_runners: int = 0, **settings: Any
) -> AlgorithmConfig:
    """The config of a training whose simulators run that environment."""
    env = gym.make(env_id)
    settings = {"port": 0, "drain_s": 0.5, **settings}
    return (
        config.environment(
            observation_space=env.observation_space,
            action_space=env.action_space,
            env_config=PolicyServerConfig(**settings).to_env_config(),
        )
        .env_runners(env_runner_cls=PolicyServerEnvRunner, num_env_runners=num_env_runners)
        .debugging(seed=1)
    )


def over_cartpole(config: AlgorithmConfig, **settings: Any) -> AlgorithmConfig:
    """The config of a training whose simulators play CartPole."""
    return over("CartPole-v1", config, **settings)


def address_of(algo: Algorithm) -> str:
    """Where simulators connect."""
    addresses = algo.env_runner_group.foreach_env_runner(lambda runner: runner.address)
    return next(address for address in addresses if address)


@contextlib.contextmanager
def building(config: AlgorithmConfig) -> Iterator[Algorithm]:
    """An algorithm, stopped at the end, its servers before its actors."""
    algo = config.build_algo()
    try:
        yield algo
    finally:
        algo.env_runner_group.foreach_env_runner("stop", timeout_seconds=10)
        algo.stop()


@contextlib.contextmanager
def simulators(env_id: str, address: str, envs: int, *options: str) -> Iterator[None]:
    """Simulators in a process of their own, which knows neither Ray nor torch."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "client_sdk.cli", "run", env_id, "--quiet"),
            *("--server", address, "--envs", str(envs), "--seed", "1", *options),
        ]
    )
    try:
        yield
    finally:
        failed = process.poll()
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if failed:
        raise RuntimeError(f"the simulators ended with exit code {failed}")


def train_until(
    algo: Algorithm, reached: Callable[[dict[str, Any]], bool], *, iterations: int
) -> dict[str, Any]:
    """Train until something is reached, or fail.

    Returns:
        The last result.
    """
    for _ in range(iterations):
        result = algo.train()
        if reached(result):
            return result
    raise AssertionError(f"not reached after {iterations} iterations: {result['env_runners']}")


def mean_return(result: dict[str, Any]) -> float:
    """Of the latest episodes; -inf before the first has ended."""
    return float(result["env_runners"].get("episode_return_mean", float("-inf")))
