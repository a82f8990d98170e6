"""The signals that ask a process to end."""

from __future__ import annotations

import signal

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
"""Ctrl-C, ``kill``, and the end of the terminal, where this system has them."""


def wanted() -> tuple[signal.Signals, ...]:
    """Those that a command heeds: ``nohup`` has it outlive its terminal."""
    hangup = getattr(signal, "SIGHUP", None)
    ignored = hangup is not None and signal.getsignal(hangup) is signal.SIG_IGN
    return tuple(number for number in SIGNALS if not (ignored and number == hangup))
