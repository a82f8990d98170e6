"""What a training costs: time, processor time of all its processes, messages and bytes by env step.

Main thread of the training process, around ``train()``. The clock starts with the first one.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from client_sdk import RemoteEnv, RemoteVectorEnv
from policy_server.commands.progress import Progress, ReturnWindow, progress_of

if TYPE_CHECKING:
    from ray.rllib.algorithms.algorithm import Algorithm

_RUNNERS_TIMEOUT_S = 30.0


@dataclasses.dataclass(frozen=True)
class Costs:
    """What was used since some moment, by all processes together."""

    env_steps: int
    """Steps that the environments took."""
    messages: int
    """Between the runners and the simulators, both directions."""
    bytes: int
    """In these messages, HTTP/2's frames left out."""
    cpu_s: float
    """User and system time of the training process and everything below it."""

    def __sub__(self, before: Costs) -> Costs:
        return Costs(
            *(mine - other for mine, other in zip(_values(self), _values(before), strict=True))
        )


class MeasuredTraining:
    """An algorithm whose ``train()`` is watched.

    ::

        training = MeasuredTraining(algo)
        for progress in training.iterations(stop_return=450):
            print(progress.line())
        training.write("report.json")
    """

    def __init__(self, algo: Algorithm) -> None:
        self._algo = algo
        self._history: list[Progress] = []
        self._costs: Costs | None = None
        self._reached = False

    def iterations(
        self, stop_return: float = math.inf, stop_iters: int = 150
    ) -> Iterator[Progress]:
        """Train, and tell after each iteration how far it came; until one of both is reached.

        ``env_steps`` are those that the environments took, those that no learner saw included.
        """
        began = time.perf_counter()
        at_first = self._measure(0)
        returns = ReturnWindow()
        before = None
        for _ in range(stop_iters):
            result = self._algo.train()
            progress = progress_of(result, before, time.perf_counter() - began, returns)
            steps = max(_received(result), progress.env_steps)
            before = progress
            self._history.append(dataclasses.replace(progress, env_steps=steps))
            self._costs = self._measure(steps) - at_first
            yield self._history[-1]
            if progress.mean_return >= stop_return:
                self._reached = True
                return

    def write(self, path: Path) -> None:
        """Write what was measured, as JSON."""
        last, costs = self._history[-1], self._costs
        if costs is None:
            raise RuntimeError("nothing was measured yet")
        report = {
            "reached": self._reached,
            "wall_s": last.wall_s,
            "env_steps_per_s": costs.env_steps / last.wall_s,
            **dataclasses.asdict(costs),
            "curve": [
                {
                    "wall_s": progress.wall_s,
                    "env_steps": progress.env_steps,
                    # JSON knows no NaN.
                    "mean_return": None
                    if math.isnan(progress.mean_return)
                    else progress.mean_return,
                }
                for progress in self._history
            ],
        }
        path.write_text(json.dumps(report), encoding="utf-8")

    def _measure(self, env_steps: int) -> Costs:
        found = self._algo.env_runner_group.foreach_env_runner(
            _traffic_of,
            local_env_runner=self._algo.config.num_env_runners == 0,
            timeout_seconds=_RUNNERS_TIMEOUT_S,
        )
        messages, size_bytes = (sum(column) for column in zip(*found, strict=True))
        return Costs(env_steps, messages, size_bytes, _cpu_s())


def _values(costs: Costs) -> tuple[Any, ...]:
    return dataclasses.astuple(costs)


def _received(result: dict[str, Any]) -> int:
    """Steps that came to a policy server; 0 where there is none."""
    server = result.get("env_runners", {}).get("policy_server", {})
    return int(server.get("ledger", {}).get("received", 0))


def _traffic_of(runner: Any) -> tuple[int, int]:
    """Messages and bytes of one env runner, whichever of both directions it serves."""
    counts = [_counts_of(part) for part in _parts_of(runner)]
    return (
        sum(each["messages_received"] + each["messages_sent"] for each in counts),
        sum(each["bytes_received"] + each["bytes_sent"] for each in counts),
    )


def _parts_of(runner: Any) -> list[Any]:
    """Its policy server, or its environments."""
    server = getattr(runner, "_server", None)
    if server is not None:
        return [server]
    env = getattr(runner, "env", None)
    if env is None:
        return []
    env = env.unwrapped
    return [each.unwrapped for each in getattr(env, "envs", (env,))]


def _counts_of(part: Any) -> Mapping[str, int]:
    if isinstance(part, RemoteEnv | RemoteVectorEnv):
        return part.traffic
    stats: Callable[[], Mapping[str, int]] | None = getattr(part, "stats", None)
    return collections.Counter() if stats is None else stats()


def _cpu_s() -> float:
    """Of this process and all below it that are alive."""
    this = psutil.Process(os.getpid())
    total = 0.0
    for process in [this, *this.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total
