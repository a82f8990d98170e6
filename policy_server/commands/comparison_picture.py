"""The picture of a comparison: return over wall time and over env steps, medians and spread."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policy_server.commands import learning_curve as style

_LINES = (("#6b7280", "-"), ("#7c3aed", (0, (4, 2))), ("#0f766e", "-"), ("#2563eb", "-"))
"""Colours and dashes: the first two ways may coincide, and are both to be seen."""
_POINTS = 200


def draw_comparison(
    path: Path, runs: Sequence[Mapping[str, Any]], names: Mapping[str, str], goal: float
) -> None:
    """Write the picture as PNG, replacing an older one only when complete.

    Args:
        path: Where to.
        runs: Each with its ``way`` and its ``curve``.
        names: The ways to draw, in order, and what the legend calls them.
        goal: Drawn as a line.
    """
    figure = style.blank_figure()
    by_time, by_steps = figure.subplots(1, 2, sharey=True)
    for axes, key, label, unit in (
        (by_time, "wall_s", "wall time (s)", 1.0),
        (by_steps, "env_steps", "env steps (thousands)", 1e3),
    ):
        lines = zip(itertools.cycle(_LINES), names.items(), strict=False)
        for (color, dashes), (way, name) in lines:
            curves = [_curve(run, key, unit) for run in runs if run["way"] == way]
            if not all(len(x) for x, _ in curves):  # too short to have seen episodes end
                continue
            x, returns = _aligned(curves)
            axes.fill_between(
                x, returns.min(axis=0), returns.max(axis=0), color=color, alpha=0.12, linewidth=0
            )
            median = np.median(returns, axis=0)
            axes.plot(x, median, color=color, linestyle=dashes, linewidth=2, label=name)
        style.draw_goal(axes, goal)
        style.clean(axes)
        axes.set_xlabel(label, color=style.MUTED)
    by_time.set_ylabel("mean episode return", color=style.MUTED)
    handles, _ = by_steps.get_legend_handles_labels()  # maybe none
    by_steps.legend(handles=handles, loc="best", frameon=False, labelcolor=style.MUTED, fontsize=9)
    seeds = len({run["seed"] for run in runs})
    style.title(figure, "PPO on CartPole-v1, one way to the environment beside the other")
    by_time.set_title(
        f"median, lowest and highest of {seeds} seeds" if seeds > 1 else "a single seed",
        loc="left",
        fontsize=10,
        color=style.MUTED,
        pad=10,
    )
    style.save(figure, path)


def _curve(
    run: Mapping[str, Any], key: str, unit: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    known = [point for point in run["curve"] if point["mean_return"] is not None]
    return (
        np.array([point[key] / unit for point in known]),
        np.array([point["mean_return"] for point in known]),
    )


def _aligned(
    curves: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """One x for all seeds, and their returns there [seeds, x]; who has ended stays as it was.

    It begins where the first return of each is known.
    """
    first, last = (max(float(at[end]) for at, _ in curves) for end in (0, -1))
    x = np.linspace(first, last, _POINTS)
    return x, np.stack([np.interp(x, at, returns) for at, returns in curves])
