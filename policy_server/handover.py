"""Chunks from the buffer become RLlib's episodes, and every step is settled. Actor thread only.

``chunk_columns`` makes columns of chunks, ``episode_builder`` episodes of columns, and
``observation_counter`` keeps the statistics of what passes.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from policy_server.callbacks import Callbacks
from policy_server.chunk_columns import ColumnMaker, GatheredRows, joined
from policy_server.episode_builder import EpisodeBuilder, EpisodeMemory
from policy_server.experience import Chunk, EpisodeEnd
from policy_server.learner_view import LearnerViews
from policy_server.ledger import Ledger
from policy_server.observation_counter import ObservationCounter

_logger = logging.getLogger(__name__)


@dataclasses.dataclass
class HandedOver:
    """What one ``sample()`` gives to RLlib."""

    episodes: list[SingleAgentEpisode] = dataclasses.field(default_factory=list)
    steps: int = 0
    """In those episodes."""
    ends: list[EpisodeEnd] = dataclasses.field(default_factory=list)
    """Of training episodes."""
    evaluation_ends: list[EpisodeEnd] = dataclasses.field(default_factory=list)


class HandOver:
    """Turns chunks into what the learner gets, and settles every step in the ledger.

    Attributes:
        errors: What could not be handed over, or not be counted.
    """

    def __init__(
        self,
        *,
        views: LearnerViews,
        action_space: gym.Space[Any],
        ledger: Ledger,
        callbacks: Callbacks,
        rl_module: Any,
        lookback: int,
        max_policy_lag: int | None,
        joins_chunks: bool,
    ) -> None:
        """Prepare.

        Args:
            views: Of the observations.
            action_space: Of the actions that the application executes.
            ledger: Told about each step.
            callbacks: The user's.
            rl_module: The actor's own; custom connectors may ask for it.
            lookback: Steps that come along from the chunk before, at most.
            max_policy_lag: Older experience is discarded; None: no limit.
            joins_chunks: Where two chunks meet, the observation must be the same in both.
        """
        self._ledger = ledger
        self._max_policy_lag = max_policy_lag
        self._columns = ColumnMaker(action_space)
        self._builder = EpisodeBuilder(
            views,
            action_space,
            callbacks,
            rl_module,
            lookback=lookback,
            joins_chunks=joins_chunks,
        )
        self._counter = ObservationCounter(views, action_space, rl_module, lookback=lookback)
        self.errors = 0

    def take(self, chunks: Sequence[Chunk], version: int) -> HandedOver:
        """Hand chunks over, in their order.

        Args:
            chunks: From the buffer; taken over.
            version: Of the newest policy.

        Returns:
            Episodes for RLlib, none of them empty, and the ends to report.
        """
        handed = HandedOver()
        chunks = joined(chunks)
        learnt = [chunk for chunk in chunks if self._is_learnt(chunk, version)]
        rows = self._gather(learnt) if learnt else None
        wanted = {id(chunk) for chunk in learnt}
        for chunk in chunks:
            try:
                if id(chunk) in wanted:
                    handed.episodes.append(self._episode(chunk, rows))
                    handed.steps += chunk.steps
                    self._ledger.deliver(chunk.steps)
                elif chunk.end is not None and chunk.training:
                    self._builder.ended_between_chunks(chunk)
            except Exception:  # whatever a chunk holds, the next one is handed over
                self.errors += 1
                steps = chunk.steps if id(chunk) in wanted else 0  # else they are settled
                _logger.exception("a chunk of %d steps could not be handed over", steps)
                self._ledger.discard("handover_failed", steps)
                chunk.identity.memory = None
            chunk.settle()
            if chunk.end is not None:
                (handed.ends if chunk.training else handed.evaluation_ends).append(chunk.end)
                chunk.identity.memory = None
        self._count_observations()
        return handed

    def _is_learnt(self, chunk: Chunk, version: int) -> bool:
        if not chunk.training:
            self._ledger.discard("evaluation", chunk.steps)
            return False
        if not chunk.steps:
            return False
        # Where chunks are not cut at a new version, the oldest step decides.
        lag = version - chunk.policy.version
        if self._max_policy_lag is not None and lag > self._max_policy_lag:
            self._ledger.discard("stale", chunk.steps)
            chunk.identity.memory = None
            return False
        return True

    def _gather(self, chunks: Sequence[Chunk]) -> GatheredRows | None:
        try:
            return GatheredRows(chunks)
        except Exception:  # one of them is broken; alone, each of the others may be well
            self.errors += 1
            _logger.exception("%d chunks could not be gathered; each goes alone", len(chunks))
            return None

    def _episode(self, chunk: Chunk, rows: GatheredRows | None) -> SingleAgentEpisode:
        memory = chunk.identity.memory
        if memory is None or memory.next_step != chunk.first_step:
            # First chunk, or steps before it were lost: RLlib must not join it to earlier ones.
            memory = chunk.identity.memory = EpisodeMemory()
        try:
            columns = self._columns.columns(chunk, rows or GatheredRows([chunk]))
        except (LookupError, ValueError):
            # Some other chunk does not fit in with the rest; ours may be well.
            columns = self._columns.columns(chunk, GatheredRows([chunk]))
        self._counter.note(chunk, memory, columns.raw)
        return self._builder.build(chunk, memory, columns)

    def _count_observations(self) -> None:
        try:
            self._counter.count()
        except Exception:  # a gap in the statistics; the experience itself is handed over
            self.errors += 1
            _logger.exception("some observations were not counted")
