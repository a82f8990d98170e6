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
        self._per_second = per_second
        self._pause_s = pause_s
        self._longest_s = longest_s
        self._clock = clock

    def meter(self) -> Meter:
        """Nothing is used yet."""
        return Meter(self)

    def book(self, due_s: float, amount: int) -> float:
        """When a meter will be due after that much more.

        Raises:
            Fault: LIMIT_EXCEEDED; it is ahead by more than a burst.
        """
        now = self._clock()
        early_s = due_s - now - _BURST_S
        if early_s > 0.0:
            self.refused += 1
            # Scattered, so that those who are refused together do not come back together.
            pause_s = self._pause_s * random.uniform(0.5, 1.5)  # noqa: S311 - no secret
            raise Fault(
                Reason.LIMIT_EXCEEDED,
                f"this is faster than {self._setting}={self._per_second:g} allows; nothing was "
                "taken. Send the same again a little later, or raise that setting on the server",
                retry_after_s=min(early_s + pause_s, self._longest_s),
            )
        return max(due_s, now) + amount / self._per_second


class Meter:
    """What one client, or all of them, have used of a limit."""

    __slots__ = ("_due_s", "_limit")

    def __init__(self, limit: RateLimit) -> None:
        self._limit = limit
        self._due_s = 0.0

    def take(self, amount: int) -> None:
        """Use that much: what is within a burst is allowed whole, however much it is.

        Raises:
            Fault: LIMIT_EXCEEDED, with when to come again.
        """
        self._due_s = self._limit.book(self._due_s, amount)
