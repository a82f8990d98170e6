"""Local inference: acting, uploading, and following the policy.

    python -m benchmarks.local

A real CartPole, a 64x64 policy, every step acknowledged by a policy server in another process that
hands it to ``sample()``; beside it the same graph run bare, RLlib's own env runner in-process, and
RLlib's TCP example, which cannot do without its learner. They take turns, so that a busy moment of
the machine hits all of them; medians.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import threading
import time
from typing import Any

import gymnasium as gym
import numpy as np
import psutil

from benchmarks import report
from benchmarks.serving import ServerProcess
from client_sdk import PolicyClient

GOAL_STEPS_PER_S = 25_000
GOAL_TIMES_BARE = 3.0
GOAL_FOLLOWING_S = 0.02
GOAL_CLIENT_MB = 100.0
GOAL_FIRST_ACTION_S = 0.5
_ACKNOWLEDGED_TIMEOUT_S = 30.0
_TCP_EXAMPLE_TIMEOUT_S = 120.0

_FRESH_CLIENT = """
import sys, time
start = time.perf_counter()
import numpy as np
from client_sdk import PolicyClient
with PolicyClient(sys.argv[1], "local") as client:
    client.get_action(client.start_episode(), np.zeros(4, np.float32))
    elapsed = time.perf_counter() - start
    rss = int(open("/proc/self/statm").read().split()[1]) * 4096
    print(f'{{"seconds": {elapsed}, "mb": {rss / 1e6}}}')
"""


# -- acting ----------------------------------------------------------------------------------------


def play(client: PolicyClient, env: gym.Env[Any, Any], steps: int) -> int:
    """Whole episodes of at least so many steps; returns how many it were."""
    done = 0
    while done < steps:
        with client.episode() as episode:
            observation, _ = env.reset()
            reward, terminated, truncated = 0.0, False, False
            while not (terminated or truncated):
                action = episode.act(observation, reward)
                observation, reward, terminated, truncated, _ = env.step(action)  # type: ignore[assignment]
                done += 1
            episode.end(observation, reward, terminated=terminated, truncated=truncated)
    return done


def steps_per_s(client: PolicyClient, env: gym.Env[Any, Any], steps: int) -> float:
    """From the first ``act`` until the server has acknowledged the last step."""
    before = client.stats.steps_uploaded
    start = time.perf_counter()
    done = play(client, env, steps)
    _await_acknowledged(client, before + done)
    return done / (time.perf_counter() - start)


def vector_steps_per_s(client: PolicyClient, n: int, calls: int) -> float:
    """Likewise, of N environments that step together."""
    envs = gym.make_vec("CartPole-v1", n, vectorization_mode="sync")
    before, done = client.stats.steps_uploaded, 0
    observations, _ = envs.reset()
    ended = np.zeros(n, np.bool_)
    start = time.perf_counter()
    with client.episodes(n) as batch:
        actions = batch.act(observations)
        for call in range(1, calls + 1):
            observations, rewards, terminated, truncated, _ = envs.step(actions)
            done += n - int(ended.sum())  # those that had ended are reset, which is no step
            if call == calls:
                truncated = ~terminated  # what is running goes up as well
            ended = terminated | truncated
            actions = batch.act(observations, rewards, terminated, truncated)
        _await_acknowledged(client, before + done)
        elapsed = time.perf_counter() - start
    envs.close()
    return done / elapsed


def _await_acknowledged(client: PolicyClient, steps: int) -> None:
    deadline = time.perf_counter() + _ACKNOWLEDGED_TIMEOUT_S
    tick = threading.Event()
    while client.stats.steps_uploaded < steps:
        if time.perf_counter() > deadline:
            missing = steps - client.stats.steps_uploaded
            raise RuntimeError(f"{missing} steps were not acknowledged")
        tick.wait(0.001)


def latencies(client: PolicyClient, calls: int) -> tuple[float, float]:
    """Median seconds of one ``act``, and of the bare graph beside it."""
    from client_sdk.onnx_policy import OnnxPolicy

    observation = np.zeros(4, np.float32)
    policy = client._actor._steps._feed.policy  # type: ignore[attr-defined]
    loaded = policy._onnx
    assert isinstance(loaded, OnnxPolicy)
    feeds = {each.name: observation[None] for each in loaded.spec.inputs}
    feeds[loaded.spec.noise.input] = np.zeros((1, loaded.spec.noise.size), np.float32)
    acting, bare = [], []
    with client.episode(training_enabled=False) as episode:
        episode.act(observation)
        for _ in range(calls):
            start = time.perf_counter()
            episode.act(observation, 1.0)
            middle = time.perf_counter()
            loaded._run(loaded._fetched, feeds, None)
            bare.append(time.perf_counter() - middle)
            acting.append(middle - start)
    return statistics.median(acting), statistics.median(bare)


def rllib_steps_per_s(envs: int, steps: int, rounds: int) -> list[float]:
    """RLlib's own runner, in this process."""
    from ray.rllib.algorithms.ppo import PPOConfig
    from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner

    config = (
        PPOConfig()
        .environment("CartPole-v1")
        .env_runners(num_env_runners=0, num_envs_per_env_runner=envs)
        .rl_module(model_config={"fcnet_hiddens": [64, 64], "vf_share_layers": False})
    )
    runner = SingleAgentEnvRunner(config=config, worker_index=0)
    runner.sample(num_timesteps=steps // 4, random_actions=False)
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        episodes = runner.sample(num_timesteps=steps, random_actions=False)
        found.append(sum(map(len, episodes)) / (time.perf_counter() - start))
    runner.stop()
    return found


def tcp_example_steps_per_s() -> float:
    """RLlib's TCP example, in processes of its own."""
    command = [sys.executable, "-m", "benchmarks.rllib_tcp", "--iterations", "2"]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=_TCP_EXAMPLE_TIMEOUT_S
    )
    return float(done.stdout.split()[-1])


# -- following the policy --------------------------------------------------------------------------


class Follower(threading.Thread):
    """A client that acts all the time, and notes when it first acted with each version."""

    def __init__(self, address: str, pause_s: float) -> None:
        super().__init__(daemon=True)
        self.first_at: dict[int, float] = {}
        self.ready = threading.Event()
        self.over = threading.Event()
        self._address = address
        self._pause_s = pause_s

    def run(self) -> None:
        """Act until it is over."""
        observation = np.zeros(4, np.float32)
        with (
            PolicyClient(self._address, "local") as client,
            client.episode(training_enabled=False) as episode,
        ):
            while not self.over.is_set():
                episode.act(observation)
                version = client.policy_version
                if version not in self.first_at:
                    self.first_at[version] = time.monotonic()
                self.ready.set()
                self.over.wait(self._pause_s)


def following(clients: int, versions: int, hidden: int) -> dict[str, float]:
    """Seconds from ``set_state`` to the first action, and what a version costs the server."""
    with ServerProcess(hidden=hidden, versions=True) as server:
        process = psutil.Process(server.pid)
        # Nearly idle, so that the policy's way is measured and not the wait for a core.
        followers = [Follower(server.address, 0.0005) for _ in range(clients)]
        for follower in followers:
            follower.start()
            follower.ready.wait(30.0)
        delays = []
        used = sum(process.cpu_times()[:2])
        for _ in range(versions):
            version, at = server.publish()
            deadline = time.monotonic() + 10.0
            tick = threading.Event()
            while any(version not in each.first_at for each in followers):
                if time.monotonic() > deadline:
                    raise RuntimeError(f"version {version} did not arrive")
                tick.wait(0.002)
            delays += [each.first_at[version] - at for each in followers]
        used = sum(process.cpu_times()[:2]) - used
        for follower in followers:
            follower.over.set()
            follower.join(10.0)
        return {
            "clients": clients,
            "hidden": hidden,
            "p50_s": statistics.median(delays),
            "server_cpu_s_per_version": used / versions,
        }


# -- the client's process --------------------------------------------------------------------------


def footprint(rounds: int) -> dict[str, float]:
    """Medians of fresh client processes: MB resident, seconds from import to the first action."""
    found = []
    with ServerProcess() as server:
        for _ in range(rounds):
            command = [sys.executable, "-c", _FRESH_CLIENT, server.address]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found.append(json.loads(done.stdout))
    return {key: statistics.median(each[key] for each in found) for key in ("seconds", "mb")}


def main() -> None:
    """Measure, print, write."""
    parser = report.arguments(__doc__ or "")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200_000, help="per measurement")
    parser.add_argument("--versions", type=int, default=50)
    options = parser.parse_args()

    with contextlib.ExitStack() as stack:
        server = stack.enter_context(ServerProcess())
        client = stack.enter_context(PolicyClient(server.address, "local"))
        env = gym.make("CartPole-v1")
        play(client, env, 5_000)
        local, vector, tcp = [], [], []
        rllib: dict[int, list[float]] = {1: [], 8: []}
        for _ in range(options.rounds):
            local.append(steps_per_s(client, env, options.steps))
            vector.append(vector_steps_per_s(client, 8, options.steps // 8))
            for envs in rllib:
                rllib[envs] += rllib_steps_per_s(envs, options.steps // 40, 1)
            tcp.append(tcp_example_steps_per_s())
        act_s, bare_s = latencies(client, options.steps // 20)
        stats = client.stats
    one = following(1, options.versions, 256)
    four = following(4, options.versions, 256)
    per_client_s = (four["server_cpu_s_per_version"] - one["server_cpu_s_per_version"]) / 3
    fresh = footprint(options.rounds)

    speeds = {
        "local, 1 environment": local,
        "local, 8 environments": vector,
        "RLlib in-process, 1 environment": rllib[1],
        "RLlib in-process, 8 environments": rllib[8],
        "RLlib's TCP example, 1 environment, learning": tcp,
    }
    report.print_table(
        "CartPole, 64x64 policy, act to acknowledged upload",
        [
            {
                "who": name,
                "env steps/s": f"{statistics.median(found):,.0f}"
                + report.verdict(
                    statistics.median(found), GOAL_STEPS_PER_S if found is local else None
                ),
            }
            for name, found in speeds.items()
        ],
    )
    report.print_table(
        "Latency and footprint",
        [
            {
                "what": "act(), p50",
                "value": f"{act_s * 1e6:.1f} us",
                "beside": f"bare graph {bare_s * 1e6:.1f} us: {act_s / bare_s:.2f} times"
                + report.verdict(act_s / bare_s, GOAL_TIMES_BARE, at_most=True),
            },
            {
                "what": "set_state to first action, 256x256, p50",
                "value": f"{one['p50_s'] * 1e3:.1f} ms"
                + report.verdict(one["p50_s"] * 1e3, GOAL_FOLLOWING_S * 1e3, at_most=True),
                "beside": f"4 clients: {four['p50_s'] * 1e3:.1f} ms",
            },
            {
                "what": "server CPU per version",
                "value": f"{one['server_cpu_s_per_version'] * 1e3:.1f} ms",
                "beside": f"each further client {per_client_s * 1e3:.2f} ms",
            },
            {
                "what": "import to first action",
                "value": f"{fresh['seconds']:.2f} s"
                + report.verdict(fresh["seconds"], GOAL_FIRST_ACTION_S, at_most=True),
                "beside": "",
            },
            {
                "what": "client's memory",
                "value": f"{fresh['mb']:.0f} MB"
                + report.verdict(fresh["mb"], GOAL_CLIENT_MB, at_most=True),
                "beside": "",
            },
        ],
    )
    print(f"uploaded {stats.steps_uploaded} steps in {stats.requests} requests")
    report.write_json(
        options.results,
        "local",
        {
            "env_steps_per_s": speeds,
            "act_p50_s": act_s,
            "bare_graph_p50_s": bare_s,
            "following": [one, four],
            "server_cpu_s_per_further_client": per_client_s,
            "fresh_client": fresh,
        },
    )


if __name__ == "__main__":
    main()
