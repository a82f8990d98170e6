"""``Background``: what goes on behind a client that acts alone: its session, its policy, its uploads.

Whoever acts calls it. It owns two threads, the uploader's and the feed's, and what they share: the
link, and the spool.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from client_sdk.chunks import CutChunk
from client_sdk.config import Timeouts
from client_sdk.endpoint import Endpoint
from client_sdk.errors import PolicyClientError
from client_sdk.link import Link
from client_sdk.local_options import LocalOptions
from client_sdk.log import logger
from client_sdk.pace import Pace
from client_sdk.policy_cache import PolicyCache
from client_sdk.policy_feed import PolicyFeed
from client_sdk.session import Handshake
from client_sdk.spool import Spool
from client_sdk.uploader import Uploader


class Background:
    """The background of one client.

    Attributes:
        feed: Where the policy comes from.
        pace: Its ``attention`` says when to look at ``may_act`` before the next action.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        handshake: Handshake,
        timeouts: Timeouts,
        options: LocalOptions,
    ) -> None:
        self._timeouts = timeouts
        self._stats = handshake.stats
        self._warned_of_drops = False
        self._link = Link(endpoint, handshake, timeouts, self._another_session)
        self._spool = Spool(options.spool_bytes, options.spool_dir, self._dropped)
        self.feed = PolicyFeed(
            self._link, PolicyCache(options.cache_dir), options.update_interval, self._changed
        )
        self.pace = Pace(self._link, self._spool, follows=options.update_interval == 0.0)
        self._uploader = Uploader(self._link, self._spool, self.pace, self.feed, self._changed)

    def connect(self) -> None:
        """Open the session and start both threads.

        Raises:
            ConnectError: Nobody answered within ``Timeouts.connect_s``; the class says how.
            PolicyClientError: The server refuses this client.
        """
        self._link.open()
        self._uploader.start()
        self.feed.start()

    def listen(self, listener: Callable[[], None]) -> None:
        """Call that, from any thread, whenever ``may_act`` may have changed."""
        self._link.listen(listener)

    def add(self, chunks: Sequence[CutChunk], *, urgent: bool) -> None:
        """Have chunks uploaded; see ``Uploader.add``."""
        self._uploader.add(chunks, urgent=urgent)

    def may_act(self, *, trains: bool) -> bool:
        """Whether there is a policy to act with now; see ``Pace.may_act``."""
        return self.pace.may_act(self.feed.policy, trains=trains)

    def await_policy(self, *, trains: bool) -> None:
        """Wait until ``may_act``.

        Raises:
            PolicyTimeout: Not within ``Timeouts.action_s``.
            PolicyClientError: As ``may_act``.
        """
        self._link.wait(lambda: self.may_act(trains=trains), self._timeouts.action_s, "policy")

    def update_policy(self) -> None:
        """Take the newest policy there is.

        Raises:
            PolicyTimeout: No answer within ``Timeouts.action_s``.
            PolicyClientError: As ``may_act``.
        """
        self.feed.fetch_now(self._timeouts.action_s)

    def overdue(self) -> PolicyClientError:
        """The error for a policy that did not come in time."""
        return self._link.overdue("policy", self._timeouts.action_s)

    def ping(self) -> float:
        """Seconds that a round trip takes.

        Raises:
            ConnectError: The connection is lost.
            PolicyClientError: The server refuses.
        """
        return self._link.ping(self._timeouts.action_s)

    def interrupt(self) -> None:
        """Make whoever waits raise ClosedClientError. Any thread."""
        self._link.closing = True
        self.pace.attention = True
        self._link.notify()

    def finish(self) -> None:
        """Upload what is there and close the session, within ``close_s``."""
        until = time.monotonic() + self._timeouts.close_s
        try:
            self._uploader.finish(until)
            self._link.closing = True  # the server is about to end our calls
            self._link.say_goodbye(max(until - time.monotonic(), 0.1))
        finally:  # also where it is interrupted
            self.abort()

    def abort(self) -> None:
        """Let go of everything, without a word."""
        self.pace.attention = True
        self._link.close()
        self._uploader.join(1.0)
        self.feed.join(1.0)
        self._spool.close()

    # -- told by several threads ---------------------------------------------------------------

    def _changed(self) -> None:
        with self._link.changed:
            self.pace.look(self.feed.policy)
        self._link.notify()

    def _another_session(self, delivered_sequence: int) -> None:
        self._uploader.another_session(delivered_sequence)

    def _dropped(self, chunks: Sequence[CutChunk]) -> None:
        self._stats.steps_dropped += sum(chunk.steps for chunk in chunks)
        if not self._warned_of_drops:
            self._warned_of_drops = True
            logger.warning(
                "experience is lost: more of it waits for the server than spool_bytes allows, or "
                "the server has refused it"
            )
