"""The picture of a training run: return over env steps and over wall time.

And how this project's pictures look: ``blank_figure``, ``clean``, ``title``, ``draw_goal``, ``save``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from policy_server.commands.progress import Progress

INK = "#1f2937"
MUTED = "#6b7280"
_LINE = "#0f766e"
_GOAL = "#b45309"


def draw_learning_curve(
    path: str | Path, history: Sequence[Progress], heading: str, goal: float | None = None
) -> None:
    """Write the picture as PNG, replacing an older one only when complete.

    Args:
        path: Where to; its directory is made when missing.
        history: One entry per iteration, in order.
        heading: What was trained.
        goal: Drawn as a line, if any.
    """
    figure = blank_figure()
    by_steps, by_time = figure.subplots(1, 2, sharey=True)
    known = [p for p in history if not math.isnan(p.mean_return)]
    steps, unit = _scaled([float(p.env_steps) for p in known])
    _panel(by_steps, steps, known, goal)
    _panel(by_time, [p.wall_s for p in known], known, goal)
    by_steps.set_xlabel(f"env steps{unit}", color=MUTED)
    by_time.set_xlabel("wall time (s)", color=MUTED)
    by_steps.set_ylabel("episode return", color=MUTED)
    if known:
        last = known[-1]
        summary = (
            f"mean return {last.mean_return:.0f} after {last.env_steps:,} env steps, "
            f"{last.wall_s:.0f} s"
        )
        by_time.legend(
            loc="lower right",
            bbox_to_anchor=(1.0, 1.0),
            ncols=2,
            frameon=False,
            labelcolor=MUTED,
            fontsize=9,
        )
    else:
        summary = "no episode has finished yet"
    title(figure, heading)
    by_steps.set_title(summary, loc="left", fontsize=10, color=MUTED, pad=10)
    save(figure, Path(path))


def blank_figure() -> Any:
    """A figure that needs no display."""
    # Half a second to import: only who draws pays for it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def title(figure: Any, text: str) -> None:
    """Its headline."""
    figure.suptitle(text, x=0.01, ha="left", fontsize=14, fontweight="bold", color=INK)


def save(figure: Any, path: Path) -> None:
    """Write it as PNG; an older picture is replaced only when this one is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        figure.savefig(temporary, format="png")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _scaled(steps: list[float]) -> tuple[list[float], str]:
    """Steps in a unit that reads well."""
    largest = max(steps, default=0.0)
    for factor, unit in ((1e6, " (millions)"), (1e3, " (thousands)")):
        if largest >= 5 * factor:
            return [step / factor for step in steps], unit
    return steps, ""


def _panel(axes: Any, x: list[float], known: Sequence[Progress], goal: float | None) -> None:
    lows = [p.min_return for p in known]
    highs = [p.max_return for p in known]
    axes.fill_between(x, lows, highs, color=_LINE, alpha=0.12, linewidth=0, label="lowest, highest")
    axes.plot(x, [p.mean_return for p in known], color=_LINE, linewidth=2, label="mean")
    if len(known) <= 1:
        axes.scatter(x, [p.mean_return for p in known], color=_LINE, s=20)
    if goal is not None:
        draw_goal(axes, goal)
    clean(axes)


def draw_goal(axes: Any, goal: float) -> None:
    """A dashed line at that return."""
    axes.axhline(goal, color=_GOAL, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        f"goal {goal:g}",
        xy=(0, goal),
        xycoords=axes.get_yaxis_transform(),
        xytext=(4, 4),
        textcoords="offset points",
        color=_GOAL,
        fontsize=9,
    )


def clean(axes: Any) -> None:
    """Take away what does not inform."""
    axes.set_xlim(left=0)
    axes.locator_params(axis="x", nbins=7, integer=True)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#d1d5db")
