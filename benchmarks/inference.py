"""The ONNX engine against RLlib's own module and connectors.

    python -m benchmarks.inference

Both engines choose, sample and rate the actions of the same rows, one thread, no gRPC. Best of many
repetitions: the work itself, without what else the machine does.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np

from benchmarks import report
from policy_server.experience import RowContext

_ROWS = (1, 8, 64, 256)
_HIDDEN = (64, 256)


def policies(hidden: int) -> tuple[Any, Any]:
    """The same PPO policy of two hidden layers, by either engine."""
    import torch
    from ray.rllib.algorithms.ppo import PPOConfig

    from policy_server.env_runner import PolicyServerEnvRunner
    from policy_server.inference import build_factory
    from policy_server.rl_module_engine import RLModuleFactory, RLModuleSpaces

    torch.set_num_threads(1)
    spaces = gym.spaces.Box(-np.inf, np.inf, (4,), np.float32), gym.spaces.Discrete(2)
    config = (
        PPOConfig()
        .environment(observation_space=spaces[0], action_space=spaces[1])
        .env_runners(env_runner_cls=PolicyServerEnvRunner, num_env_runners=1)
        .rl_module(model_config={"fcnet_hiddens": [hidden, hidden], "vf_share_layers": False})
    )
    runner = PolicyServerEnvRunner(config=config, worker_index=0)  # index 0 of 1: serves nobody
    pipelines = runner._env_to_module, runner._module_to_env
    onnx = build_factory(config, runner.module, *spaces, *pipelines)
    if onnx.name != "onnx":
        raise RuntimeError(f"no graph to compare with: {onnx.reason}")
    rl_module = RLModuleFactory(
        "for comparison",
        module=runner.module,
        env_to_module=pipelines[0],
        module_to_env=pipelines[1],
        spaces=RLModuleSpaces(*spaces, lookback=1, shift=True),
    )
    return onnx.build(1, 0, None), rl_module.build(1, 0, None)


def best_us(call: Callable[[], Any]) -> float:
    """Microseconds of one call."""
    timer = timeit.Timer(call)
    number = max(3, int(0.02 / max(timer.timeit(3) / 3, 1e-6)))
    return min(timer.repeat(15, number)) / number * 1e6


def main() -> None:
    """Measure, print, write."""
    options = report.arguments(__doc__ or "").parse_args()
    results = []
    for hidden in _HIDDEN:
        onnx, rl_module = policies(hidden)
        for rows in _ROWS:
            observations = {"": np.random.default_rng(0).normal(size=(rows, 4)).astype(np.float32)}
            greedy = np.zeros(rows, np.bool_)
            contexts = [RowContext() for _ in range(rows)]

            def infer(policy: Any) -> Callable[[], Any]:
                return lambda: policy.infer(observations, greedy, contexts)  # noqa: B023

            results.append(
                {
                    "hidden": hidden,
                    "rows": rows,
                    "onnx_us": best_us(infer(onnx)),
                    "rl_module_us": best_us(infer(rl_module)),
                }
            )
    report.print_table(
        "One inference, actions sampled and rated",
        [
            {
                "policy": f"{result['hidden']}x{result['hidden']}",
                "rows": result["rows"],
                "ONNX engine us": f"{result['onnx_us']:.1f}",
                "RLModule engine us": f"{result['rl_module_us']:,.0f}",
                "times": f"{result['rl_module_us'] / result['onnx_us']:.0f}",
            }
            for result in results
        ],
    )
    report.write_json(options.results, "inference", {"results": results})


if __name__ == "__main__":
    main()
