"""Remote inference against a bare gRPC echo of the same sizes, in the same run.

    python -m benchmarks.acting

A 64x64 policy, rows of CartPole's size, experience recorded and delivered to ``sample()``. The
echo has the server's event loop, and is asked by gRPC's own clients, blocking or for asyncio; a
second time without what ``PolicyClient`` and ``AsyncPolicyClient`` spare themselves of these. All
take turns, so that a busy moment of the machine hits all; and all begin anew a few times, for one
process may be faster than another one of the same program. Medians over all rounds.
The simulator is left out: observations are numbers made beforehand.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import echo, report
from benchmarks.serving import ServerProcess
from client_sdk import AsyncPolicyClient, PolicyClient
from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.batches import SpaceCodec

OLD_POLICY_CLIENT_STEPS_PER_S = 250
"""What RLlib's HTTP PolicyClient reached on a machine of this kind before it was removed: 200 to 300
env steps/s (remote inference, one environment). It cannot be installed beside this RLlib."""

GOAL_ACTIONS_PER_S = 80_000
GOAL_TIMES_OLD = 8


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


class Case(NamedTuple):
    """One way to ask, and its floor."""

    name: str
    rows: int
    ask_echo: Callable[[], float]
    ask_echo_as_we_do: Callable[[], float]
    ask_server: Callable[[], float]
    goal_ratio: float | None = None
    goal_actions_per_s: float | None = None


def cases(
    peer: str, server: str, client: PolicyClient, loop: asyncio.Runner, seconds: float
) -> list[Case]:
    """What is measured, for about so many seconds each; all of asyncio's on one loop."""
    sizes = {rows: request_bytes(client, rows) for rows in (1, 64)}
    return [
        Case(
            "1 stream, 1 row per message",
            1,
            lambda: echo.blocking(peer, sizes[1], int(3000 * seconds)),
            lambda: echo.blocking_as_we_do(peer, sizes[1], int(3000 * seconds)),
            lambda: act_one(client, int(2000 * seconds)),
            goal_ratio=0.7,
        ),
        Case(
            "1 stream, 64 rows per message",
            64,
            lambda: echo.blocking(peer, sizes[64], int(3000 * seconds)),
            lambda: echo.blocking_as_we_do(peer, sizes[64], int(3000 * seconds)),
            lambda: act_many(client, 64, int(1500 * seconds)),
            goal_actions_per_s=GOAL_ACTIONS_PER_S,
        ),
        Case(
            "64 streams, 1 row per message",
            1,
            lambda: loop.run(echo.streams(peer, sizes[1], int(150 * seconds), 64)),
            lambda: loop.run(echo.streams_as_we_do(peer, sizes[1], int(150 * seconds), 64)),
            lambda: loop.run(act_streams(server, 64, int(100 * seconds))),
            goal_ratio=0.7,
        ),
    ]


Turn = tuple[float, float, float]
"""Messages per second: of the echo, of the echo asked as we do, of the policy server."""


def take_turns(rounds: int, seconds: float) -> tuple[list[tuple[Case, list[Turn]]], dict[str, int]]:
    """All cases, with an echo, a server and a client that are new; and that server's ledger."""
    with echo.EchoProcess() as peer, ServerProcess() as server:
        with PolicyClient(server.address) as client, asyncio.Runner() as loop:
            found = [
                (
                    case,
                    [
                        (case.ask_echo(), case.ask_echo_as_we_do(), case.ask_server())
                        for _ in range(rounds)
                    ],
                )
                for case in cases(peer.address, server.address, client, loop, seconds)
            ]
        ledger: dict[str, int] = server.stop()["ledger"]
        return found, ledger


def summary(case: Case, turns: list[Turn]) -> dict[str, Any]:
    """Medians over all turns."""
    reached = statistics.median(server for _, _, server in turns)
    return {
        "case": case.name,
        "echo_messages_per_s": statistics.median(echo for echo, _, _ in turns),
        "echo_as_we_do_messages_per_s": statistics.median(ours for _, ours, _ in turns),
        "messages_per_s": reached,
        "actions_per_s": reached * case.rows,
        "ratio_to_echo": statistics.median(server / echo for echo, _, server in turns),
        "ratio_to_echo_as_we_do": statistics.median(server / ours for _, ours, server in turns),
        "times_old_policy_client": reached * case.rows / OLD_POLICY_CLIENT_STEPS_PER_S,
        "goal_ratio": case.goal_ratio,
        "goal_actions_per_s": case.goal_actions_per_s,
        "turns": turns,
    }


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Messages per second beside the echo's."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    places = np.arange(len(results))
    for offset, key, label, color in (
        (-0.2, "echo_messages_per_s", "bare gRPC echo", "tab:gray"),
        (0.2, "messages_per_s", "policy server", "tab:blue"),
    ):
        bars = axis.bar(
            places + offset, [result[key] for result in results], 0.4, label=label, color=color
        )
        axis.bar_label(bars, fmt="{:,.0f}", fontsize=8)
    axis.set_xticks(places, [result["case"] for result in results])
    axis.set_ylabel("messages/s")
    axis.legend()
    figure.savefig(path, dpi=150)
    print(f"written to {path}")


def main() -> None:
    """Measure, print, write, plot."""
    parser = report.arguments(__doc__ or "")
    parser.add_argument("--starts", type=int, default=5, help="of the processes")
    parser.add_argument("--rounds", type=int, default=3, help="after each start")
    parser.add_argument("--seconds", type=float, default=0.5, help="per measurement, about")
    options = parser.parse_args()

    starts = [take_turns(options.rounds, options.seconds) for _ in range(options.starts)]
    results = [
        summary(same[0][0], [turn for _, turns in same for turn in turns])
        for same in zip(*(found for found, _ in starts), strict=True)
    ]
    ledger = {name: sum(ledger[name] for _, ledger in starts) for name in starts[0][1]}
    report.print_table(
        "Remote inference, 64x64 policy, experience recorded and delivered",
        [
            {
                "case": result["case"],
                "echo msg/s": f"{result['echo_messages_per_s']:,.0f}",
                "as we do": f"{result['echo_as_we_do_messages_per_s']:,.0f}",
                "msg/s": f"{result['messages_per_s']:,.0f}",
                "of echo": f"{result['ratio_to_echo']:.2f}"
                + report.verdict(result["ratio_to_echo"], result["goal_ratio"]),
                "of that": f"{result['ratio_to_echo_as_we_do']:.2f}",
                "actions/s": f"{result['actions_per_s']:,.0f}"
                + report.verdict(result["actions_per_s"], result["goal_actions_per_s"]),
                "x old PolicyClient": f"{result['times_old_policy_client']:.1f}"
                + report.verdict(result["times_old_policy_client"], GOAL_TIMES_OLD),
            }
            for result in results
        ],
    )
    print(f"ledger: {ledger}")
    report.write_json(
        options.results,
        "acting",
        {"results": results, "ledger": ledger},
    )
    plot(results, options.results / "acting.png")


if __name__ == "__main__":
    main()
