"""A policy server in a process of its own, without a Ray cluster: what a remote env runner does.

It builds the real ``PolicyServerEnvRunner``, publishes weights, and calls ``sample()`` without
pause, as RLlib does while it has nothing to learn. The first line of its output is the address;
each further line, and the last one at the end of its input, is a JSON object::

    with ServerProcess() as server:
        server.address, server.pid
        numbers = server.stop()

With ``versions=True`` it does not sample, but publishes other weights whenever it is told to.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

_END_TIMEOUT_S = 20.0


class ServerProcess(contextlib.AbstractContextManager["ServerProcess"]):
    """The process, and its end.

    Attributes:
        address: HOST:PORT.
        pid: Of the process.
    """

    def __init__(
        self,
        *,
        hidden: int = 64,
        buffer_fragments: float = 2.0,
        versions: bool = False,
        command: Sequence[str] = (),
    ) -> None:
        """Start it, and wait for its address; ``command`` is a module and its arguments instead."""
        if not command:
            command = ["benchmarks.serving", f"--hidden={hidden}"]
            command += [f"--buffer-fragments={buffer_fragments}", *["--versions"] * versions]
        self._process = subprocess.Popen(
            [sys.executable, "-m", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid
        self.address = self._read_line()["address"]

    def _read_line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                numbers: dict[str, Any] = json.loads(line)
                return numbers
        raise RuntimeError("the server process ended early")

    def publish(self) -> tuple[int, float]:
        """Have it publish other weights; returns their version and when they came.

        That is the system-wide monotonic clock at the call of ``set_state``.
        """
        assert self._process.stdin is not None
        self._process.stdin.write("publish\n")
        self._process.stdin.flush()
        told = self._read_line()
        return told["version"], told["at"]

    def stop(self) -> dict[str, Any]:
        """End it; returns its last numbers: the ledger and the server's counts."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        numbers = self._read_line()
        self._process.wait(_END_TIMEOUT_S)
        return numbers

    def __exit__(self, *exception: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait(_END_TIMEOUT_S)


def _serve(hidden: int, buffer_fragments: float, *, versions: bool) -> None:
    import gymnasium as gym
    from ray.rllib.algorithms.ppo import PPOConfig

    from policy_server import PolicyServerConfig, PolicyServerEnvRunner
    from policy_server.env_runner import dedicate_process

    dedicate_process()
    env = gym.make("CartPole-v1")
    config = (
        PPOConfig()
        .environment(
            observation_space=env.observation_space,
            action_space=env.action_space,
            env_config=PolicyServerConfig(
                port=0,
                while_learning="serve",
                max_policy_lag=None,
                buffer_fragments=buffer_fragments,
            ).to_env_config(),
        )
        .env_runners(
            env_runner_cls=PolicyServerEnvRunner,
            num_env_runners=0,
            rollout_fragment_length=4000,
        )
        .rl_module(model_config={"fcnet_hiddens": [hidden, hidden], "vf_share_layers": False})
    )
    runner = PolicyServerEnvRunner(config=config, worker_index=0)
    runner.set_state(state={"rl_module": runner.module.get_state(), "weights_seq_no": 1})
    print(json.dumps({"address": runner.address}), flush=True)
    if versions:
        _publish(runner)
        runner.stop()
        return

    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    steps = 0
    while not ended.is_set():
        steps += sum(len(episode) for episode in runner.sample())
        runner.get_metrics()
    ledger = runner._buffer.ledger.snapshot()
    print(json.dumps({"handed_over": steps, "ledger": ledger}), flush=True)
    runner.stop()


def _publish(runner: Any) -> None:
    """Other weights for each line of input."""
    for version, _ in enumerate(sys.stdin, start=2):
        state = {name: value + 1e-3 * version for name, value in runner.module.get_state().items()}
        at = time.monotonic()
        runner.set_state(state={"rl_module": state, "weights_seq_no": version})
        print(json.dumps({"version": version, "at": at}), flush=True)
    print(json.dumps({"versions": version}), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--buffer-fragments", type=float, default=2.0)
    parser.add_argument("--versions", action="store_true")
    options = parser.parse_args()
    _serve(options.hidden, options.buffer_fragments, versions=options.versions)
