"""What a client asks of whoever acts for it: the server, or a policy of its own. No I/O here.

``PolicyClient`` speaks to an ``Actor``, ``AsyncPolicyClient`` to an ``AioActor``; what each verb means
is told there, and in ``remote_actor`` and ``local_actor``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from client_sdk.batch_track import BatchTrack
from client_sdk.episode_track import EpisodeTrack
from client_sdk.rows import Status


class Actor(Protocol):
    """One call at a time; ``interrupt`` from any thread."""

    def connect(self) -> None:
        """Open the session."""

    def act(self, track: EpisodeTrack, observation: Any, reward: float = 0.0) -> Any:
        """Record where an episode is; returns the next action."""

    def log_action(
        self,
        track: EpisodeTrack,
        observation: Any,
        action: Any,
        logp: float | None = None,
        reward: float = 0.0,
    ) -> None:
        """Record what the application did by itself."""

    def end(
        self, track: EpisodeTrack, observation: Any, status: Status, reward: float = 0.0
    ) -> None:
        """Record where an episode ended."""

    def abandon(self, track: EpisodeTrack) -> None:
        """Take an episode back."""

    def act_batch(
        self, track: BatchTrack, observations: Any, rewards: Any, terminated: Any, truncated: Any
    ) -> Any:
        """Record a vector step; returns the next actions."""

    def abandon_rows(self, track: BatchTrack, indices: Sequence[int]) -> None:
        """Take some episodes of a batch back."""

    def close_batch(self, track: BatchTrack) -> None:
        """Take back what is running of a batch; nothing more comes from it."""

    def update_policy_weights(self) -> None:
        """Act with the newest policy there is."""

    def ping(self) -> float:
        """Seconds that a round trip takes, without an action."""
        ...

    def interrupt(self) -> None:
        """Make whoever waits raise ClosedClientError. Any thread."""

    def finish(self) -> None:
        """Bring what was told to the server, and close the session: within ``close_s``."""

    def abort(self) -> None:
        """Let go of everything, without a word."""


class AioActor(Protocol):
    """One event loop; any number of tasks, one call for an episode at a time."""

    async def connect(self) -> None:
        """See ``Actor``."""

    async def act(self, track: EpisodeTrack, observation: Any, reward: float = 0.0) -> Any:
        """See ``Actor``."""

    async def log_action(
        self,
        track: EpisodeTrack,
        observation: Any,
        action: Any,
        logp: float | None = None,
        reward: float = 0.0,
    ) -> None:
        """See ``Actor``."""

    async def end(
        self, track: EpisodeTrack, observation: Any, status: Status, reward: float = 0.0
    ) -> None:
        """See ``Actor``."""

    async def abandon(self, track: EpisodeTrack) -> None:
        """See ``Actor``."""

    async def act_batch(
        self, track: BatchTrack, observations: Any, rewards: Any, terminated: Any, truncated: Any
    ) -> Any:
        """See ``Actor``."""

    async def abandon_rows(self, track: BatchTrack, indices: Sequence[int]) -> None:
        """See ``Actor``."""

    async def close_batch(self, track: BatchTrack) -> None:
        """See ``Actor``."""

    async def update_policy_weights(self) -> None:
        """See ``Actor``."""

    async def ping(self) -> float:
        """See ``Actor``."""
        ...

    async def finish(self) -> None:
        """See ``Actor``; calls under way raise ClosedClientError."""

    async def abort(self) -> None:
        """See ``Actor``; whoever waits is told so."""

    def forget(self) -> None:
        """Let go of a client that nobody closed. Any thread."""
