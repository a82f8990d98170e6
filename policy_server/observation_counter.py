"""Which observations were counted already: each one goes into the running statistics once.

Actor thread only. Nothing happens here where no connector learns from observations.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

from client_sdk.wire.batches import Columns
from policy_server.episode_builder import EpisodeMemory
from policy_server.experience import Chunk
from policy_server.learner_view import LearnerViews, rewrite_newest


class ObservationCounter:
    """Brings raw observations to the connectors that learn from them."""

    def __init__(
        self, views: LearnerViews, action_space: gym.Space[Any], rl_module: Any, *, lookback: int
    ) -> None:
        """Prepare.

        Args:
            views: Keep the running statistics.
            action_space: Of the actions that the application executes.
            rl_module: The actor's own; custom connectors may ask for it.
            lookback: Steps that connectors may look back on.
        """
        self._views = views
        self._action_space = action_space
        self._rl_module = rl_module
        self._lookback = lookback
        self._noted: list[Columns] = []

    def note(self, chunk: Chunk, memory: EpisodeMemory, raw: Columns) -> None:
        """Remember which observations were not counted yet.

        A chunk's first one was the last of the chunk before; a terminal one that the client did
        not send is the one before it once more.

        Args:
            chunk: About to become an episode.
            memory: What is remembered of its episode, from before this chunk.
            raw: Its observations by leaf, ``[T+1, ...]``.
        """
        if not self._views.counts:
            return
        start = 1 if memory.t else 0
        batch, row = chunk.rows[-1]
        path, last = next(iter(chunk.last_observation.items()))
        stand_in = np.may_share_memory(last, batch.observations[path][row : row + 1])
        stop = chunk.steps + (0 if stand_in else 1)
        if self._views.replays:
            self._count_stepwise(memory, raw, start, stop)
        elif stop > start:
            self._noted.append({path: column[start:stop] for path, column in raw.items()})

    def count(self) -> None:
        """Count all that were noted."""
        parts, self._noted = self._noted, []
        if parts:
            self._views.count(
                {path: np.concatenate([part[path] for part in parts]) for path in parts[0]}
            )

    def _count_stepwise(self, memory: EpisodeMemory, raw: Columns, start: int, stop: int) -> None:
        """Let the actor's own connectors see each observation once, in the order of the episode."""
        for row in range(start, stop):
            value = self._views.value(raw, row)
            if memory.counted is None:
                memory.counted = memory.empty(self._views.space, self._action_space)
                memory.counted.add_env_reset(value, {})
            else:
                memory.counted.add_env_step(value, self._action_space.sample(), 0.0, {})
            rewrite_newest(
                self._views.own,
                memory.counted,
                rl_module=self._rl_module,
                shared_data={},
                explore=True,
            )
        if memory.counted is not None and len(memory.counted):
            memory.counted = memory.counted.cut(len_lookback_buffer=self._lookback)
