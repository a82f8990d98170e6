"""``Pace``: when training episodes wait for the server, so that nothing out of date is learnt from.

Whoever acts asks, and tells what it adds; the uploader's thread tells what became of it. No I/O.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Final

from client_sdk.chunks import Lineage
from client_sdk.link import Link
from client_sdk.loaded_policy import LoadedPolicy
from client_sdk.spool import Spool

_PROMPT_S: Final = 0.05
"""A server that answers an upload so soon wants more of it."""
_AHEAD: Final = 4
"""So many uploads may wait behind one that is not answered promptly; then training waits, too."""


class Pace:
    """Three reasons to wait: a server that holds, the policy that it names, too much in the spool.

    Args:
        link: The session.
        spool: What is not settled there.
        follows: The client takes every policy that there is.

    Attributes:
        attention: Look at ``may_act`` before the next action; read without a lock.
    """

    def __init__(self, link: Link, spool: Spool, *, follows: bool) -> None:
        self.attention = True
        self._link = link
        self._spool = spool
        self._follows = follows
        self._until = 0  # so many chunks, counted as the spool does, have to be settled
        self._least_version = 0  # ... and then this policy be there
        self._sent_at = math.inf  # the request that is not answered
        self._slowed = False  # it has to be

    def may_act(self, policy: LoadedPolicy | None, *, trains: bool) -> bool:
        """Whether there is a policy to act with now.

        Args:
            policy: The newest; None: there is none yet.
            trains: The learner is going to see it.

        Raises:
            ClosedClientError: The client was closed.
            PolicyClientError: The server refuses this client for good.
        """
        self._link.check()
        if policy is None:
            return False
        # While nobody could answer, it acts on.
        return not (trains and self._link.connection is not None and self._waits(policy))

    def _waits(self, policy: LoadedPolicy) -> bool:
        """Whether training episodes do not act with that policy yet."""
        return (
            self._slowed
            or self._spool.settled < self._until
            or (policy.version < self._least_version and policy.session == self._link.number)
        )

    # -- told under ``Link.changed`` -----------------------------------------------------------

    def look(self, policy: LoadedPolicy | None) -> None:
        """Something has changed: see whether acting has to look."""
        link = self._link
        self.attention = (
            policy is None or link.closing or link.failure is not None or self._waits(policy)
        )

    def hold(self, lineages: Iterable[Lineage], until: int) -> None:
        """Wait until so many chunks are settled, if the server wants that of these episodes."""
        if self._link.session.holds and any(lineage.options.trains for lineage in lineages):
            self._until = max(self._until, until)
            self.attention = True

    def slow_down(self) -> None:
        """Wait for the answer that is due, if the server has enough and there is much more here.

        Else the learner would see ever older experience.
        """
        if time.monotonic() - self._sent_at < _PROMPT_S or self._link.connection is None:
            return
        ahead = _AHEAD * max(self._link.session.steps_per_upload, 1)
        if self._spool.untaken_steps() > ahead:
            self._slowed = self.attention = True

    # -- told by the uploader's thread ---------------------------------------------------------

    def sent(self) -> None:
        """An upload is on its way; maybe not for the first time."""
        self._sent_at = min(self._sent_at, time.monotonic())

    def unsent(self) -> None:
        """It did not get there, or its answer not back."""
        self._sent_at = math.inf

    def answered(self, policy_version: int | None) -> None:
        """It has an answer, which named that policy, or none; before the spool settles it."""
        self._sent_at, self._slowed = math.inf, False
        if self._follows and self._until and policy_version is not None:
            self._least_version = policy_version

    def another_session(self) -> None:
        """What the one before has asked for is void."""
        self._sent_at, self._slowed = math.inf, False
        self._least_version = 0
