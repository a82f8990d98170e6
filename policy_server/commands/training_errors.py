"""How a training fails, in one line: what stands behind the exceptions of RLlib and Ray.

Main thread only, but for what is overheard.
"""

from __future__ import annotations

import logging
import re
import traceback
from typing import Self

logger = logging.getLogger(__name__)


class PortInUseError(RuntimeError):
    """Nothing can listen there; the message names host and port."""


class TrainingError(RuntimeError):
    """RLlib refused, or the training broke; the message is one line."""


class Overheard(logging.Handler):
    """What RLlib logs of a runner that did not start: its exception says only that none did."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it."""
        self.text += f"{record.getMessage()}\n"

    def __enter__(self) -> Self:
        logging.getLogger("ray.rllib").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("ray.rllib").removeHandler(self)


def explained(error: Exception, overheard: str) -> Exception:
    """What stands behind RLlib's refusal to build, in one line."""
    lines = [line.strip() for line in f"{overheard}\n{error}".splitlines()]
    for line in lines:
        if "cannot listen on" in line:
            return PortInUseError(line[line.index("cannot listen on") :])
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    logger.debug("build_algo failed", exc_info=error)
    # The last line of a remote traceback that names an exception; else what RLlib raised.
    named = [line for line in lines if re.match(r"[\w.]+(Error|Exception): ", line)]
    reason = named[-1] if overheard and named else one_line(cause)
    return TrainingError(f"RLlib cannot build the algorithm: {reason} (--debug shows more)")


def told(error: BaseException) -> str:
    """What stands behind an exception, and where it was raised, in one line."""
    # Ray keeps the cause of a remote failure in an attribute of its own.
    while isinstance(cause := error.__cause__ or getattr(error, "cause", None), BaseException):
        error = cause
    frames = traceback.extract_tb(error.__traceback__)
    where = f" in {frames[-1].name}, {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return f"{one_line(error)}{where}"


def one_line(error: BaseException) -> str:
    """Its kind and its message."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
