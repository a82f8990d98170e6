"""``AsyncEpisode`` and ``AsyncEpisodeBatch``: what an ``AsyncPolicyClient`` runs, as objects.

See ``episode`` for what each method means. Loop only; one task at a time for each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from client_sdk.batch_track import BatchTrack
from client_sdk.episode_track import EpisodeTrack
from client_sdk.errors import ConcurrentUseError, EpisodeEndedError
from client_sdk.rows import end_status

if TYPE_CHECKING:
    from client_sdk.aio import AsyncPolicyClient


class AsyncEpisode:
    """One run of one agent; see ``Episode``, whose methods these are as coroutines."""

    def __init__(self, client: AsyncPolicyClient, track: EpisodeTrack) -> None:
        self._client = client
        self._track = track

    @property
    def id(self) -> str:
        """By which the client's verbs know it too."""
        return self._track.id

    @property
    def ended(self) -> bool:
        """Whether it is over."""
        return self._track.ended

    async def act(self, observation: Any, reward: float = 0.0) -> Any:
        """See ``Episode.act``."""
        actor, track = self._client._check(), self._track
        if track.ended:
            track.check_running()
        # As ``Alone``, written out: this is every step.
        if track.busy:
            raise in_use(track)
        track.busy = True
        try:
            return await actor.act(track, observation, reward)
        finally:
            track.busy = False

    async def log_action(
        self, observation: Any, action: Any, logp: float | None = None, reward: float = 0.0
    ) -> None:
        """See ``Episode.log_action``."""
        actor, track = self._client._check(), self._track
        track.check_running()
        with Alone(track):
            await actor.log_action(track, observation, action, logp, reward)

    async def log_returns(self, reward: float = 0.0, info: Mapping[Any, Any] | None = None) -> None:
        """See ``Episode.log_returns``."""
        self._client._check()
        self._track.check_running()
        self._client._log_returns(self._track.id, reward, info, None)

    async def end(
        self,
        observation: Any = None,
        reward: float = 0.0,
        *,
        terminated: bool = False,
        truncated: bool = False,
    ) -> None:
        """See ``Episode.end``."""
        client, track = self._client, self._track
        actor = client._check()
        track.check_running()
        with Alone(track):
            status = end_status(terminated=terminated, truncated=truncated)
            await actor.end(track, observation, status, reward)
            client._ended(track)

    async def abandon(self) -> None:
        """See ``Episode.abandon``."""
        client, track = self._client, self._track
        actor = client._check()
        if not track.ended:
            client._ended(track)
            await actor.abandon(track)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._client.closed:
            await self.abandon()


class AsyncEpisodeBatch:
    """N episodes that step together; see ``EpisodeBatch``, whose methods these are as coroutines.

    Attributes:
        n: How many.
    """

    def __init__(self, client: AsyncPolicyClient, track: BatchTrack) -> None:
        self._client = client
        self._track = track
        self._closed = False
        self.n = track.n

    async def act(
        self,
        observations: Any,
        rewards: Any = None,
        terminated: Any = None,
        truncated: Any = None,
    ) -> Any:
        """See ``EpisodeBatch.act``."""
        actor, track = self._client._check(), self._track
        if self._closed:
            raise EpisodeEndedError("this batch has ended; start another one")
        with Alone(track):
            return await actor.act_batch(track, observations, rewards, terminated, truncated)

    async def abandon(self, rows: Sequence[int]) -> None:
        """See ``EpisodeBatch.abandon``."""
        actor, track = self._client._check(), self._track
        with Alone(track):
            await actor.abandon_rows(track, rows)

    async def close(self) -> None:
        """Take back what is running. Idempotent."""
        if self._closed:
            return
        self._closed = True
        client, track = self._client, self._track
        actor = client._check()
        client._batch_ended(track)
        await actor.close_batch(track)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._client.closed:
            await self.close()


class Alone:
    """One call for an episode at a time: its steps have an order."""

    __slots__ = ("_track",)

    def __init__(self, track: EpisodeTrack | BatchTrack) -> None:
        self._track = track

    def __enter__(self) -> None:
        track = self._track
        if track.busy:
            raise in_use(track)
        track.busy = True

    def __exit__(self, *exception: object) -> None:
        self._track.busy = False


def in_use(track: EpisodeTrack | BatchTrack) -> ConcurrentUseError:
    """The error for a second call."""
    return ConcurrentUseError(
        f"another task waits for an answer to episode {track}: one call for an episode at a time"
    )
