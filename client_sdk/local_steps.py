"""``LocalSteps``: the steps of all episodes of a client that acts alone, recorded, acted on and cut.

It never waits: whoever calls has made sure that there is a policy to act with. One call at a time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from client_sdk.background import Background
from client_sdk.batch_track import BatchTrack
from client_sdk.chunks import CutChunk
from client_sdk.episode_track import EpisodeTrack
from client_sdk.errors import LogpRequiredError
from client_sdk.loaded_policy import LoadedPolicy
from client_sdk.recorder import ChunkFormat, Recording
from client_sdk.rows import Status, Track
from client_sdk.session import Handshake
from client_sdk.wire.batches import Columns

MAX_AGE_S: Final = 5.0
"""However slowly an application steps, what it has experienced is uploaded about this often."""
_STEPS_PER_UPLOAD: Final = 500
"""Where the server names no number."""
_LOGP: Final = "action_logp"


class LocalSteps:
    """Steps of all episodes: recorded, acted on, cut. Whoever calls has made sure that it may act."""

    def __init__(self, handshake: Handshake, background: Background) -> None:
        self.handshake = handshake
        self._background = background
        self._feed = background.feed
        self._recordings: dict[Track, Recording] = {}
        self._spare: Recording | None = None  # of an episode that has ended, for the next one
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
                self._background.add(cut, urgent=False)
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
        recording, self._spare = self._spare, None
        if recording is None or n != 1 or recording.options != track.options:
            recording = Recording(form, n, track.options)
        self._recordings[track] = recording
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
            self._background.add(chunks, urgent=urgent)

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
        policy = self._feed.policy
        if policy is None:
            raise TypeError("no policy to act with")
        return policy

    def _act(self, track: Track, recording: Recording, policy: LoadedPolicy) -> Columns:
        if not recording.continues(policy, logged=False):
            self.handshake.policy_version = policy.version
            if recording.whole_steps:
                # One policy per chunk: what the last one did goes up now.
                self._background.add(self._cut(track, recording), urgent=False)
        actions, env_actions, outputs = policy.act(recording.latest(), recording.greedy)
        recording.acted(policy, actions, outputs)
        return env_actions

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
            self._background.add(self._cut(track, recording), urgent=False)
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
        recording.clear()
        self._spare = recording
        if chunk is not None:
            chunk.metrics = track.take_metrics()
            self._background.add([chunk], urgent=False)

    def abandon(self, track: Track, rows: Sequence[int]) -> None:
        """Take episodes back."""
        recording = self._recordings.get(track)
        if recording is None:
            return
        given_up = [recording.abandon(row) for row in rows]
        if chunks := [chunk for chunk in given_up if chunk is not None]:
            self._background.add(chunks, urgent=False)

    def forget(self, track: Track) -> None:
        """Nothing more will be recorded of it."""
        self._recordings.pop(track, None)
