"""How a benchmark tells what it found: a table for people, JSON for machines."""

from __future__ import annotations

import argparse
import datetime as dt
import itertools
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_PLACES = ("--results", "--peers")
"""Options that say where something lies."""


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="directory of the JSON file and the plot"
    )
    return parser


def print_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Columns are the keys of the first row."""
    names = list(rows[0])
    cells = [[str(row[name]) for name in names] for row in rows]
    widths = [max(len(line[i]) for line in [names, *cells]) for i in range(len(names))]
    print(f"\n{title}\n")
    for line in [names, ["-" * width for width in widths], *cells]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
    print(flush=True)


def verdict(value: float, goal: float | None, *, at_most: bool = False) -> str:
    """Whether a goal was met, in a few words; nothing where there is none."""
    if goal is None:
        return ""
    met = value <= goal if at_most else value >= goal
    return f" ({'meets' if met else 'misses'} {goal:,g})"


def command_line(name: str, arguments: Sequence[str]) -> str:
    """What was called, less the places on this machine: options whose values are paths."""
    options: list[list[str]] = []
    for word in arguments:
        if word.startswith("--"):
            options.append(word.split("=", 1))
        elif options:
            options[-1].append(word)
    told = [
        option
        for option in options
        if option[0] not in _PLACES and not any(Path(word).is_absolute() for word in option)
    ]
    return shlex.join(["python", "-m", f"benchmarks.{name}", *itertools.chain(*told)])


def write_json(directory: Path, name: str, results: Mapping[str, Any]) -> Path:
    """Write what benchmarks/NAME.py measured, where, when, at which commit, by which command."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    document = {
        "command": command_line(name, sys.argv[1:]),
        "commit": commit(),
        "date": dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{os.cpu_count()} cores, {platform.system()}, Python "
        f"{platform.python_version()}",
        **results,
    }
    path.write_text(json.dumps(document, indent=2) + "\n")
    print(f"written to {path}")
    return path


_WRITTEN_HERE = (":(top,exclude)benchmarks/results", ":(top,exclude)docs/results.md")


def commit() -> str:
    """Of the working tree, marked if anything but results was changed since."""
    head = _git("rev-parse", "--short", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", *_WRITTEN_HERE)
    return (head or "unknown") + ("-dirty" if changed else "")


def _git(*arguments: str) -> str:
    """What it says; nothing where there is no git, or no repository."""
    try:
        said = subprocess.run(
            ["git", *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).parent,
        )
    except OSError:
        return ""
    return said.stdout.strip()
