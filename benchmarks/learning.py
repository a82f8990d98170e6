"""Wall time and env steps until PPO reaches a mean return of 450 on CartPole-v1.

    python -m benchmarks.learning

Three ways take turns, seed by seed: RLlib's own env runner with 8 sub-environments in the training
process, and a policy server in a remote env runner with 8 environments in one client process, which
asks for every action or acts with the downloaded policy. All have the hyperparameters of RLlib's
tuned CartPole example, the learner on one thread, and a process of their own for every training. The
clock runs from the first ``train()`` on; Ray's start is left out of all.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import report

GOAL = 450.0
ENVS = 8
MAX_ITERATIONS = 150
WAYS = {
    "rllib": "RLlib in-process, 8 sub-environments",
    "remote": "policy server, 8 simulators, remote inference",
    "local": "policy server, 8 simulators, local inference",
}
COLORS = {"rllib": "tab:gray", "remote": "tab:blue", "local": "tab:orange"}
GOAL_RATIO = {"remote": 1.3, "local": 1.0}
"""Of the wall time, to RLlib's."""


def train(way: str, seed: int) -> dict[str, Any]:
    """One training, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.learning", "--one", way, "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            result: dict[str, Any] = json.loads(line)
            return result
    raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")


def train_here(way: str, seed: int) -> dict[str, Any]:
    """Train until the goal; returns the curve."""
    import gymnasium as gym
    import ray
    import torch
    from ray.rllib.algorithms.ppo import PPOConfig

    from policy_server import PolicyServerConfig, PolicyServerEnvRunner

    torch.set_num_threads(1)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    config = (
        PPOConfig()
        .training(
            lr=3e-4,
            num_epochs=6,
            vf_loss_coeff=0.01,
            train_batch_size_per_learner=4000,
            minibatch_size=128,
        )
        .rl_module(model_config={"fcnet_hiddens": [64, 64], "vf_share_layers": True})
        .debugging(seed=seed)
    )
    simulators, ledger = None, {}
    with tempfile.TemporaryDirectory() as directory:
        if way == "rllib":
            config.environment("CartPole-v1").env_runners(
                num_env_runners=0, num_envs_per_env_runner=ENVS
            )
        else:
            env = gym.make("CartPole-v1")
            address_file = Path(directory) / "address"
            config.environment(
                observation_space=env.observation_space,
                action_space=env.action_space,
                env_config=PolicyServerConfig(
                    port=0, address_file=str(address_file)
                ).to_env_config(),
            ).env_runners(env_runner_cls=PolicyServerEnvRunner, num_env_runners=1)
        algorithm = config.build_algo()
        if way != "rllib":
            simulators = subprocess.Popen(
                [
                    *(sys.executable, "-m", "client_sdk.cli", "run", "CartPole-v1"),
                    *("--server", address_file.read_text(), "--envs", str(ENVS)),
                    *("--seed", str(seed), "--inference", way),
                ],
                stdout=subprocess.DEVNULL,
            )
            while not _connected(algorithm):
                time.sleep(0.05)
        start = time.perf_counter()
        curve = []
        try:
            for _ in range(MAX_ITERATIONS):
                result = algorithm.train()["env_runners"]
                curve.append(
                    {
                        "seconds": time.perf_counter() - start,
                        "env_steps": int(result["num_env_steps_sampled_lifetime"]),
                        "return": float(result.get("episode_return_mean", float("nan"))),
                    }
                )
                if way != "rllib":
                    curve[-1]["env_steps"] = int(result["policy_server"]["ledger"]["received"])
                if curve[-1]["return"] >= GOAL:
                    break
            if way != "rllib":
                # Of the metric, which is as of the last sample() call, this is the last word.
                ledger = _ledger(algorithm)
                curve[-1]["env_steps"] = ledger["received"]
        finally:
            if simulators is not None:
                simulators.terminate()
                simulators.wait(10)
            algorithm.stop()
            ray.shutdown()
    return {
        "way": way,
        "seed": seed,
        "reached": curve[-1]["return"] >= GOAL,
        "seconds": curve[-1]["seconds"],
        "env_steps": curve[-1]["env_steps"],
        "ledger": ledger,
        "curve": curve,
    }


def _ledger(algorithm: Any) -> dict[str, int]:
    """Where the steps of the one server went."""
    (ledger,) = algorithm.env_runner_group.foreach_env_runner(
        lambda runner: runner._server.ledger(), local_env_runner=False
    )
    return ledger


def _connected(algorithm: Any) -> bool:
    return any(
        algorithm.env_runner_group.foreach_env_runner(
            lambda runner: runner._server is not None and runner._server.sessions > 0,
            local_env_runner=False,
        )
    )


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Return over env steps and over wall time, a line per training."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, key, label in (
        (axes[0], "env_steps", "env steps"),
        (axes[1], "seconds", "wall time [s]"),
    ):
        for way, color in COLORS.items():
            for index, run in enumerate(run for run in runs if run["way"] == way):
                axis.plot(
                    [point[key] for point in run["curve"]],
                    [point["return"] for point in run["curve"]],
                    color=color,
                    alpha=0.8,
                    label=WAYS[way] if index == 0 else None,
                )
        axis.axhline(GOAL, color="black", linewidth=0.8, linestyle=":")
        axis.set_xlabel(label)
        axis.grid(alpha=0.2)
    axes[0].set_ylabel("mean episode return")
    axes[0].legend(loc="lower right")
    figure.suptitle("PPO on CartPole-v1: one line per seed")
    figure.savefig(path, dpi=150)
    print(f"written to {path}")


def main() -> None:
    """Measure, print, write, plot."""
    parser = report.arguments(__doc__ or "")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--one", choices=sorted(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(train_here(options.one, options.seed)), flush=True)
        return

    runs = []
    for seed in range(1, options.seeds + 1):
        for way, name in WAYS.items():
            run = train(way, seed)
            runs.append(run)
            print(
                f"seed {seed}: {name}: {run['seconds']:.1f} s, {run['env_steps']:,} env steps"
                + ("" if run["reached"] else " (goal not reached)"),
                flush=True,
            )
    by_way = {way: [run for run in runs if run["way"] == way] for way in WAYS}
    rows = [
        {
            "way": WAYS[way],
            "median s": f"{statistics.median(run['seconds'] for run in of_way):.1f}",
            "min..max s": _span([run["seconds"] for run in of_way], ".1f"),
            "median env steps": f"{statistics.median(run['env_steps'] for run in of_way):,.0f}",
            "min..max env steps": _span([run["env_steps"] for run in of_way], ",.0f"),
            "reached 450": f"{sum(run['reached'] for run in of_way)}/{len(of_way)}",
        }
        for way, of_way in by_way.items()
    ]
    report.print_table("Until a mean return of 450, CartPole-v1, PPO", rows)
    seconds = {
        way: statistics.median(run["seconds"] for run in of_way) for way, of_way in by_way.items()
    }
    steps = {way: [run["env_steps"] for run in of_way] for way, of_way in by_way.items()}
    ratios, within = {}, {}
    for way, goal in GOAL_RATIO.items():
        ratios[way] = seconds[way] / seconds["rllib"]
        within[way] = min(steps["rllib"]) <= statistics.median(steps[way]) <= max(steps["rllib"])
        print(
            f"{WAYS[way]}: wall time {ratios[way]:.2f} of RLlib's (goal: at most {goal:g}), median "
            f"env steps {'within' if within[way] else 'outside'} RLlib's minimum and maximum "
            "(goal: within)"
        )
    report.write_json(
        options.results,
        "learning",
        {"ratio_wall_time": ratios, "env_steps_within": within, "summary": rows, "runs": runs},
    )
    plot(runs, options.results / "learning.png")


def _span(values: list[float], form: str) -> str:
    return f"{min(values):{form}}..{max(values):{form}}"


if __name__ == "__main__":
    main()
