"""``Episode`` and ``EpisodeBatch``: what a ``PolicyClient`` runs, as objects.

Thin: each call is let in by the client's guard and handed to its actor. One thread at a time, that of
the client.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from client_sdk.batch_track import BatchTrack
from client_sdk.episode_track import EpisodeTrack
from client_sdk.errors import EpisodeEndedError
from client_sdk.rows import end_status

if TYPE_CHECKING:
    from client_sdk.client import PolicyClient


class Episode:
    """One run of one agent, from reset to end.

    ::

        with client.episode() as episode:
            observation, _ = env.reset()
            reward, terminated, truncated = 0.0, False, False
            while not (terminated or truncated):
                action = episode.act(observation, reward)
                observation, reward, terminated, truncated, _ = env.step(action)
            episode.end(observation, reward, terminated=terminated, truncated=truncated)

    Left without an end, it is abandoned: nothing more is learnt from it.
    """

    def __init__(self, client: PolicyClient, track: EpisodeTrack) -> None:
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

    def act(self, observation: Any, reward: float = 0.0) -> Any:
        """Record where the episode is and return what to do next.

        Args:
            observation: One value of the observation space.
            reward: Earned since the previous ``act``; must be 0 at the first.

        Returns:
            One value of the action space. Arrays are yours to keep.

        Raises:
            EpisodeEndedError: The episode has already ended.
            InvalidValueError: A value that cannot be sent; nothing was recorded.
            PolicyTimeout: No answer in time. Calling again is safe: it asks for the same step, and
                neither argument is read.
            ConnectError: The connection was lost and could not be made again in time.
        """
        client, track = self._client, self._track
        with client._guard:
            if track.ended:
                track.check_running()
            return client._actor.act(track, observation, reward)

    def log_action(
        self, observation: Any, action: Any, logp: float | None = None, reward: float = 0.0
    ) -> None:
        """Record where the episode is and what the application does by itself.

        See ``PolicyClient.log_action``; ``reward`` as in ``act``.
        """
        client, track = self._client, self._track
        with client._guard:
            track.check_running()
            client._actor.log_action(track, observation, action, logp, reward)

    def log_returns(self, reward: float = 0.0, info: Mapping[Any, Any] | None = None) -> None:
        """Add to what the last action earned, and to the metrics; see ``PolicyClient``."""
        with self._client._guard:
            self._track.check_running()
            self._client._log_returns(self._track.id, reward, info, None)

    def end(
        self,
        observation: Any = None,
        reward: float = 0.0,
        *,
        terminated: bool = False,
        truncated: bool = False,
    ) -> None:
        """Record where the episode ended. Costs no round trip.

        Args:
            observation: The final one; may be left out unless truncated.
            reward: Earned since the previous ``act``.
            terminated: The task itself is over. So it is if neither is given.
            truncated: It was cut off from outside, and might have gone on.

        Raises:
            EpisodeEndedError: It has already ended.
            InvalidValueError: A value that cannot be sent; the episode is still running.
        """
        client, track = self._client, self._track
        with client._guard:
            track.check_running()
            status = end_status(terminated=terminated, truncated=truncated)
            client._actor.end(track, observation, status, reward)
            client._ended(track)

    def abandon(self) -> None:
        """Take it back: it never happened (crash, level unload). Nothing more is learnt from it."""
        client, track = self._client, self._track
        with client._guard:
            if not track.ended:
                client._actor.abandon(track)
                client._ended(track)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._client.closed:
            self.abandon()


class EpisodeBatch:
    """N episodes that step together, in Gymnasium's NEXT_STEP order.

    ::

        with client.episodes(envs.num_envs) as batch:
            observations, _ = envs.reset()
            actions = batch.act(observations)
            while True:
                actions = batch.act(*envs.step(actions)[:4])

    One message for all of them per step. Left, it abandons what is running.

    Attributes:
        n: How many.
    """

    def __init__(self, client: PolicyClient, track: BatchTrack) -> None:
        self._client = client
        self._track = track
        self._closed = False
        self.n = track.n

    def act(
        self,
        observations: Any,
        rewards: Any = None,
        terminated: Any = None,
        truncated: Any = None,
    ) -> Any:
        """Record where the episodes are and return what to do next.

        Where a row ended, ``observations[i]`` is its final observation and the action returned for
        it means nothing; the next call's ``observations[i]`` is the first of a new episode, and its
        reward is ignored.

        Args:
            observations: N values, as a vector environment gives them: ``[N, ...]``, or dicts and
                tuples of such arrays.
            rewards: [N] Earned since the previous call; None: nothing.
            terminated: [N] Rows whose task is over; None: none.
            truncated: [N] Rows that were cut off from outside; None: none.

        Returns:
            N actions in the same form: ``[N, ...]``. Arrays are yours to keep.

        Raises:
            BatchError: Some rows cannot be sent (then nothing was, and ``abandon`` drops them), or
                were refused (then ``error.actions`` has the others').
            InvalidValueError: A value that cannot be sent; nothing was recorded.
            PolicyTimeout: No answer in time. Calling again is safe: it asks for the same step, and
                the arguments are not read.
            ConnectError: The connection was lost and could not be made again in time.
        """
        client = self._client
        with client._guard:
            if self._closed:
                raise EpisodeEndedError("this batch has ended; start another one")
            return client._actor.act_batch(
                self._track, observations, rewards, terminated, truncated
            )

    def abandon(self, rows: Sequence[int]) -> None:
        """Take the episodes in those rows back; their next observations begin new ones.

        Raises:
            InvalidValueError: No such row.
        """
        client = self._client
        with client._guard:
            client._actor.abandon_rows(self._track, rows)

    def close(self) -> None:
        """Take back what is running. Idempotent."""
        if self._closed:
            return
        client = self._client
        with client._guard:
            client._actor.close_batch(self._track)
            self._closed = True
            client._batch_ended(self._track)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._client.closed:
            self.close()
