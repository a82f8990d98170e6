"""``Attempts``: when to try again what failed, and when to give up. Pure; one thread at a time."""

from __future__ import annotations

import random

from client_sdk.call_errors import Disconnected
from client_sdk.errors import ConnectError, ConnectTimeout, PolicyClientError, UnavailableError

MAX_REDIRECTS = 3
_SILENT_S = 1.0
"""A server that is there answers sooner; after that a person wants to know what is waited for."""


class Backoff:
    """Delays between attempts: doubling, bounded, and scattered so that clients do not march in step."""

    def __init__(self, first_s: float = 0.1, most_s: float = 2.0) -> None:
        self._next_s = first_s
        self._most_s = max(first_s, most_s)

    def delay_s(self) -> float:
        """The next delay."""
        delay_s = self._next_s
        self._next_s = min(delay_s * 2.0, self._most_s)
        return delay_s * random.uniform(0.5, 1.0)  # noqa: S311 - no secret


class Attempts:
    """When to try to connect again, and when to give up. Times are ``time.monotonic``'s.

    Attributes:
        diagnosis_s: Kept back from the budget for finding out why it did not work.
    """

    def __init__(
        self, start: float, budget_s: float, longest_attempt_s: float, lease_s: float | None
    ) -> None:
        self.diagnosis_s = min(1.5, 0.2 * budget_s)
        self._is_first = lease_s is None
        self._told = not self._is_first  # who was connected has been told that it is lost
        self._answer: PolicyClientError | None = None  # the latest refusal
        self._start = start
        self._until = start + budget_s - self.diagnosis_s
        self._longest_attempt_s = min(longest_attempt_s, 3600.0)
        # Several attempts must fit into a session's lease.
        self._backoff = Backoff(most_s=1.0 if lease_s is None else min(2.0, lease_s / 6.0))

    def timeout_s(self, now: float) -> float:
        """Of the attempt that starts now."""
        return min(max(self._until - now, 0.05), self._longest_attempt_s)

    def waited_s(self, now: float) -> float:
        """Since the first attempt."""
        return now - self._start

    def delay_s(self, now: float, failure: PolicyClientError | Disconnected) -> float | None:
        """Until the next attempt; None: there is no time left for one, or it would be no better.

        Raises:
            PolicyClientError: ``failure``, where trying again cannot help.
        """
        asked_s: float | None = None
        if isinstance(failure, PolicyClientError):
            self._answer = failure
            asked_s = failure.retry_after_s
            if asked_s is None and not isinstance(failure, UnavailableError):
                raise failure
        # Who was connected is patient: that server is about to be put right.
        if self._is_first and isinstance(failure, Disconnected) and failure.is_distrust:
            return None
        left_s = self._until - now
        if asked_s is not None:
            return asked_s if asked_s < left_s else None
        return min(self._backoff.delay_s(), left_s) if left_s > 0 else None

    def news(self, now: float) -> str | None:
        """What to tell a person meanwhile: the address may be a wrong one. Once, and not at once."""
        if self._told or self.waited_s(now) < _SILENT_S:
            return None
        self._told = True
        left_s = max(self._until + self.diagnosis_s - now, 0.0)
        return f"does not answer yet; trying for another {left_s:.0f} s"

    def verdict(self, diagnosis: ConnectError) -> PolicyClientError:
        """What to raise in the end: the last attempt is short, and an earlier one may have told."""
        if self._answer is not None and isinstance(diagnosis, ConnectTimeout):
            return self._answer
        return diagnosis
