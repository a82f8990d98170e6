"""``policy-server compare``: the same training, with CartPole reached in different ways.

The ways are the programs in ``examples/cartpole``; each training is a process of its own. Main
thread only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

WAYS = {
    "in_process": "RLlib alone, in one process",
    "stepped": "hosted environment, stepped by RLlib",
    "remote": "policy server, remote inference",
    "local": "policy server, local inference",
}
"""Each is a program in ``examples/cartpole``, and what a table calls it."""
EXAMPLES = Path(__file__).parents[2] / "examples" / "cartpole"

_ONE_TRAINING_S = 1800.0
_END_S = 3.0
_TAIL_LINES = 15


class ComparisonError(RuntimeError):
    """A training failed; the message has the end of what it said."""


@dataclasses.dataclass(frozen=True)
class CompareOptions:
    """What is compared, and how far."""

    ways: tuple[str, ...]
    """Of ``WAYS``, in the order of the table."""
    seeds: int
    """Trainings of each way."""
    stop_return: float
    """Each training ends there."""
    stop_iters: int
    """Or after so many iterations."""
    out: Path
    """Directory of ``comparison.json`` and ``comparison.png``."""


def compare(options: CompareOptions, say: Callable[[str], None] = print) -> None:
    """Train in all ways, seed by seed; print a table, write JSON and a picture.

    The JSON is written anew after each training, so that a failure costs no more than one.

    Args:
        options: What was asked for.
        say: Prints a line.

    Raises:
        ComparisonError: A training failed, or there is nothing to run.
        OSError: The results cannot be written.
    """
    if missing := [way for way in options.ways if not (EXAMPLES / f"{way}.py").is_file()]:
        raise ComparisonError(
            f"no such file: {EXAMPLES / missing[0]}.py. The comparison runs the examples beside "
            "the sources: install a checkout with `pip install -e`, or run `make compare` in it"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    runs: list[dict[str, Any]] = []
    for seed in range(1, options.seeds + 1):
        # Each seed begins with another way: whatever the machine does meanwhile meets all.
        first = (seed - 1) % len(options.ways)
        for way in options.ways[first:] + options.ways[:first]:
            runs.append({"way": way, "seed": seed, **_train(way, seed, options)})
            say(_told(runs[-1]))
            _write(options, runs)  # each time: the next training may fail
    say("")
    for line in table(_rows(options, runs)):
        say(line)
    from policy_server.commands.comparison_picture import draw_comparison

    picture = options.out / "comparison.png"
    draw_comparison(picture, runs, {way: WAYS[way] for way in options.ways}, options.stop_return)
    say(f"\nwritten to {options.out / 'comparison.json'} and {picture}")


def _train(way: str, seed: int, options: CompareOptions) -> dict[str, Any]:
    """One training; what it reports."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.json"
        command = [
            *(sys.executable, str(EXAMPLES / f"{way}.py"), "--seed", str(seed)),
            *("--stop-return", str(options.stop_return), "--stop-iters", str(options.stop_iters)),
            *("--report", str(report)),
        ]
        environment = {"RAY_USAGE_STATS_ENABLED": "0", **os.environ}
        with (Path(directory) / "log").open("w+b") as log:
            # A session of its own, so that a terminal's Ctrl-C reaches us alone.
            process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )
            try:
                code: int | str = process.wait(_ONE_TRAINING_S)
            except subprocess.TimeoutExpired:
                code = f"no end after {_ONE_TRAINING_S:g} s"
            finally:
                _end(process)
            if code != 0 or not report.exists():
                log.seek(0)
                said = log.read().decode(errors="replace").splitlines()[-_TAIL_LINES:]
                raise ComparisonError("\n".join([f"{way}, seed {seed}: failed ({code})", *said]))
        result: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
        return result


def _end(process: subprocess.Popen[bytes]) -> None:
    """End it if it runs, and whatever of its session is left."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _told(run: dict[str, Any]) -> str:
    reached = "" if run["reached"] else "  (goal not reached)"
    return (
        f"seed {run['seed']}  {WAYS[run['way']]:<38}  {run['wall_s']:6.1f} s  "
        f"{run['env_steps']:>9,} env steps{reached}"
    )


def _rows(options: CompareOptions, runs: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """The lines of the table; none for a way that was not trained yet."""
    done = {way: [run for run in runs if run["way"] == way] for way in options.ways}
    return [_row(way, its_runs) for way, its_runs in done.items() if its_runs]


def _row(way: str, runs: Sequence[dict[str, Any]]) -> dict[str, str]:
    """One line of the table: medians, and the spread where it matters."""

    def median(value: Callable[[dict[str, Any]], float]) -> float:
        return statistics.median(map(value, runs))

    def spread(name: str, form: str) -> str:
        values = [run[name] for run in runs]
        return f"{min(values):{form}}..{max(values):{form}}"

    return {
        "way": WAYS[way],
        "env steps/s": f"{median(lambda run: run['env_steps_per_s']):,.0f}",
        "s": f"{median(lambda run: run['wall_s']):.1f}",
        "min..max s": spread("wall_s", ".1f"),
        "env steps": f"{median(lambda run: run['env_steps']):,.0f}",
        "min..max env steps": spread("env_steps", ",.0f"),
        "messages/step": f"{median(lambda run: run['messages'] / run['env_steps']):.3f}",
        "bytes/step": f"{median(lambda run: run['bytes'] / run['env_steps']):.0f}",
        "CPU us/step": f"{median(lambda run: run['cpu_s'] / run['env_steps']) * 1e6:.0f}",
        "reached": f"{sum(run['reached'] for run in runs)}/{len(runs)}",
    }


def table(rows: Sequence[dict[str, str]]) -> list[str]:
    """Lines of text; the columns are the keys of the first row."""
    names = list(rows[0])
    widths = [max(len(name), *(len(row[name]) for row in rows)) for name in names]
    lines = [names, ["-" * width for width in widths], *(list(row.values()) for row in rows)]
    return [
        "  ".join(
            # Names to the left, numbers to the right.
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]


def _write(options: CompareOptions, runs: Sequence[dict[str, Any]]) -> None:
    document = {
        "command": f"policy-server compare --ways {' '.join(options.ways)} "
        f"--seeds {options.seeds} --stop-return {options.stop_return:g} "
        f"--stop-iters {options.stop_iters}",
        "date": dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{os.cpu_count()} cores, {platform.system()}, Python "
        f"{platform.python_version()}, Ray {metadata.version('ray')}",
        "summary": _rows(options, runs),
        "runs": list(runs),
    }
    path = options.out / "comparison.json"
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
