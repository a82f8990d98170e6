"""Keeps Ray's habitual warnings from a person's first screen; everything else gets through.

Main thread of the training process only.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator

_LOGGERS = ("ray", "ray.rllib", "ray.tune")
"""They advertise migration guides and packages for GPUs at every start."""
_HABITUAL = (
    # Of every actor that may be restarted, from Ray's native part, as an error.
    b"has constructor arguments in the object store and max_restarts > 0",
    # RLlib's complaint about its own call.
    b"DeprecationWarning: `RLModule(config=[RLModuleConfig object])` has been deprecated",
)


def quiet_loggers(level: int = logging.ERROR) -> None:
    """Let Ray's Python side log from that level on; again after ``ray.init``, which sets its own."""
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(level)


def plain_prefixes() -> None:
    """Let Ray write no colours where nobody sees them: into files and pipes."""
    if not sys.stderr.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")


class Noise:
    """What was written to standard error meanwhile.

    Attributes:
        wanted: Whether to print it in the end; False once it has been summed up in one line.
    """

    wanted = True


@contextlib.contextmanager
def quiet_start() -> Iterator[Noise]:
    """Collect standard error, native output included, and print it at the end without the habitual."""
    noise = Noise()
    shown = sys.stderr  # on a terminal it is the live panel's, which prints above itself
    shown.flush()
    with tempfile.TemporaryFile() as collected, contextlib.redirect_stderr(sys.__stderr__):
        real = os.dup(2)
        os.dup2(collected.fileno(), 2)
        try:
            yield noise
        finally:
            if sys.__stderr__ is not None:
                sys.__stderr__.flush()
            os.dup2(real, 2)
            os.close(real)
            collected.seek(0)
            lines = collected.read().splitlines(keepends=True)
            kept = [line for line in lines if not any(known in line for known in _HABITUAL)]
            if noise.wanted:
                shown.write(b"".join(kept).decode(errors="replace"))
                shown.flush()
