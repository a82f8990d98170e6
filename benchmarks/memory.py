"""Resident memory of the server's process over a million steps.

    python -m benchmarks.memory

One client drives 64 episodes at once, which end after 200 steps each; ``sample()`` takes what comes.
Memory is read every 50,000 steps. Flat means: what the second half adds is noise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks import report
from benchmarks.serving import ServerProcess
from client_sdk import PolicyClient

_ROWS = 64
_EPISODE = 200
_EVERY = 50_000

GOAL_MIB = 5.0
"""What the second half may add: one hundredth of what Ray and torch take."""


def measure(steps: int) -> tuple[list[tuple[int, float]], dict[str, Any]]:
    """MiB resident after so many steps, and the server's last numbers."""
    observations = np.zeros((_ROWS, 4), np.float32)
    rewards, never, always = np.ones(_ROWS), np.zeros(_ROWS, np.bool_), np.ones(_ROWS, np.bool_)
    readings = []
    with ServerProcess() as server:
        process = psutil.Process(server.pid)
        with PolicyClient(server.address) as client, client.episodes(_ROWS) as batch:
            done = calls = 0
            while done < steps:
                ends = calls % (_EPISODE + 2) == _EPISODE
                batch.act(observations, rewards, always if ends else never, never)
                calls += 1
                done += _ROWS
                if done % _EVERY < _ROWS:
                    readings.append((done, process.memory_info().rss / 2**20))
        numbers = server.stop()
    return readings, numbers


def plot(readings: list[tuple[int, float]], path: Path) -> None:
    """Memory over steps."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 3.5), layout="constrained")
    axis.plot(*zip(*readings, strict=True), marker="o", markersize=3)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("steps received")
    axis.set_ylabel("resident memory [MiB]")
    axis.set_title("Server process: Ray, torch, RLlib and the policy server")
    axis.grid(alpha=0.2)
    figure.savefig(path, dpi=150)
    print(f"written to {path}")


def main() -> None:
    """Measure, print, write, plot."""
    parser = report.arguments(__doc__ or "")
    parser.add_argument("--steps", type=int, default=1_000_000)
    options = parser.parse_args()
    readings, numbers = measure(options.steps)
    half = len(readings) // 2
    growth = readings[-1][1] - readings[half][1]
    report.print_table(
        "Resident memory of the server's process",
        [{"steps": f"{steps:,}", "MiB": f"{mib:.1f}"} for steps, mib in readings],
    )
    print(
        f"second half: {growth:+.1f} MiB"
        f"{report.verdict(growth, GOAL_MIB, at_most=True)}; ledger: {numbers['ledger']}"
    )
    report.write_json(
        options.results,
        "memory",
        {"readings": readings, "growth_second_half_mib": growth, **numbers},
    )
    plot(readings, options.results / "memory.png")


if __name__ == "__main__":
    main()
