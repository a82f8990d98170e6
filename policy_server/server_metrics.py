"""The policy server's numbers in RLlib's results.

MetricsLogger is not thread-safe: actor thread only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from policy_server.server import PolicyServer

_POLICY_SERVER = "policy_server"
"""Key of the server's numbers in the env runners' results."""
_GAUGES = frozenset({"sessions", "episodes_open", "requests_waiting", "downloads_waiting"})
"""Numbers of the server that are those of a moment: reported on average over an iteration."""


class ServerMetrics:
    """Logs the numbers of one env runner's server."""

    def __init__(self, metrics: Any) -> None:
        self._metrics = metrics
        self._reported: dict[str, float] = {}  # totals, as of the last report

    def log(self, server: PolicyServer, version: int, totals: Mapping[str, int]) -> None:
        """Report how things stand.

        Args:
            server: Asked for its numbers and its ledger.
            version: Of the newest policy; -1 if there is none.
            totals: More numbers that only grow.
        """
        self._metrics.log_value((_POLICY_SERVER, "policy_version"), version, reduce="max", window=1)
        for name, number in server.stats().items():
            if name in _GAUGES:
                self._metrics.log_value((_POLICY_SERVER, name), number, reduce="mean", window=1)
            else:
                self._log_total(name, number)
        for name, total in totals.items():
            self._log_total(name, total)
        for name, number in server.ledger().items():
            self._log_total(f"ledger/{name}", number)

    def _log_total(self, name: str, total: float) -> None:
        """Report what has come to a total since the last report.

        RLlib adds it up: over the calls that one batch took, all runners, those that died, and the
        trainings before a checkpoint. So ``held``, too, may grow by less than nothing.
        """
        grown = total - self._reported.get(name, 0)
        self._reported[name] = total
        self._metrics.log_value((_POLICY_SERVER, *name.split("/")), grown, reduce="lifetime_sum")
