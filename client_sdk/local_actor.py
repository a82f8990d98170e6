"""Local inference: the policy runs here, and what it experiences is uploaded in the background.

``LocalActor`` is the blocking shell, ``AioLocalActor`` the one for an event loop; both are thin over
``LocalSteps``, and do the waiting. One call at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any

from client_sdk.background import Background
from client_sdk.batch_track import BatchTrack
from client_sdk.config import Timeouts
from client_sdk.episode_track import EpisodeTrack
from client_sdk.local_steps import LocalSteps
from client_sdk.recorder import Recording
from client_sdk.rows import Status
from client_sdk.session import Handshake


class LocalActor:
    """The blocking shell."""

    def __init__(self, handshake: Handshake, background: Background) -> None:
        self._steps = LocalSteps(handshake, background)
        self._background = background
        self._pace = background.pace

    def connect(self) -> None:
        """Open the session, and have the policy fetched."""
        self._background.connect()

    def act(self, track: EpisodeTrack, observation: Any, reward: float = 0.0) -> Any:
        """Record where an episode is; returns the next action."""
        steps = self._steps
        recording = steps.observe(track, observation, reward)
        if self._pace.attention:
            self._background.await_policy(trains=recording.trains)
        return steps.choose(track, recording)

    def act_batch(
        self, track: BatchTrack, observations: Any, rewards: Any, terminated: Any, truncated: Any
    ) -> Any:
        """Record a vector step; returns the next actions."""
        steps = self._steps
        recording = steps.observe_batch(track, observations, rewards, terminated, truncated)
        if self._pace.attention:
            self._background.await_policy(trains=recording.trains)
        return steps.choose_batch(track, recording)

    def log_action(
        self,
        track: EpisodeTrack,
        observation: Any,
        action: Any,
        logp: float | None = None,
        reward: float = 0.0,
    ) -> None:
        """Record what the application did by itself."""
        recording = self._settle(track)
        if self._background.feed.policy is None:
            self._background.await_policy(trains=False)
        self._steps.log(track, recording, observation, action, logp, reward)

    def end(
        self, track: EpisodeTrack, observation: Any, status: Status, reward: float = 0.0
    ) -> None:
        """Record where an episode ended."""
        self._settle(track)
        self._steps.end(track, observation, status, reward)

    def _settle(self, track: EpisodeTrack) -> Recording | None:
        """Choose the action that nobody has waited for to the end."""
        recording = self._steps.recording(track)
        if recording is not None and recording.awaiting:
            self._background.await_policy(trains=recording.trains)
            self._steps.choose(track, recording)
        return recording

    def abandon(self, track: EpisodeTrack) -> None:
        """Take an episode back."""
        self._steps.abandon(track, [0])
        self._steps.forget(track)

    def abandon_rows(self, track: BatchTrack, indices: Sequence[int]) -> None:
        """Take some episodes of a batch back."""
        track.check_rows(indices)
        self._steps.abandon(track, indices)

    def close_batch(self, track: BatchTrack) -> None:
        """Take back what is running of a batch; nothing more comes from it."""
        self._steps.abandon(track, range(track.n))
        self._steps.forget(track)

    def update_policy_weights(self) -> None:
        """Act with the newest policy there is."""
        self._background.update_policy()

    def ping(self) -> float:
        """Seconds that a round trip takes."""
        return self._background.ping()

    def interrupt(self) -> None:
        """Make whoever waits raise ClosedClientError. Any thread."""
        self._background.interrupt()

    def finish(self) -> None:
        """Upload what is there, and close the session: within ``close_s``."""
        self._steps.upload(urgent=False)
        self._background.finish()

    def abort(self) -> None:
        """Let go of everything, without a word."""
        self._background.abort()


class AioLocalActor:
    """The shell for one event loop: the policy runs on it, and tasks wait for the background."""

    def __init__(self, handshake: Handshake, background: Background, timeouts: Timeouts) -> None:
        self._steps = LocalSteps(handshake, background)
        self._background = background
        self._pace = background.pace
        self._timeouts = timeouts
        self._loop = asyncio.get_running_loop()
        self._waiters: set[asyncio.Future[None]] = set()

    async def connect(self) -> None:
        """Open the session, and have the policy fetched."""
        self._background.listen(self._notify)
        await asyncio.to_thread(self._background.connect)

    async def act(self, track: EpisodeTrack, observation: Any, reward: float = 0.0) -> Any:
        """Record where an episode is; returns the next action."""
        recording = self._steps.observe(track, observation, reward)
        if self._pace.attention:
            await self._may_act(trains=recording.trains)
        return self._steps.choose(track, recording)

    async def act_batch(
        self, track: BatchTrack, observations: Any, rewards: Any, terminated: Any, truncated: Any
    ) -> Any:
        """Record a vector step; returns the next actions."""
        recording = self._steps.observe_batch(track, observations, rewards, terminated, truncated)
        if self._pace.attention:
            await self._may_act(trains=recording.trains)
        return self._steps.choose_batch(track, recording)

    async def log_action(
        self,
        track: EpisodeTrack,
        observation: Any,
        action: Any,
        logp: float | None = None,
        reward: float = 0.0,
    ) -> None:
        """Record what the application did by itself."""
        recording = await self._settle(track)
        if self._background.feed.policy is None:
            await self._may_act(trains=False)
        self._steps.log(track, recording, observation, action, logp, reward)

    async def end(
        self, track: EpisodeTrack, observation: Any, status: Status, reward: float = 0.0
    ) -> None:
        """Record where an episode ended."""
        await self._settle(track)
        self._steps.end(track, observation, status, reward)

    async def _settle(self, track: EpisodeTrack) -> Recording | None:
        recording = self._steps.recording(track)
        if recording is not None and recording.awaiting:
            await self._may_act(trains=recording.trains)
            self._steps.choose(track, recording)
        return recording

    async def abandon(self, track: EpisodeTrack) -> None:
        """Take an episode back."""
        self._steps.abandon(track, [0])
        self._steps.forget(track)

    async def abandon_rows(self, track: BatchTrack, indices: Sequence[int]) -> None:
        """Take some episodes of a batch back."""
        track.check_rows(indices)
        self._steps.abandon(track, indices)

    async def close_batch(self, track: BatchTrack) -> None:
        """Take back what is running of a batch; nothing more comes from it."""
        self._steps.abandon(track, range(track.n))
        self._steps.forget(track)

    async def update_policy_weights(self) -> None:
        """Act with the newest policy there is."""
        await asyncio.to_thread(self._background.update_policy)

    async def ping(self) -> float:
        """Seconds that a round trip takes."""
        return await asyncio.to_thread(self._background.ping)

    async def finish(self) -> None:
        """Upload what is there, and close the session: within ``close_s``."""
        self._steps.upload(urgent=False)
        await asyncio.to_thread(self._background.finish)
        self._wake()

    async def abort(self) -> None:
        """Let go of everything, without a word; whoever waits is told so."""
        self._background.interrupt()
        await asyncio.to_thread(self._background.abort)
        self._wake()

    def forget(self) -> None:
        """Let go of a client that nobody closed. Any thread."""
        self._background.abort()

    async def _may_act(self, *, trains: bool) -> None:
        """Wait until there is a policy to act with now.

        Raises:
            PolicyTimeout: Not within ``Timeouts.action_s``.
            PolicyClientError: As ``Background.may_act``.
        """
        background = self._background
        deadline = self._loop.time() + self._timeouts.action_s
        while not background.may_act(trains=trains):
            waiter: asyncio.Future[None] = self._loop.create_future()
            self._waiters.add(waiter)
            try:
                # Looked at once more, for it may have changed before there was a waiter.
                if not background.may_act(trains=trains):
                    async with asyncio.timeout_at(deadline):
                        await waiter
            except TimeoutError:
                raise background.overdue() from None
            finally:
                self._waiters.discard(waiter)

    def _notify(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
