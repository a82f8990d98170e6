"""Local inference: the policy runs here, and what it experiences is uploaded in the background.

``LocalActor`` is the blocking shell, ``AioLocalActor`` the one for an event loop; both are thin over
``LocalSteps``, which never waits. One call at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from client_sdk.config import Timeouts
from client_sdk.episode import BatchTrack, EpisodeTrack, Status, Track
from client_sdk.errors import LogpRequiredError
from client_sdk.policy_feed import LoadedPolicy
from client_sdk.recorder import ChunkFormat, CutChunk, Recording
from client_sdk.session import Handshake
from client_sdk.uploader import Uploader
from client_sdk.wire.batches import Columns

MAX_AGE_S: Final = 5.0
"""However slowly an application steps, what it has experienced is uploaded about this often."""
_STEPS_PER_UPLOAD: Final = 500
"""Where the server names no number."""
_LOGP: Final = "action_logp"


class LocalSteps:
    """Steps of all episodes: recorded, acted on, cut. Whoever calls has made sure that it may act."""

    def __init__(self, handshake: Handshake, uploader: Uploader) -> None:
        self.uploader = uploader
        self.handshake = handshake
        self._recordings: dict[Track, Recording] = {}
        self._greedy: dict[tuple[int, bool], NDArray[np.bool_]] = {}
        self._unsent = 0
        self._next_upload_s = 0.0
        self._form: ChunkFormat | None = None
        self._steps_per_upload = _STEPS_PER_UPLOAD

    # -- one step: where we are ----------------------------------------------------------------

    def observe(self, track: EpisodeTrack, observation: Any, reward: float) -> Recording:
        """Record where an episode is, unless that is recorded and only the action is missing."""
        recording = self._recordings.get(track)
        if recording is None:
            columns = self.handshake.observation(observation)
            track.add_reward(reward)
            recording = self._record(track, 1)
        elif recording.awaiting:
            return recording
        else:
            columns = self.handshake.observation(observation)
            track.add_reward(reward)
        recording.observe(columns, track.take_reward())
        self._count(recording)
        return recording

    def observe_batch(
        self, track: BatchTrack, observations: Any, rewards: Any, terminated: Any, truncated: Any
    ) -> Recording:
        """Likewise, for N episodes; those that end here are cut."""
        recording = self._recordings.get(track)
        if recording is not None and recording.awaiting:
            return recording
        columns = self.handshake.observations(observations, track.n)
        begins = recording.begins if recording is not None else np.ones(track.n, np.bool_)
        earned, over, ended = track.checked(rewards, terminated, truncated, begins)
        if recording is None:
            recording = self._record(track, track.n)
        recording.observe(columns, 0.0 if earned is None else earned)
        if ended is not None:
            cut: list[CutChunk] = []
            for row in np.flatnonzero(ended).tolist():
                terminal = over is not None and over[row]
                chunk = recording.end(row, Status.TERMINATED if terminal else Status.TRUNCATED)
                if chunk is not None:
                    cut.append(chunk)
            if cut:
                self.uploader.add(cut, urgent=False)
        self._count(recording)
        return recording

    def _record(self, track: Track, n: int) -> Recording:
        form = self._form
        if form is None:
            session = self.handshake.opened
            form = self._form = ChunkFormat(
                self.handshake.observation_codec,
                session.max_message_bytes,
                session.max_rows_per_request,
            )
            self._steps_per_upload = session.steps_per_upload or _STEPS_PER_UPLOAD
            self._next_upload_s = time.monotonic() + MAX_AGE_S
        recording = self._recordings[track] = Recording(form, n, track.options)
        return recording

    def _count(self, recording: Recording) -> None:
        """Cut everything when it is time."""
        if recording.whole_steps:
            self._unsent += recording.n
        if (
            self._unsent >= self._steps_per_upload
            or recording.full
            or time.monotonic() >= self._next_upload_s
        ):
            self.upload(urgent=True)

    def upload(self, *, urgent: bool) -> None:
        """Cut all recordings, and have the chunks uploaded."""
        self._unsent = 0
        self._next_upload_s = time.monotonic() + MAX_AGE_S
        chunks: list[CutChunk] = []
        for track, recording in self._recordings.items():
            chunks += self._cut(track, recording)
        if chunks or urgent:
            self.uploader.add(chunks, urgent=urgent)

    @staticmethod
    def _cut(track: Track, recording: Recording) -> list[CutChunk]:
        chunks = recording.cut()
        if chunks and isinstance(track, EpisodeTrack):
            chunks[-1].metrics = track.take_metrics()
        return chunks

    # -- one step: what we do ------------------------------------------------------------------

    def choose(self, track: EpisodeTrack, recording: Recording) -> Any:
        """The next action of an episode."""
        columns = self._act(track, recording, self._policy())
        track.step += 1
        return self.handshake.action_codec.value(columns, 0)

    def choose_batch(self, track: BatchTrack, recording: Recording) -> Any:
        """The next actions of N episodes."""
        columns = self._act(track, recording, self._policy())
        return self.handshake.action_codec.batched_value(columns)

    def _policy(self) -> LoadedPolicy:
        policy = self.uploader.policy
        if policy is None:
            raise TypeError("no policy to act with")
        return policy

    def _act(self, track: Track, recording: Recording, policy: LoadedPolicy) -> Columns:
        if not recording.continues(policy, logged=False) and recording.whole_steps:
            # One policy per chunk: what the last one did goes up now.
            self.uploader.add(self._cut(track, recording), urgent=False)
        actions, env_actions, outputs = policy.act(recording.latest(), self._greed(recording))
        recording.acted(policy, actions, outputs)
        self.handshake.policy_version = policy.version
        return env_actions

    def _greed(self, recording: Recording) -> NDArray[np.bool_]:
        key = (recording.n, recording.options.explore)
        greedy = self._greedy.get(key)
        if greedy is None:
            greedy = self._greedy[key] = np.full(recording.n, not recording.options.explore)
        return greedy

    def log(
        self,
        track: EpisodeTrack,
        recording: Recording | None,
        observation: Any,
        action: Any,
        logp: float | None,
        reward: float,
    ) -> None:
        """Record what the application did by itself."""
        handshake, policy = self.handshake, self._policy()
        columns = handshake.observation(observation)
        actions = handshake.logged_action(action, logp)
        if logp is None and _LOGP in policy.recorded and track.options.trains:
            raise LogpRequiredError(
                "this algorithm learns from logged actions only with their log-density: pass logp="
            )
        track.add_reward(reward)
        if recording is None:
            recording = self._record(track, 1)
        recording.observe(columns, track.take_reward())
        self._count(recording)
        outputs = {} if logp is None else {_LOGP: np.array([logp], np.float32)}
        if not recording.continues(policy, logged=True) and recording.whole_steps:
            self.uploader.add(self._cut(track, recording), urgent=False)
        recording.acted(policy, actions, outputs, logged=True)
        track.step += 1

    # -- ends ----------------------------------------------------------------------------------

    def recording(self, track: Track) -> Recording | None:
        """What is recorded of an episode; None: nothing yet."""
        return self._recordings.get(track)

    def end(self, track: EpisodeTrack, observation: Any, status: Status, reward: float) -> None:
        """Record where an episode ended."""
        columns = self.handshake.last_observation(observation, status)
        track.add_reward(reward)
        recording = self._recordings.pop(track, None)
        if recording is None:
            return  # an episode without a step
        if columns is None:
            recording.observe_again(track.take_reward())
        else:
            recording.observe(columns, track.take_reward())
        chunk = recording.end(0, status)
        if chunk is not None:
            chunk.metrics = track.take_metrics()
            self.uploader.add([chunk], urgent=False)

    def abandon(self, track: Track, rows: Sequence[int]) -> None:
        """Take episodes back."""
        recording = self._recordings.get(track)
        if recording is None:
            return
        given_up = [recording.abandon(row) for row in rows]
        if chunks := [chunk for chunk in given_up if chunk is not None]:
            self.uploader.add(chunks, urgent=False)

    def forget(self, track: Track) -> None:
        """Nothing more will be recorded of it."""
        self._recordings.pop(track, None)


class LocalActor:
    """The blocking shell."""

    def __init__(self, handshake: Handshake, uploader: Uploader) -> None:
        self._steps = LocalSteps(handshake, uploader)
        self._uploader = uploader

    def connect(self) -> None:
        """Open the session, and have the policy fetched."""
        self._uploader.connect()

    def act(self, track: EpisodeTrack, observation: Any, reward: float = 0.0) -> Any:
        """Record where an episode is; returns the next action."""
        steps = self._steps
        recording = steps.observe(track, observation, reward)
        if self._uploader.attention:
            self._uploader.await_policy(trains=recording.trains)
        return steps.choose(track, recording)

    def act_batch(
        self, track: BatchTrack, observations: Any, rewards: Any, terminated: Any, truncated: Any
    ) -> Any:
        """Record a vector step; returns the next actions."""
        steps = self._steps
        recording = steps.observe_batch(track, observations, rewards, terminated, truncated)
        if self._uploader.attention:
            self._uploader.await_policy(trains=recording.trains)
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
        if self._uploader.policy is None:
            self._uploader.await_policy(trains=False)
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
            self._uploader.await_policy(trains=recording.trains)
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
        self._uploader.update_policy()

    def ping(self) -> float:
        """Seconds that a round trip takes."""
        return self._uploader.ping()

    def interrupt(self) -> None:
        """Make whoever waits raise ClosedClientError. Any thread."""
        self._uploader.interrupt()

    def finish(self) -> None:
        """Upload what is there, and close the session: within ``close_s``."""
        self._steps.upload(urgent=False)
        self._uploader.finish()

    def abort(self) -> None:
        """Let go of everything, without a word."""
        self._uploader.abort()


class AioLocalActor:
    """The shell for one event loop: the policy runs on it, and tasks wait for the uploader's threads."""

    def __init__(self, handshake: Handshake, uploader: Uploader, timeouts: Timeouts) -> None:
        self._steps = LocalSteps(handshake, uploader)
        self._uploader = uploader
        self._timeouts = timeouts
        self._loop = asyncio.get_running_loop()
        self._waiters: set[asyncio.Future[None]] = set()

    async def connect(self) -> None:
        """Open the session, and have the policy fetched."""
        self._uploader.listen(self._notify)
        await asyncio.to_thread(self._uploader.connect)

    async def act(self, track: EpisodeTrack, observation: Any, reward: float = 0.0) -> Any:
        """Record where an episode is; returns the next action."""
        recording = self._steps.observe(track, observation, reward)
        if self._uploader.attention:
            await self._may_act(trains=recording.trains)
        return self._steps.choose(track, recording)

    async def act_batch(
        self, track: BatchTrack, observations: Any, rewards: Any, terminated: Any, truncated: Any
    ) -> Any:
        """Record a vector step; returns the next actions."""
        recording = self._steps.observe_batch(track, observations, rewards, terminated, truncated)
        if self._uploader.attention:
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
        if self._uploader.policy is None:
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
        await asyncio.to_thread(self._uploader.update_policy)

    async def ping(self) -> float:
        """Seconds that a round trip takes."""
        return await asyncio.to_thread(self._uploader.ping)

    async def finish(self) -> None:
        """Upload what is there, and close the session: within ``close_s``."""
        self._steps.upload(urgent=False)
        await asyncio.to_thread(self._uploader.finish)
        self._wake()

    async def abort(self) -> None:
        """Let go of everything, without a word; whoever waits is told so."""
        self._uploader.interrupt()
        await asyncio.to_thread(self._uploader.abort)
        self._wake()

    def forget(self) -> None:
        """Let go of a client that nobody closed. Any thread."""
        self._uploader.abort()

    async def _may_act(self, *, trains: bool) -> None:
        """Wait until there is a policy to act with now.

        Raises:
            PolicyTimeout: Not within ``Timeouts.action_s``.
            PolicyClientError: As ``Uploader.may_act``.
        """
        uploader = self._uploader
        deadline = self._loop.time() + self._timeouts.action_s
        while not uploader.may_act(trains=trains):
            waiter: asyncio.Future[None] = self._loop.create_future()
            self._waiters.add(waiter)
            try:
                # Looked at once more, for it may have changed before there was a waiter.
                if not uploader.may_act(trains=trains):
                    async with asyncio.timeout_at(deadline):
                        await waiter
            except TimeoutError:
                raise uploader.overdue() from None
            finally:
                self._waiters.discard(waiter)

    def _notify(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
