"""Environments stepped over gRPC, against peers and floors of the same run.

    python -m benchmarks.stepping --peers DIR

One CartPole through ``RemoteEnv`` beside a hand-written unary service, remote-gym, and a bare gRPC
echo of messages of that size, which steps nothing; 64 in one call through ``RemoteVectorEnv`` beside
that service and ``SyncVectorEnv`` in-process; observations of 84x84x4 bytes beside an echo of that
size. All take short turns, so that a busy moment of the machine hits all of them; medians over the
rounds, of ratios, too.
remote-gym is installed below ``--peers`` once, and left out, with the reason, where it cannot be.
"""

from __future__ import annotations

import contextlib
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from benchmarks import echo, report
from benchmarks.stepping_peers import RemoteGym, UnaryEnv, UnaryProcess, walk
from client_sdk import RemoteEnv, RemoteVectorEnv

MANY = 64
IMAGE_BYTES = 84 * 84 * 4

GOAL_TIMES_UNARY = 1.5
GOAL_TIMES_REMOTE_GYM = 2
GOAL_TIMES_UNARY_MANY = 20
GOAL_OF_IN_PROCESS = 0.4
GOAL_TIMES_ECHO = 1.5


class HostProcess(contextlib.AbstractContextManager["HostProcess"]):
    """``policy-client host``."""

    def __init__(self, env: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "client_sdk.cli", "host", env, "--port", "0"],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.address = self._process.stdout.readline().split()[-1]

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.wait(10)


def walk_many(envs: Any, calls: int) -> float:
    """Environment steps per second, ``MANY`` in each call."""
    actions = np.random.default_rng(0).integers(2, size=(calls + 20, MANY))
    envs.reset(seed=0)
    start = 0.0
    for number, action in enumerate(actions):
        if number == 20:
            start = time.perf_counter()
        envs.step(action)
    return MANY * calls / (time.perf_counter() - start)


def look(env: Any, steps: int) -> float:
    """Steps per second, each of which brings an image."""
    env.reset()
    start = 0.0
    for number in range(steps + 50):
        if number == 50:
            start = time.perf_counter()
        env.step(number % 6)
    return steps / (time.perf_counter() - start)


def mean_size(traffic: Mapping[str, int]) -> int:
    """Bytes of a message, in either direction."""
    messages = traffic["messages_sent"] + traffic["messages_received"]
    return (traffic["bytes_sent"] + traffic["bytes_received"]) // messages


def measure(ways: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each way reaches, in turns."""
    reached: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            reached[name].append(run())
    return reached


def ratio(reached: dict[str, list[float]], name: str, to: str) -> float:
    """Of one way to another, round by round."""
    pairs = zip(reached[name], reached[to], strict=True)
    return statistics.median(one / other for one, other in pairs)


def table(title: str, reached: dict[str, list[float]], notes: dict[str, str]) -> None:
    """Medians, and what they mean."""
    report.print_table(
        title,
        [
            {"": name, "steps/s": f"{statistics.median(rates):,.0f}", "goal": notes.get(name, "")}
            for name, rates in reached.items()
        ],
    )


def _remote_gym(directory: Path, stack: contextlib.ExitStack) -> RemoteGym | None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    try:
        return stack.enter_context(RemoteGym(directory, port))
    except OSError as error:
        print(f"left out: {error}")
        return None


def main() -> None:
    """Measure, print, write."""
    parser = report.arguments(__doc__ or "")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--seconds", type=float, default=0.2, help="per measurement, about")
    parser.add_argument(
        "--peers",
        type=Path,
        default=Path(tempfile.gettempdir()) / "policy-server-peers",
        help="directory where remote-gym is installed, and found the next time",
    )
    options = parser.parse_args()
    n = int(2000 * options.seconds)

    with contextlib.ExitStack() as stack:
        unary = stack.enter_context(UnaryEnv(stack.enter_context(UnaryProcess()).address))
        cartpole = stack.enter_context(HostProcess("CartPole-v1")).address
        images = stack.enter_context(HostProcess("benchmarks.stepping_peers:Images")).address
        peer = stack.enter_context(echo.EchoProcess()).address
        env = stack.enter_context(RemoteEnv(cartpole))
        envs = stack.enter_context(RemoteVectorEnv(cartpole, num_envs=MANY))
        local = gym.make_vec("CartPole-v1", num_envs=MANY, vectorization_mode="sync")
        stack.callback(local.close)
        viewer = stack.enter_context(RemoteEnv(images))
        remote_gym = _remote_gym(options.peers, stack)

        walk(env, 50)
        message_bytes = mean_size(env.traffic)
        ways: dict[str, Callable[[], float]] = {
            "unary service": lambda: walk(unary, n),
            "RemoteEnv": lambda: walk(env, n),
            "gRPC echo": lambda: echo.blocking(peer, message_bytes, n),
        }
        if remote_gym is not None:
            ways["remote-gym"] = lambda: remote_gym.walk(n // 2)
        one = measure(ways, options.rounds)
        many = measure(
            {
                "unary service": lambda: walk(unary, n),
                "RemoteVectorEnv": lambda: walk_many(envs, n // 4),
                "SyncVectorEnv": lambda: walk_many(local, n // 4),
            },
            options.rounds,
        )
        seen = measure(
            {
                "gRPC echo": lambda: echo.blocking(peer, IMAGE_BYTES, n),
                "RemoteEnv": lambda: look(viewer, n),
            },
            options.rounds,
        )

    figures = {
        "times_unary": ratio(one, "RemoteEnv", "unary service"),
        "echo_times_unary": ratio(one, "gRPC echo", "unary service"),
        "times_unary_many": ratio(many, "RemoteVectorEnv", "unary service"),
        "of_in_process": ratio(many, "RemoteVectorEnv", "SyncVectorEnv"),
        "times_echo": ratio(seen, "gRPC echo", "RemoteEnv"),
    }
    if remote_gym is not None:
        figures["times_remote_gym"] = ratio(one, "RemoteEnv", "remote-gym")
    said = f"{figures['times_unary']:.2f} x unary"
    said += report.verdict(figures["times_unary"], GOAL_TIMES_UNARY)
    if remote_gym is not None:
        said += f", {figures['times_remote_gym']:.1f} x remote-gym"
        said += report.verdict(figures["times_remote_gym"], GOAL_TIMES_REMOTE_GYM)
    floor = f"{figures['echo_times_unary']:.2f} x unary"
    table("One CartPole, one step per message", one, {"RemoteEnv": said, "gRPC echo": floor})
    said = f"{figures['times_unary_many']:.1f} x unary"
    said += report.verdict(figures["times_unary_many"], GOAL_TIMES_UNARY_MANY)
    said += f", {figures['of_in_process']:.2f} of in-process"
    said += report.verdict(figures["of_in_process"], GOAL_OF_IN_PROCESS)
    table(f"{MANY} CartPoles, one message for all", many, {"RemoteVectorEnv": said})
    said = f"{figures['times_echo']:.2f} x its time per step"
    said += report.verdict(figures["times_echo"], GOAL_TIMES_ECHO, at_most=True)
    table("Observations of 84x84x4 bytes", seen, {"RemoteEnv": said})
    report.write_json(
        options.results,
        "stepping",
        {"figures": figures, "one": one, "many": many, "images": seen},
    )


if __name__ == "__main__":
    main()
