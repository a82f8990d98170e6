"""``RateLimit``: how often something may happen in a second, and who has used how much of it.

Each meter is a virtual scheduler, as ATM networks use it to police traffic (the generic cell rate
algorithm, ITU-T I.371): one number says when what was taken so far would have come at the allowed
pace. Loop thread only.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from client_sdk.wire.faults import Fault, Reason

_BURST_S = 1.0
"""Whoever was silent may have what the pace allows in so long at once."""


class RateLimit:
    """One setting; a ``Meter`` for each that it applies to.

    Attributes:
        per_second: So much is allowed, on average over a second.
        clock: In seconds.
        refused: Requests so far, of all meters.
    """

    def __init__(
        self,
        setting: str,
        per_second: float,
        *,
        pause_s: float,
        longest_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Set a limit.

        Args:
            setting: Its name, for whoever is refused.
            per_second: So much is allowed, on average over a second.
            pause_s: The refused one is told to wait about so long at least.
            longest_s: ... and no longer than that, however far ahead of the pace.
            clock: In seconds.
        """
        self.refused = 0
        self._setting = setting
        self.per_second = per_second
        self._pause_s = pause_s
        self._longest_s = longest_s
        self.clock = clock

    def meter(self) -> Meter:
        """Nothing is used yet."""
        return Meter(self)

    def refuse(self, early_s: float) -> Fault:
        """LIMIT_EXCEEDED, with when to come again.

        Args:
            early_s: So much too early is it now.
        """
        self.refused += 1
        # Scattered, so that those who are refused together do not come back together.
        pause_s = self._pause_s * random.uniform(0.5, 1.5)  # noqa: S311 - no secret
        return Fault(
            Reason.LIMIT_EXCEEDED,
            f"this is faster than {self._setting}={self.per_second:g} allows; nothing was "
            "taken. Send the same again a little later, or raise that setting on the server",
            retry_after_s=min(early_s + pause_s, self._longest_s),
        )


class Meter:
    """What one client, or all of them, have used of a limit."""

    __slots__ = ("_clock", "_due_s", "_limit")

    def __init__(self, limit: RateLimit) -> None:
        self._limit = limit
        self._clock = limit.clock
        self._due_s = 0.0  # when what was taken would have come at the allowed pace

    def take(self, amount: int) -> None:
        """Use that much: what is within a burst is allowed whole, however much it is.

        Raises:
            Fault: LIMIT_EXCEEDED, with when to come again.
        """
        now, due_s = self._clock(), self._due_s
        if due_s > now + _BURST_S:
            raise self._limit.refuse(due_s - now - _BURST_S)
        self._due_s = max(due_s, now) + amount / self._limit.per_second
