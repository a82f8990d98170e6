"""Columns to RLlib's episodes, and the callbacks that watch them grow. Actor thread only.

T is a chunk's number of steps, L that of the steps before it that come along as lookback.
"""

from __future__ import annotations

import uuid
from collections import deque
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.env.utils.infinite_lookback_buffer import InfiniteLookbackBuffer

from client_sdk.wire.batches import Columns
from policy_server.callbacks import Callbacks
from policy_server.chunk_columns import ChunkColumns, runs
from policy_server.experience import Chunk
from policy_server.learner_view import LearnerViews, rewrite_newest
from policy_server.structs import map_struct

CHUNKS_KEPT = 100
"""Of a running episode, for ``on_episode_end``: the latest ones, so that an episode without an end
does not fill the memory."""

_BLANK = vars(InfiniteLookbackBuffer())


class EpisodeMemory:
    """What is remembered of an episode from one chunk to the next, in ``identity.memory``."""

    __slots__ = (
        "actions",
        "counted",
        "custom_data",
        "handed",
        "id",
        "infos",
        "live",
        "next_step",
        "observations",
        "outputs",
        "policy",
        "rewards",
        "shared_data",
        "t",
    )

    def __init__(self) -> None:
        # A client's own name for an episode need not be unique; RLlib joins chunks by this.
        self.id = uuid.uuid4().hex
        self.t = 0
        self.next_step = -1
        self.custom_data: dict[str, Any] = {}
        # Lookback: [L+1] observations and infos, [L] of the others.
        self.observations: Any = None
        self.infos: list[dict[str, Any]] = [{}]
        self.actions: Any = None
        self.rewards: NDArray[np.float64] = np.zeros(0)
        self.outputs: dict[str, Any] = {}
        # Only where episodes are built step by step:
        self.live: SingleAgentEpisode | None = None
        self.counted: SingleAgentEpisode | None = None
        self.policy: Any = None
        self.shared_data: dict[str, Any] = {}
        # Only where a callback waits for the end:
        self.handed: deque[SingleAgentEpisode] = deque(maxlen=CHUNKS_KEPT)

    @property
    def lookback(self) -> int:
        """L."""
        return len(self.rewards)

    def empty(
        self, observation_space: gym.Space[Any], action_space: gym.Space[Any]
    ) -> SingleAgentEpisode:
        """The episode before its first observation."""
        return SingleAgentEpisode(
            self.id, observation_space=observation_space, action_space=action_space
        )


class EpisodeBuilder:
    """Makes the episodes that the learner gets, one of each chunk."""

    def __init__(
        self,
        views: LearnerViews,
        action_space: gym.Space[Any],
        callbacks: Callbacks,
        rl_module: Any,
        *,
        lookback: int,
        joins_chunks: bool,
    ) -> None:
        """Prepare.

        Args:
            views: Of the observations.
            action_space: Of the actions that the application executes.
            callbacks: The user's.
            rl_module: The actor's own; custom connectors may ask for it.
            lookback: Steps that come along from the chunk before, at most.
            joins_chunks: Where two chunks meet, the observation must be the same in both.
        """
        self._views = views
        self._action_space = action_space
        self._callbacks = callbacks
        self._rl_module = rl_module
        self._lookback = lookback
        self._joins = joins_chunks

    def build(
        self, chunk: Chunk, memory: EpisodeMemory, columns: ChunkColumns
    ) -> SingleAgentEpisode:
        """What RLlib gets of a chunk.

        Args:
            chunk: With at least one step.
            memory: What is remembered of its episode; told about this chunk.
            columns: Of the chunk.
        """
        stepwise = self._views.replays or self._callbacks.wants("on_episode_step")
        build = self._build_stepwise if stepwise else self._build_whole
        episode = build(chunk, memory, columns)
        memory.t += chunk.steps
        memory.next_step = chunk.first_step + chunk.steps
        memory.policy = chunk.rows[-1][0].policy
        return episode

    def _observations(self, chunk: Chunk, memory: EpisodeMemory, raw: Columns) -> Any:
        """``[T+1, ...]`` as the learner sees them, each under its own step's version."""
        versions = runs(chunk)
        if len(versions) == 1:
            observations = versions[0][2].observations(raw)
        else:
            pieces = []
            for start, stop, view in versions:
                end = stop + 1 if stop == chunk.steps else stop
                pieces.append(
                    view.observations({path: column[start:end] for path, column in raw.items()})
                )
            observations = map_struct(lambda *parts: np.concatenate(parts), *pieces)
        if self._joins and memory.t:
            map_struct(_begin_where_it_ended, observations, memory.observations)
        return observations

    def _build_whole(
        self, chunk: Chunk, memory: EpisodeMemory, steps: ChunkColumns
    ) -> SingleAgentEpisode:
        """The whole chunk at once."""
        lookback = memory.lookback
        observations = self._observations(chunk, memory, steps.raw)
        actions, rewards, outputs = steps.actions, steps.rewards, steps.outputs
        infos = [dict(info) for info in memory.infos] + steps.infos
        if memory.t == 0:
            self._announce(memory, observations)
        if lookback:
            observations = map_struct(_continued, memory.observations, observations)
            actions = map_struct(_appended, memory.actions, actions)
            rewards = _appended(memory.rewards, rewards)
            outputs = map_struct(_appended, memory.outputs, outputs)
        episode = self._assemble(
            chunk, memory, lookback, observations, infos, actions, rewards, outputs
        )
        if chunk.terminated or chunk.truncated:
            self._callbacks.episode(
                "on_episode_end", episode, prev_episode_chunks=list(memory.handed)
            )
            return episode
        if self._callbacks.wants("on_episode_end"):
            # Not the one that RLlib gets: its learner connectors append to that.
            memory.handed.append(
                self._assemble(
                    chunk, memory, lookback, observations, list(infos), actions, rewards, outputs
                )
            )
        keep = min(self._lookback, len(rewards))

        def newest(column: NDArray[Any]) -> NDArray[Any]:
            return column[len(column) - keep :].copy()

        memory.observations = map_struct(
            lambda column: column[len(column) - keep - 1 :].copy(), observations
        )
        memory.infos = infos[len(infos) - keep - 1 :]
        memory.actions = map_struct(newest, actions)
        memory.rewards = newest(rewards)
        memory.outputs = map_struct(newest, outputs)
        return episode

    def _assemble(
        self,
        chunk: Chunk,
        memory: EpisodeMemory,
        lookback: int,
        observations: Any,
        infos: list[dict[str, Any]],
        actions: Any,
        rewards: NDArray[np.float64],
        outputs: dict[str, Any],
    ) -> SingleAgentEpisode:
        episode = SingleAgentEpisode(
            memory.id,
            observations=_lookback_buffer(observations, lookback),
            observation_space=self._views.space,
            infos=_lookback_buffer(infos, lookback),
            actions=_lookback_buffer(actions, lookback),
            action_space=self._action_space,
            rewards=_lookback_buffer(rewards, lookback),
            terminated=chunk.terminated,
            truncated=chunk.truncated,
            extra_model_outputs={
                name: _lookback_buffer(column, lookback) for name, column in outputs.items()
            },
            t_started=memory.t,
            len_lookback_buffer=lookback,
        )
        episode._custom_data = memory.custom_data
        return episode

    def _announce(self, memory: EpisodeMemory, observations: Any) -> None:
        """Created and started, as they would have been seen in an env loop."""
        wants = self._callbacks.wants
        if not (wants("on_episode_created") or wants("on_episode_start")):
            return
        episode = memory.empty(self._views.space, self._action_space)
        self._callbacks.episode("on_episode_created", episode)
        episode.add_env_reset(map_struct(lambda column: column[0], observations), {})
        self._callbacks.episode("on_episode_start", episode)
        memory.custom_data = episode.custom_data

    # Step by step.

    def _build_stepwise(
        self, chunk: Chunk, memory: EpisodeMemory, steps: ChunkColumns
    ) -> SingleAgentEpisode:
        """As an env loop would: for connectors and callbacks that watch an episode grow."""
        processed = None if self._views.replays else self._observations(chunk, memory, steps.raw)

        def observation(row: int) -> Any:
            if processed is None:
                return self._views.value(steps.raw, row)
            return map_struct(lambda column: column[row], processed)

        episode = memory.live
        if episode is None:
            episode = memory.empty(self._views.space, self._action_space)
            self._callbacks.episode("on_episode_created", episode)
            episode.add_env_reset(observation(0), {})
            self._rewrite(chunk, memory, episode, 0)
            self._callbacks.episode("on_episode_start", episode)
        elif not self._joins and memory.policy is not chunk.policy:
            # It was seen by the version before when that chunk ended; its action comes from ours.
            episode.observations.data[-1] = observation(0)
            self._rewrite(chunk, memory, episode, 0)
        for row in range(chunk.steps):
            last = row == chunk.steps - 1
            episode.add_env_step(
                observation(row + 1),
                map_struct(lambda column, row=row: column[row], steps.actions),
                float(steps.rewards[row]),
                steps.infos[row],
                terminated=last and chunk.terminated,
                truncated=last and chunk.truncated,
                extra_model_outputs=map_struct(lambda column, row=row: column[row], steps.outputs),
            )
            # Under the version that acts on it; the last one under the last step's.
            self._rewrite(chunk, memory, episode, min(row + 1, chunk.steps - 1))
            self._callbacks.episode("on_episode_step", episode)
        if episode.is_done:
            self._callbacks.episode(
                "on_episode_end", episode, prev_episode_chunks=list(memory.handed)
            )
            return episode.to_numpy()
        memory.live = episode.cut(len_lookback_buffer=self._lookback)
        memory.observations = map_struct(
            lambda value: np.asarray(value)[None], episode.get_observations(-1)
        )
        if self._callbacks.wants("on_episode_end"):
            memory.handed.append(SingleAgentEpisode.from_state(episode.get_state()))
        return episode.to_numpy()

    def _rewrite(
        self, chunk: Chunk, memory: EpisodeMemory, episode: SingleAgentEpisode, row: int
    ) -> None:
        if self._views.replays:
            rewrite_newest(
                self._views.thaw(chunk.rows[row][0].policy.view),  # type: ignore[attr-defined]
                episode,
                rl_module=self._rl_module,
                shared_data=memory.shared_data,
                explore=True,
            )

    def ended_between_chunks(self, chunk: Chunk) -> None:
        """Tell the callbacks of an end without steps: all of them are with RLlib already."""
        memory = chunk.identity.memory
        if memory is None or not self._callbacks.wants("on_episode_end"):
            return
        episode = memory.live
        if episode is None:
            episode = self._assemble(
                chunk,
                memory,
                memory.lookback,
                memory.observations,
                memory.infos,
                memory.actions,
                memory.rewards,
                memory.outputs,
            )
        episode.is_terminated, episode.is_truncated = chunk.terminated, chunk.truncated
        self._callbacks.episode("on_episode_end", episode, prev_episode_chunks=list(memory.handed))


def _begin_where_it_ended(observations: NDArray[Any], before: NDArray[Any]) -> None:
    observations[0] = before[-1]


def _continued(before: NDArray[Any], observations: NDArray[Any]) -> NDArray[Any]:
    """The first observation is the last one of before."""
    return np.concatenate([before[:-1], observations])


def _appended(before: NDArray[Any], column: NDArray[Any]) -> NDArray[Any]:
    return np.concatenate([before, column])


def _lookback_buffer(data: Any, lookback: int) -> InfiniteLookbackBuffer:
    # Its constructor would take the number of a dict's keys for a length, and for each of an
    # episode's many columns takes longer than to make the column.
    buffer = InfiniteLookbackBuffer.__new__(InfiniteLookbackBuffer)
    vars(buffer).update(_BLANK)
    buffer.data = data
    buffer.lookback = lookback
    buffer.finalized = not isinstance(data, list)
    return buffer
