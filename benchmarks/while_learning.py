"""Action latency while the learner works, against the same server idle.

    python -m benchmarks.while_learning

PPO with ``while_learning="serve"``, one remote env runner, the learner in the training process on one
thread; one simulator process acts without pause, one row per message, and notes when it asked and
how long the answer took. Idle is before the first ``train()``; learning is between the beginning
and the end of each ``LearnerGroup.update``. The buffer is large enough never to fill.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import report

GOAL_RATIO = 5.0
GOAL_MS = 10.0
_BATCH = 4000
_IDLE_S = 5.0


def act_without_pause(address: str, path: Path) -> None:
    """In the simulator's process: act until told to stop, then write ``[N, 2]`` times in seconds."""
    from client_sdk import PolicyClient

    observation = np.zeros(4, np.float32)
    times = []
    stop = path.with_suffix(".stop")
    with PolicyClient(address) as client, client.episode() as episode:
        steps = 0
        while steps % 500 or not stop.exists():
            start = time.monotonic()
            episode.act(observation, 1.0 if steps else 0.0)
            times.append((start, time.monotonic() - start))
            steps += 1
        episode.end(observation, 1.0, truncated=True)
    np.save(path, np.array(times))


def measure(iterations: int, directory: Path) -> tuple[NDArray[np.float64], list[Any], float]:
    """Times of the actions, intervals of learning, and when ``train`` was first called."""
    import gymnasium as gym
    import ray
    import torch
    from ray.rllib.algorithms.ppo import PPOConfig

    from policy_server import PolicyServerConfig, PolicyServerEnvRunner

    torch.set_num_threads(1)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    env = gym.make("CartPole-v1")
    address_file = directory / "address"
    config = (
        PPOConfig()
        .environment(
            observation_space=env.observation_space,
            action_space=env.action_space,
            env_config=PolicyServerConfig(
                port=0,
                address_file=str(address_file),
                while_learning="serve",
                buffer_fragments=20,
            ).to_env_config(),
        )
        .env_runners(env_runner_cls=PolicyServerEnvRunner, num_env_runners=1)
        .training(train_batch_size_per_learner=_BATCH, minibatch_size=128, num_epochs=10)
        .rl_module(model_config={"fcnet_hiddens": [64, 64], "vf_share_layers": False})
    )
    algorithm = config.build_algo()
    learning: list[tuple[float, float]] = []
    update = algorithm.learner_group.update

    def timed_update(*args: Any, **kwargs: Any) -> Any:
        start = time.monotonic()
        try:
            return update(*args, **kwargs)
        finally:
            learning.append((start, time.monotonic()))

    algorithm.learner_group.update = timed_update
    path = directory / "times.npy"
    command = [sys.executable, "-m", "benchmarks.while_learning", "--act", str(path)]
    simulator = subprocess.Popen([*command, "--address", address_file.read_text()])
    try:
        time.sleep(_IDLE_S)
        trained_from = time.monotonic()
        for _ in range(iterations):
            algorithm.train()
        path.with_suffix(".stop").touch()
        simulator.wait(30)
    finally:
        if simulator.poll() is None:
            simulator.kill()
        algorithm.stop()
        ray.shutdown()
    return np.load(path), learning, trained_from


def plot(
    starts_s: NDArray[np.float64],
    latencies_ms: NDArray[np.float64],
    learning_s: NDArray[np.float64],
    directory: Path,
) -> None:
    """Each action's latency over time, with the learning shaded."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 4), layout="constrained")
    for index, (begin, end) in enumerate(learning_s):
        axis.axvspan(begin, end, color="tab:orange", alpha=0.2, label="_" * index + "learning")
    axis.plot(starts_s, latencies_ms, ".", markersize=1.5, color="tab:blue")
    axis.set_yscale("log")
    axis.set_xlabel("seconds")
    axis.set_ylabel("latency of an action [ms]")
    axis.legend(loc="upper right")
    axis.grid(alpha=0.2)
    path = directory / "while_learning.png"
    figure.savefig(path, dpi=150)
    print(f"written to {path}")


def main() -> None:
    """Measure, print, write, plot."""
    parser = report.arguments(__doc__ or "")
    parser.add_argument("--iterations", type=int, default=8)
    parser.add_argument("--act", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.act:
        act_without_pause(options.address, options.act)
        return

    with tempfile.TemporaryDirectory() as directory:
        times, learning, trained_from = measure(options.iterations, Path(directory))
    starts, latencies_ms = times[:, 0], times[:, 1] * 1e3
    idle = latencies_ms[(starts > starts[0] + 1.0) & (starts < trained_from - 0.1)]
    at_work = np.zeros(len(starts), np.bool_)
    for begin, end in learning:
        at_work |= (starts >= begin) & (starts < end)
    busy = latencies_ms[at_work]
    rows = []
    figures: dict[str, dict[str, float]] = {}
    for name, values in (("idle", idle), ("learning", busy)):
        p50, p99, worst = np.percentile(values, [50, 99, 100])
        figures[name] = {"p50_ms": p50, "p99_ms": p99, "max_ms": worst, "actions": len(values)}
        rows.append(
            {
                "server": name,
                "actions": f"{len(values):,}",
                "p50 ms": f"{p50:.2f}",
                "p99 ms": f"{p99:.2f}",
                "max ms": f"{worst:.1f}",
            }
        )
    report.print_table("Latency of one action, 64x64 policy, learner on one thread", rows)
    ratio = figures["learning"]["p99_ms"] / figures["idle"]["p99_ms"]
    print(
        f"p99 while learning: {figures['learning']['p99_ms']:.2f} ms, {ratio:.1f} times idle "
        f"(goal: at most {GOAL_RATIO:g} times idle or {GOAL_MS:g} ms); "
        f"{sum(end - begin for begin, end in learning):.1f} s of learning"
    )
    print(report.verdict(ratio, GOAL_RATIO, at_most=True).strip(" ()"), "times idle;", end=" ")
    print(
        report.verdict(figures["learning"]["p99_ms"], GOAL_MS, at_most=True).strip(" ()"), "ms p99"
    )
    report.write_json(
        options.results,
        "while_learning",
        {"latency": figures, "ratio_p99": ratio},
    )
    plot(starts - starts[0], latencies_ms, np.array(learning) - starts[0], options.results)


if __name__ == "__main__":
    main()
