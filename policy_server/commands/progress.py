"""What is going on in a training run, drawn for a person or printed for a log.

Main thread of the training process only; the live display redraws itself in a thread of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text


@dataclasses.dataclass(frozen=True)
class Progress:
    """One line of a training run: what is known after an iteration."""

    iteration: int
    """Calls of ``train()`` so far."""
    env_steps: int
    """Steps that reached the learner so far."""
    wall_s: float
    """Training time so far, resumed runs added up."""
    steps_per_s: float
    """Env steps a second over the latest iteration."""
    simulators: int
    """Connected clients."""
    mean_return: float
    """Of the latest finished training episodes, see ReturnWindow; NaN before the first."""
    min_return: float
    """The lowest of the latest iteration in which any finished."""
    max_return: float
    """The highest of the latest iteration in which any finished."""
    policy_version: int
    """Newest version that actions come from."""

    def line(self) -> str:
        """For logs: one line, the same columns each time."""
        mean = "-" if math.isnan(self.mean_return) else f"{self.mean_return:.1f}"
        return (
            f"iteration {self.iteration:>4}  env steps {self.env_steps:>9,}  "
            f"steps/s {self.steps_per_s:>7,.0f}  simulators {self.simulators:>3}  "
            f"mean return {mean:>8}  policy version {self.policy_version:>5}"
        )


class ReturnWindow:
    """The mean return of the latest iterations that hold enough episodes together.

    RLlib's ``episode_return_mean`` is that of one iteration, which may have seen two episodes end:
    too few to stop a training on.

    Args:
        episodes: The mean is over at least so many, once there are.
    """

    def __init__(self, episodes: int = 20) -> None:
        self._enough = episodes
        self._parts: deque[tuple[int, float]] = deque()

    def add(self, episodes: int, mean: float) -> float:
        """An iteration's episodes and their mean; returns the window's, NaN if it is empty."""
        if episodes > 0 and not math.isnan(mean):
            self._parts.append((episodes, mean))
        total = sum(count for count, _ in self._parts)
        while self._parts and total - self._parts[0][0] >= self._enough:
            total -= self._parts.popleft()[0]
        return sum(count * part for count, part in self._parts) / total if total else math.nan


def progress_of(
    result: Mapping[str, Any], before: Progress | None, wall_s: float, returns: ReturnWindow
) -> Progress:
    """What an RLlib result says.

    Args:
        result: Of ``Algorithm.train()``.
        before: The progress of the iteration before it; None at the first.
        wall_s: Training time so far.
        returns: Of the iterations before; this one's are added.
    """
    runners = result.get("env_runners", {})
    server = runners.get("policy_server", {})
    env_steps = int(
        result.get("num_env_steps_sampled_lifetime")
        or runners.get("num_env_steps_sampled_lifetime", 0)
    )
    steps = env_steps - (before.env_steps if before else 0)
    elapsed_s = wall_s - (before.wall_s if before else 0.0)
    return Progress(
        iteration=int(result["training_iteration"]),
        env_steps=env_steps,
        wall_s=wall_s,
        steps_per_s=steps / elapsed_s if elapsed_s > 0 else 0.0,
        simulators=int(server.get("sessions", 0)),
        mean_return=returns.add(
            int(runners.get("num_episodes", 0)), float(runners.get("episode_return_mean", math.nan))
        ),
        min_return=float(runners.get("episode_return_min", math.nan)),
        max_return=float(runners.get("episode_return_max", math.nan)),
        policy_version=int(server.get("policy_version", 0)),
    )


class Display(Protocol):
    """Where progress goes."""

    def show(self, progress: Progress) -> None:
        """After each iteration."""

    def conclude(self, progress: Progress) -> None:
        """After the last one, unless it was shown in a line that stays."""

    def say(self, line: str) -> None:
        """One line for the person, such as where the server listens."""


@dataclasses.dataclass(frozen=True)
class Quiet:
    """Says only what must be said."""

    out: TextIO

    def show(self, progress: Progress) -> None:
        """Nothing."""

    def conclude(self, progress: Progress) -> None:
        """Print it."""
        self.say(progress.line())

    def say(self, line: str) -> None:
        """Print it."""
        print(line, file=self.out, flush=True)


@dataclasses.dataclass(frozen=True)
class PlainLines(Quiet):
    """One line per iteration, for logs and pipes."""

    def show(self, progress: Progress) -> None:
        """Print it."""
        self.say(progress.line())

    def conclude(self, progress: Progress) -> None:
        """Nothing: it is the line above."""


class LiveDisplay:
    """A panel that redraws itself while RLlib samples and learns.

    Args:
        live: What draws; running.
        title: What is trained.
        goal: Mean return to stop at, if any.
    """

    def __init__(self, live: Live, title: str, goal: float | None) -> None:
        self._live = live
        self._title = title
        self._goal = goal
        self._progress: Progress | None = None
        self._waiting_for = "starting"
        self._started = time.monotonic()
        self._spinner = Spinner("dots")
        live.update(self)

    def say(self, line: str) -> None:
        """Print it above the panel."""
        self._waiting_for = "waiting for the first experience"  # said once simulators can connect
        self._live.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def show(self, progress: Progress) -> None:
        """Redraw with it."""
        self._progress = progress
        self._live.refresh()

    def conclude(self, progress: Progress) -> None:
        """Print it: to be found in what scrolls by."""
        self.say(progress.line())

    def __rich__(self) -> RenderableType:
        """The panel as it is now; called by the redrawing thread."""
        elapsed_s = int(time.monotonic() - self._started)
        head = Table.grid(padding=(0, 1))
        clock = Text(f"{elapsed_s // 60}:{elapsed_s % 60:02d}", style="dim")
        head.add_row(self._spinner, Text(self._title, style="bold"), clock)
        progress = self._progress
        if progress is None:
            return Group(head, Text(f"  {self._waiting_for}", style="dim"))
        table = Table.grid(padding=(0, 3))
        mean = "-" if math.isnan(progress.mean_return) else f"{progress.mean_return:.1f}"
        cells = {
            "iteration": f"{progress.iteration:,}",
            "env steps": f"{progress.env_steps:,}",
            "steps/s": f"{progress.steps_per_s:,.0f}",
            "simulators": f"{progress.simulators:,}",
            "mean return": mean,
            "policy version": f"{progress.policy_version:,}",
        }
        for _ in cells:
            table.add_column(justify="right", no_wrap=True)
        table.add_row(*(Text(name, style="dim") for name in cells))
        table.add_row(*(Text(value, style="bold cyan") for value in cells.values()))
        if self._goal is None:
            return Group(head, table)
        done = 0.0 if math.isnan(progress.mean_return) else progress.mean_return
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            ProgressBar(total=self._goal, completed=max(done, 0.0), width=40),
            Text(f"{mean} of {self._goal:g}", style="dim"),
        )
        return Group(head, table, bar)


@contextlib.contextmanager
def open_display(
    title: str, goal: float | None, *, quiet: bool = False, out: TextIO | None = None
) -> Iterator[Display]:
    """A live panel on a terminal, plain lines elsewhere.

    Args:
        title: What is trained.
        goal: Mean return to stop at, if any.
        quiet: Say only where the server listens and how it ended.
        out: Where to; standard output by default.
    """
    out = out or sys.stdout
    console = Console(file=out)
    if quiet:
        yield Quiet(out)
    elif not console.is_terminal:
        yield PlainLines(out)
    else:
        with Live(console=console, refresh_per_second=8) as live:
            yield LiveDisplay(live, title, goal)
