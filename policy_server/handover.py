"""Chunks from the buffer become RLlib's episodes: columns stay columns. Actor thread only.

T is a chunk's number of steps, L that of the steps before it that come along as lookback.
"""

from __future__ import annotations

import dataclasses
import logging
import uuid
from collections import deque
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import tree
from numpy.typing import NDArray
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.env.utils.infinite_lookback_buffer import InfiniteLookbackBuffer
from ray.rllib.utils.metrics import WEIGHTS_SEQ_NO

from client_sdk.wire.batches import Columns, SpaceCodec
from policy_server.buffer import Ledger
from policy_server.callbacks import Callbacks
from policy_server.experience import Chunk, EpisodeEnd, InferredBatch
from policy_server.learner_view import LearnerView, LearnerViews, rewrite_newest

_logger = logging.getLogger(__name__)

LOGGED_ACTION = "logged_action"
"""Key in the info of the observation that a step led to, where the application itself chose the
action. In the infos, because they never become columns of a train batch unless one asks for them,
and all episodes must have the same columns."""

CHUNKS_KEPT = 100
"""Of a running episode, for ``on_episode_end``: the latest ones, so that an episode without an end
does not fill the memory."""

_SPARSE = 4
"""Rows are picked one by one from batches that hold this many times more rows than are needed."""


@dataclasses.dataclass
class HandedOver:
    """What one ``sample()`` gives to RLlib."""

    episodes: list[SingleAgentEpisode] = dataclasses.field(default_factory=list)
    steps: int = 0
    """In those episodes."""
    ends: list[EpisodeEnd] = dataclasses.field(default_factory=list)
    """Of training episodes."""
    evaluation_ends: list[EpisodeEnd] = dataclasses.field(default_factory=list)


class _Thread:
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


class _Rows:
    """The rows of many chunks, gathered once per column instead of once per row and column."""

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self._indices: dict[int, NDArray[np.intp]] = {}
        self._parts: list[tuple[InferredBatch, slice]] = []
        self._columns: dict[tuple[str, str], NDArray[Any]] = {}
        batches = {id(batch): batch for chunk in chunks for batch, _ in chunk.rows}
        sizes = {key: len(next(iter(batch.actions.values()))) for key, batch in batches.items()}
        needed = sum(chunk.steps for chunk in chunks)
        if sum(sizes.values()) > _SPARSE * needed:
            self._pick(chunks)
        else:
            self._take_whole(chunks, batches, sizes)

    def _take_whole(
        self, chunks: Sequence[Chunk], batches: dict[int, InferredBatch], sizes: dict[int, int]
    ) -> None:
        offsets: dict[int, int] = {}
        total = 0
        for key, batch in batches.items():
            offsets[key] = total
            total += sizes[key]
            self._parts.append((batch, slice(None)))
        for chunk in chunks:
            self._indices[id(chunk)] = np.array(
                [offsets[id(batch)] + row for batch, row in chunk.rows], np.intp
            )

    def _pick(self, chunks: Sequence[Chunk]) -> None:
        for chunk in chunks:
            start = len(self._parts)
            self._parts.extend((batch, slice(row, row + 1)) for batch, row in chunk.rows)
            self._indices[id(chunk)] = np.arange(start, len(self._parts))

    def column(self, chunk: Chunk, kind: str, name: str) -> NDArray[Any]:
        """``[T, ...]`` of a chunk, its own copy."""
        column = self._columns.get((kind, name))
        if column is None:
            column = np.concatenate([getattr(batch, kind)[name][at] for batch, at in self._parts])
            self._columns[kind, name] = column
        taken: NDArray[Any] = column[self._indices[id(chunk)]]
        return taken


@dataclasses.dataclass(frozen=True)
class _Steps:
    """One chunk in columns."""

    raw: Columns
    """[T+1, ...] Observations by leaf."""
    actions: Any
    """[T, ...] A struct like the action space."""
    rewards: NDArray[np.float64]
    """[T]"""
    infos: list[dict[str, Any]]
    """[T] Of the observations that the steps led to."""
    outputs: dict[str, Any]
    """[T, ...] By name; recurrent state is a dict of its own."""


class HandOver:
    """Turns chunks into what the learner gets, and settles every step in the ledger."""

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
        self._views = views
        self._action_space = action_space
        self._action_codec = SpaceCodec(action_space)
        self._ledger = ledger
        self._callbacks = callbacks
        self._rl_module = rl_module
        self._lookback = lookback
        self._max_policy_lag = max_policy_lag
        self._joins = joins_chunks
        self._output_names: frozenset[str] | None = None
        self._to_count: list[Columns] = []
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
        chunks = _joined(chunks)
        learnt = [chunk for chunk in chunks if self._is_learnt(chunk, version)]
        rows = self._gather(learnt)
        wanted = {id(chunk) for chunk in learnt}
        for chunk in chunks:
            try:
                if id(chunk) in wanted:
                    handed.episodes.append(self._episode(chunk, rows))
                    handed.steps += chunk.steps
                    self._ledger.deliver(chunk.steps)
                elif chunk.end is not None and chunk.training:
                    self._ended_between_chunks(chunk)
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

    def _gather(self, chunks: Sequence[Chunk]) -> _Rows | None:
        try:
            return _Rows(chunks)
        except Exception:  # one of them is broken; alone, each of the others may be well
            self.errors += 1
            _logger.exception("%d chunks could not be gathered; each goes alone", len(chunks))
            return None

    def _episode(self, chunk: Chunk, rows: _Rows | None) -> SingleAgentEpisode:
        thread = chunk.identity.memory
        if thread is None or thread.next_step != chunk.first_step:
            # First chunk, or steps before it were lost: RLlib must not join it to earlier ones.
            thread = chunk.identity.memory = _Thread()
        try:
            steps = self._columns(chunk, rows or _Rows([chunk]))
        except (KeyError, ValueError):
            # Some other chunk does not fit in with the rest; ours may be well.
            steps = self._columns(chunk, _Rows([chunk]))
        self._note_observations(chunk, thread, steps.raw)
        stepwise = self._views.replays or self._callbacks.wants("on_episode_step")
        build = self._build_stepwise if stepwise else self._build
        episode = build(chunk, thread, steps)
        thread.t += chunk.steps
        thread.next_step = chunk.first_step + chunk.steps
        thread.policy = chunk.rows[-1][0].policy
        return episode

    # Columns.

    def _columns(self, chunk: Chunk, rows: _Rows) -> _Steps:
        first = chunk.rows[0][0]
        if self._output_names is None:
            self._output_names = frozenset(first.outputs)
        elif first.outputs.keys() != self._output_names:
            raise ValueError(
                f"expected the outputs {sorted(self._output_names)}, got {sorted(first.outputs)}: "
                "all episodes of an algorithm need the same"
            )
        raw = {
            path: np.concatenate([rows.column(chunk, "observations", path), last])
            for path, last in chunk.last_observation.items()
        }
        actions = {path: rows.column(chunk, "actions", path) for path in first.actions}
        infos: list[dict[str, Any]] = [{} for _ in range(chunk.steps)]
        for step in chunk.logged:
            infos[step][LOGGED_ACTION] = True
        outputs: dict[str, Any] = {}
        for name in first.outputs:
            *groups, key = name.split("/")
            place = outputs
            for group in groups:
                place = place.setdefault(group, {})
            place[key] = rows.column(chunk, "outputs", name)
        outputs[WEIGHTS_SEQ_NO] = np.concatenate(
            [np.full(stop - start, view.weights_seq_no) for start, stop, view in _runs(chunk)]
        )
        return _Steps(
            raw=raw,
            actions=actions[""] if "" in actions else self._action_codec.batched_value(actions),
            rewards=np.array(chunk.rewards, np.float64),
            infos=infos,
            outputs=outputs,
        )

    def _observations(self, chunk: Chunk, thread: _Thread, raw: Columns) -> Any:
        """``[T+1, ...]`` as the learner sees them, each under its own step's version."""
        runs = _runs(chunk)
        if len(runs) == 1:
            observations = runs[0][2].observations(raw)
        else:
            pieces = []
            for start, stop, view in runs:
                end = stop + 1 if stop == chunk.steps else stop
                pieces.append(
                    view.observations({path: column[start:end] for path, column in raw.items()})
                )
            observations = tree.map_structure(lambda *parts: np.concatenate(parts), *pieces)
        if self._joins and thread.t:
            for now, before in zip(
                tree.flatten(observations), tree.flatten(thread.observations), strict=True
            ):
                now[0] = before[-1]
        return observations

    def _build(self, chunk: Chunk, thread: _Thread, steps: _Steps) -> SingleAgentEpisode:
        """The whole chunk at once."""
        lookback = thread.lookback
        observations = self._observations(chunk, thread, steps.raw)
        actions, rewards, outputs = steps.actions, steps.rewards, steps.outputs
        infos = [dict(info) for info in thread.infos] + steps.infos
        if thread.t == 0:
            self._announce(thread, observations)
        if lookback:
            observations = tree.map_structure(
                lambda before, now: np.concatenate([before[:-1], now]),
                thread.observations,
                observations,
            )
            actions, outputs, rewards = tree.map_structure(
                lambda before, now: np.concatenate([before, now]),
                (thread.actions, thread.outputs, thread.rewards),
                (actions, outputs, rewards),
            )
        episode = self._assemble(
            chunk, thread, lookback, observations, infos, actions, rewards, outputs
        )
        if chunk.terminated or chunk.truncated:
            self._callbacks.episode(
                "on_episode_end", episode, prev_episode_chunks=list(thread.handed)
            )
            return episode
        if self._callbacks.wants("on_episode_end"):
            # Not the one that RLlib gets: its learner connectors append to that.
            thread.handed.append(
                self._assemble(
                    chunk, thread, lookback, observations, list(infos), actions, rewards, outputs
                )
            )
        keep = min(self._lookback, len(rewards))
        thread.observations = tree.map_structure(
            lambda column: column[len(column) - keep - 1 :].copy(), observations
        )
        thread.infos = infos[len(infos) - keep - 1 :]
        thread.actions, thread.outputs, thread.rewards = tree.map_structure(
            lambda column: column[len(column) - keep :].copy(), (actions, outputs, rewards)
        )
        return episode

    def _assemble(
        self,
        chunk: Chunk,
        thread: _Thread,
        lookback: int,
        observations: Any,
        infos: list[dict[str, Any]],
        actions: Any,
        rewards: NDArray[np.float64],
        outputs: dict[str, Any],
    ) -> SingleAgentEpisode:
        episode = SingleAgentEpisode(
            thread.id,
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
            t_started=thread.t,
            len_lookback_buffer=lookback,
        )
        episode._custom_data = thread.custom_data
        return episode

    def _announce(self, thread: _Thread, observations: Any) -> None:
        """Created and started, as they would have been seen in an env loop."""
        wants = self._callbacks.wants
        if not (wants("on_episode_created") or wants("on_episode_start")):
            return
        episode = self._empty(thread)
        self._callbacks.episode("on_episode_created", episode)
        episode.add_env_reset(tree.map_structure(lambda column: column[0], observations), {})
        self._callbacks.episode("on_episode_start", episode)
        thread.custom_data = episode.custom_data

    def _empty(self, thread: _Thread) -> SingleAgentEpisode:
        return SingleAgentEpisode(
            thread.id, observation_space=self._views.space, action_space=self._action_space
        )

    # Step by step.

    def _build_stepwise(self, chunk: Chunk, thread: _Thread, steps: _Steps) -> SingleAgentEpisode:
        """As an env loop would: for connectors and callbacks that watch an episode grow."""
        processed = None if self._views.replays else self._observations(chunk, thread, steps.raw)

        def observation(row: int) -> Any:
            if processed is None:
                return self._views.value(steps.raw, row)
            return tree.map_structure(lambda column: column[row], processed)

        episode = thread.live
        if episode is None:
            episode = self._empty(thread)
            self._callbacks.episode("on_episode_created", episode)
            episode.add_env_reset(observation(0), {})
            self._rewrite(chunk, thread, episode, 0)
            self._callbacks.episode("on_episode_start", episode)
        elif not self._joins and thread.policy is not chunk.policy:
            # It was seen by the version before when that chunk ended; its action comes from ours.
            episode.observations.data[-1] = observation(0)
            self._rewrite(chunk, thread, episode, 0)
        for row in range(chunk.steps):
            last = row == chunk.steps - 1
            episode.add_env_step(
                observation(row + 1),
                tree.map_structure(lambda column, row=row: column[row], steps.actions),
                float(steps.rewards[row]),
                steps.infos[row],
                terminated=last and chunk.terminated,
                truncated=last and chunk.truncated,
                extra_model_outputs=tree.map_structure(
                    lambda column, row=row: column[row], steps.outputs
                ),
            )
            # Under the version that acts on it; the last one under the last step's.
            self._rewrite(chunk, thread, episode, min(row + 1, chunk.steps - 1))
            self._callbacks.episode("on_episode_step", episode)
        if episode.is_done:
            self._callbacks.episode(
                "on_episode_end", episode, prev_episode_chunks=list(thread.handed)
            )
            return episode.to_numpy()
        thread.live = episode.cut(len_lookback_buffer=self._lookback)
        thread.observations = tree.map_structure(
            lambda value: np.asarray(value)[None], episode.get_observations(-1)
        )
        if self._callbacks.wants("on_episode_end"):
            thread.handed.append(SingleAgentEpisode.from_state(episode.get_state()))
        return episode.to_numpy()

    def _rewrite(
        self, chunk: Chunk, thread: _Thread, episode: SingleAgentEpisode, row: int
    ) -> None:
        if self._views.replays:
            rewrite_newest(
                self._views.thaw(chunk.rows[row][0].policy.view),  # type: ignore[attr-defined]
                episode,
                rl_module=self._rl_module,
                shared_data=thread.shared_data,
                explore=True,
            )

    def _ended_between_chunks(self, chunk: Chunk) -> None:
        """All its steps are with RLlib already."""
        thread = chunk.identity.memory
        if thread is None or not self._callbacks.wants("on_episode_end"):
            return
        episode = thread.live
        if episode is None:
            episode = self._assemble(
                chunk,
                thread,
                thread.lookback,
                thread.observations,
                thread.infos,
                thread.actions,
                thread.rewards,
                thread.outputs,
            )
        episode.is_terminated, episode.is_truncated = chunk.terminated, chunk.truncated
        self._callbacks.episode("on_episode_end", episode, prev_episode_chunks=list(thread.handed))

    # Running statistics of observations.

    def _note_observations(self, chunk: Chunk, thread: _Thread, raw: Columns) -> None:
        """Remember which observations were not counted yet.

        A chunk's first one was the last of the chunk before; a terminal one that the client did
        not send is the one before it once more.
        """
        if not self._views.counts:
            return
        start = 1 if thread.t else 0
        batch, row = chunk.rows[-1]
        path, last = next(iter(chunk.last_observation.items()))
        stand_in = np.may_share_memory(last, batch.observations[path][row : row + 1])
        stop = chunk.steps + (0 if stand_in else 1)
        if self._views.replays:
            self._count_stepwise(thread, raw, start, stop)
        elif stop > start:
            self._to_count.append({path: column[start:stop] for path, column in raw.items()})

    def _count_observations(self) -> None:
        if self._to_count:
            parts, self._to_count = self._to_count, []
            try:
                self._views.count(
                    {path: np.concatenate([part[path] for part in parts]) for path in parts[0]}
                )
            except Exception:  # a gap in the statistics; the experience itself is handed over
                self.errors += 1
                _logger.exception("observations of %d chunks were not counted", len(parts))

    def _count_stepwise(self, thread: _Thread, raw: Columns, start: int, stop: int) -> None:
        """Let the actor's own connectors see each observation once, in the order of the episode."""
        for row in range(start, stop):
            value = self._views.value(raw, row)
            if thread.counted is None:
                thread.counted = self._empty(thread)
                thread.counted.add_env_reset(value, {})
            else:
                thread.counted.add_env_step(value, self._action_space.sample(), 0.0, {})
            rewrite_newest(
                self._views.own,
                thread.counted,
                rl_module=self._rl_module,
                shared_data={},
                explore=True,
            )
        if thread.counted is not None and len(thread.counted):
            thread.counted = thread.counted.cut(len_lookback_buffer=self._lookback)


def _joined(chunks: Sequence[Chunk]) -> list[Chunk]:
    """Each episode's consecutive chunks of one version as one, in the place of the first.

    Clients that act alone send a running episode in many small chunks. The learner bootstraps at the
    end of each that it gets, so it should get few.
    """
    joined: list[Chunk] = []
    latest: dict[int, Chunk] = {}
    for chunk in chunks:
        before = latest.get(id(chunk.identity))
        if (
            before is not None
            and chunk.steps
            and chunk.training
            and chunk.policy is before.rows[-1][0].policy
            and chunk.first_step == before.first_step + before.steps
        ):
            _append(before, chunk)
        else:
            joined.append(chunk)
            if chunk.steps:
                latest[id(chunk.identity)] = chunk
    return joined


def _append(chunk: Chunk, more: Chunk) -> None:
    chunk.logged.extend(chunk.steps + step for step in more.logged)
    chunk.rows = chunk.rows + more.rows
    chunk.rewards = chunk.rewards + more.rewards
    chunk.last_observation = more.last_observation
    chunk.terminated, chunk.truncated, chunk.end = more.terminated, more.truncated, more.end
    if chunk.receipt is None:
        chunk.receipt = more.receipt
    elif more.receipt is not None:
        chunk.receipt.sequences.extend(more.receipt.sequences)


def _runs(chunk: Chunk) -> list[tuple[int, int, LearnerView]]:
    """Where the chunk's steps go over from one version to the next: (start, stop, its view)."""
    rows = chunk.rows
    first = rows[0][0].policy
    if rows[-1][0].policy is first:  # versions only go up
        return [(0, len(rows), first.view)]  # type: ignore[attr-defined]
    runs = []
    start = 0
    for row in range(1, len(rows) + 1):
        policy = rows[start][0].policy
        if row == len(rows) or rows[row][0].policy is not policy:
            runs.append((start, row, policy.view))  # type: ignore[attr-defined]
            start = row
    return runs


def _lookback_buffer(data: Any, lookback: int) -> InfiniteLookbackBuffer:
    buffer = InfiniteLookbackBuffer(data)
    # Its constructor would take the number of a dict's keys for a length.
    buffer.lookback = lookback
    return buffer
