"""Where every step went. Any thread, but for ``received``, which is the loop's to write."""

from __future__ import annotations

import threading
from collections import Counter


class Ledger:
    """Where every step went: received = delivered + discarded + held.

    Attributes:
        received: Steps that came in from clients. Loop thread only; the rest is for any thread.
    """

    def __init__(self) -> None:
        self.received = 0
        self._lock = threading.Lock()
        self._delivered = 0
        self._discarded: Counter[str] = Counter()

    def deliver(self, steps: int) -> None:
        """Steps were handed to RLlib."""
        with self._lock:
            self._delivered += steps

    def discard(self, reason: str, steps: int) -> None:
        """Steps will never reach the learner."""
        if steps:
            with self._lock:
                self._discarded[reason] += steps

    def snapshot(self) -> dict[str, int]:
        """``received``, ``delivered`` and ``discarded_REASON``, of one moment."""
        with self._lock:
            return {
                "received": self.received,
                "delivered": self._delivered,
                **{f"discarded_{reason}": n for reason, n in self._discarded.items()},
            }
