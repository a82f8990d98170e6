"""Remote inference against a bare gRPC echo of the same sizes, in the same run.

    python -m benchmarks.acting

A 64x64 policy, rows of CartPole's size, experience recorded and delivered to ``sample()``. Echo and
policy server take turns, so that a busy moment of the machine hits both; medians over the rounds.
The simulator is left out: observations are numbers made beforehand.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from typing import Any

import numpy as np

from benchmarks import echo, report
from benchmarks.serving import ServerProcess
from client_sdk import AsyncPolicyClient, PolicyClient
from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.batches import SpaceCodec

OLD_POLICY_CLIENT_STEPS_PER_S = 300
"""Upper end of what RLlib's removed HTTP PolicyClient reached on a machine of this kind: 200 to 300
env steps/s (remote inference, one environment). It cannot be installed beside this RLlib."""


def request_bytes(client: PolicyClient, rows: int) -> int:
    """Size of a request of that many rows, for the echo."""
    message = pb.StreamActRequest(request=1000)
    message.act.session_id = "0" * 32
    group = message.act.groups.add()
    group.episodes.extend(range(1, rows + 1))
    group.steps.extend([200] * rows)
    group.rewards.extend([1.0] * rows)
    codec = SpaceCodec(client.observation_space)
    codec.encode({"": np.zeros((rows, 4), np.float32)}, group.observations)
    return len(message.SerializeToString())


def act_one(client: PolicyClient, messages: int) -> float:
    """Messages per second: one episode, one row each."""
    observation = np.zeros(4, np.float32)
    with client.episode() as episode:
        for _ in range(50):
            episode.act(observation, 0.0)
        start = time.perf_counter()
        for _ in range(messages):
            episode.act(observation, 1.0)
        elapsed = time.perf_counter() - start
        episode.end(observation, 1.0, truncated=True)
    return messages / elapsed


def act_many(client: PolicyClient, rows: int, messages: int) -> float:
    """Messages per second: so many rows each."""
    observations = np.zeros((rows, 4), np.float32)
    rewards, never = np.ones(rows), np.zeros(rows, np.bool_)
    with client.episodes(rows) as batch:
        for _ in range(50):
            batch.act(observations, rewards, never, never)
        start = time.perf_counter()
        for _ in range(messages):
            batch.act(observations, rewards, never, never)
        elapsed = time.perf_counter() - start
        batch.act(observations, rewards, never, ~never)
    return messages / elapsed


async def act_streams(address: str, count: int, messages: int) -> float:
    """Messages per second: ``count`` clients of one process, one row each."""
    observation = np.zeros(4, np.float32)
    ready = asyncio.Barrier(count + 1)

    async def one() -> None:
        async with AsyncPolicyClient(address) as client, client.episode() as episode:
            for _ in range(20):
                await episode.act(observation, 0.0)
            await ready.wait()
            for _ in range(messages):
                await episode.act(observation, 1.0)
            await done.wait()
            await episode.end(observation, 1.0, truncated=True)

    done = asyncio.Barrier(count + 1)
    tasks = [asyncio.create_task(one()) for _ in range(count)]
    await ready.wait()
    start = time.perf_counter()
    await done.wait()
    elapsed = time.perf_counter() - start
    await asyncio.gather(*tasks)
    return count * messages / elapsed


def main() -> None:
    """Measure, print, write."""
    parser = report.arguments(__doc__ or "")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.5, help="per measurement, about")
    options = parser.parse_args()
    scale = options.seconds

    with echo.EchoProcess() as peer, ServerProcess() as server:
        with PolicyClient(server.address) as client:
            sizes = {rows: request_bytes(client, rows) for rows in (1, 64)}
            cases: list[tuple[str, int, Any, Any, float]] = [
                (
                    "1 stream, 1 row per message",
                    1,
                    lambda: echo.blocking(peer.address, sizes[1], int(3000 * scale)),
                    lambda: act_one(client, int(2000 * scale)),
                    0.7,
                ),
                (
                    "1 stream, 64 rows per message",
                    64,
                    lambda: echo.blocking(peer.address, sizes[64], int(3000 * scale)),
                    lambda: act_many(client, 64, int(1500 * scale)),
                    0.0,
                ),
                (
                    "64 streams, 1 row per message",
                    1,
                    lambda: asyncio.run(echo.streams(peer.address, sizes[1], int(150 * scale), 64)),
                    lambda: asyncio.run(act_streams(server.address, 64, int(100 * scale))),
                    0.7,
                ),
            ]
            rows = []
            results = []
            for name, per_message, ask_echo, ask_server, goal in cases:
                pairs = [(ask_echo(), ask_server()) for _ in range(options.rounds)]
                floor = statistics.median(pair[0] for pair in pairs)
                reached = statistics.median(pair[1] for pair in pairs)
                ratio = statistics.median(pair[1] / pair[0] for pair in pairs)
                actions = reached * per_message
                results.append(
                    {
                        "case": name,
                        "echo_messages_per_s": floor,
                        "messages_per_s": reached,
                        "actions_per_s": actions,
                        "ratio_to_echo": ratio,
                        "goal": goal,
                        "pairs": pairs,
                    }
                )
                rows.append(
                    {
                        "case": name,
                        "echo msg/s": f"{floor:,.0f}",
                        "msg/s": f"{reached:,.0f}",
                        "of echo": f"{ratio:.2f}" + (f" (goal {goal})" if goal else ""),
                        "actions/s": f"{actions:,.0f}",
                        "x old PolicyClient": f"{actions / OLD_POLICY_CLIENT_STEPS_PER_S:,.0f}",
                    }
                )
        ledger = server.stop()["ledger"]
    report.print_table("Remote inference, 64x64 policy, experience recorded and delivered", rows)
    print(f"ledger: {ledger}")
    report.write_json(
        options.results,
        "acting",
        "python -m benchmarks.acting",
        {"results": results, "ledger": ledger},
    )


if __name__ == "__main__":
    main()
