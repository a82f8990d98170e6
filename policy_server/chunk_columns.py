"""Chunks to columns: what belongs together is joined, and gathered once for many chunks.

Actor thread only. T is a chunk's number of steps.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from ray.rllib.utils.metrics import WEIGHTS_SEQ_NO

from client_sdk.wire.batches import Columns, SpaceCodec
from policy_server.experience import Chunk
from policy_server.learner_view import LearnerView

LOGGED_ACTION = "logged_action"
"""Key in the info of the observation that a step led to, where the application itself chose the
action. In the infos, because they never become columns of a train batch unless one asks for them,
and all episodes must have the same columns."""

_SPARSE = 4
"""Rows are picked one by one from batches that hold this many times more rows than are needed."""


@dataclasses.dataclass(frozen=True)
class ChunkColumns:
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


class GatheredRows:
    """The rows of many chunks, gathered once per column instead of once per row and column."""

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        """Find the rows.

        Args:
            chunks: At least one, each with at least one step.
        """
        batches = [batch for chunk in chunks for batch, _ in chunk.rows]
        rows = [row for chunk in chunks for _, row in chunk.rows]
        sizes = {batch: len(next(iter(batch.actions.values()))) for batch in dict.fromkeys(batches)}
        self._picked: Sequence[int] | None = None
        if sum(sizes.values()) > _SPARSE * len(rows):
            self._batches, self._picked = batches, rows
            gathered = len(rows)
            indices = np.arange(gathered)
        else:
            self._batches = list(sizes)
            *offsets, gathered = itertools.accumulate(sizes.values(), initial=0)
            offset_of = dict(zip(sizes, offsets, strict=True))
            indices = np.fromiter(map(offset_of.__getitem__, batches), np.intp)
            indices += np.fromiter(rows, np.intp)
        self._indices = indices
        stops = list(itertools.accumulate(chunk.steps for chunk in chunks))
        self._spans = {
            id(chunk): (number, stop - chunk.steps, stop)
            for number, (chunk, stop) in enumerate(zip(chunks, stops, strict=True))
        }
        # The observation after a chunk's last step goes behind those of its rows.
        self._last_observations = [chunk.last_observation for chunk in chunks]
        self._observation_indices = np.insert(
            indices, stops, np.arange(gathered, gathered + len(chunks))
        )
        self._columns: dict[tuple[str, str], NDArray[Any]] = {}

    def column(self, chunk: Chunk, kind: str, name: str) -> NDArray[Any]:
        """``[T, ...]`` of a chunk, its own copy."""
        column = self._columns.get((kind, name))
        if column is None:
            column = np.concatenate(self._parts(kind, name))[self._indices]
            self._columns[kind, name] = column
        _, start, stop = self._spans[id(chunk)]
        return column[start:stop].copy()

    def observations(self, chunk: Chunk, path: str) -> NDArray[Any]:
        """``[T+1, ...]`` of a chunk, its own copy."""
        column = self._columns.get(("observations", path))
        if column is None:
            parts = self._parts("observations", path)
            parts += [last[path] for last in self._last_observations]
            column = np.concatenate(parts)[self._observation_indices]
            self._columns["observations", path] = column
        number, start, stop = self._spans[id(chunk)]
        return column[start + number : stop + number + 1].copy()

    def _parts(self, kind: str, name: str) -> list[NDArray[Any]]:
        parts = [getattr(batch, kind)[name] for batch in self._batches]
        if self._picked is None:
            return parts
        return [part[row : row + 1] for part, row in zip(parts, self._picked, strict=True)]


class ColumnMaker:
    """Makes columns of chunks; they must all have the same."""

    def __init__(self, action_space: gym.Space[Any]) -> None:
        self._actions = SpaceCodec(action_space)
        self._outputs: dict[str, list[str]] | None = None  # by name, what it is made of

    def columns(self, chunk: Chunk, rows: GatheredRows) -> ChunkColumns:
        """One chunk of those that were gathered.

        Raises:
            LookupError: Some other one of them does not fit in with the rest.
            ValueError: So it may be; or this one does not fit in with those before.
        """
        first = chunk.rows[0][0]
        if self._outputs is None:
            self._outputs = {name: name.split("/") for name in first.outputs}
        elif first.outputs.keys() != self._outputs.keys():
            raise ValueError(
                f"expected the outputs {sorted(self._outputs)}, got {sorted(first.outputs)}: "
                "all episodes of an algorithm need the same"
            )
        raw = {path: rows.observations(chunk, path) for path in chunk.last_observation}
        actions = {path: rows.column(chunk, "actions", path) for path in first.actions}
        infos: list[dict[str, Any]] = [{} for _ in range(chunk.steps)]
        for step in chunk.logged:
            infos[step][LOGGED_ACTION] = True
        outputs: dict[str, Any] = {}
        for name, (*groups, key) in self._outputs.items():
            place = outputs
            for group in groups:
                place = place.setdefault(group, {})
            place[key] = rows.column(chunk, "outputs", name)
        versions = outputs[WEIGHTS_SEQ_NO] = np.empty(chunk.steps, np.int64)
        for start, stop, view in runs(chunk):
            versions[start:stop] = view.weights_seq_no
        return ChunkColumns(
            raw=raw,
            actions=actions[""] if "" in actions else self._actions.batched_value(actions),
            rewards=np.fromiter(chunk.rewards, np.float64, chunk.steps),
            infos=infos,
            outputs=outputs,
        )


def joined(chunks: Sequence[Chunk]) -> list[Chunk]:
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


def runs(chunk: Chunk) -> list[tuple[int, int, LearnerView]]:
    """Where the chunk's steps go over from one version to the next: (start, stop, its view)."""
    rows = chunk.rows
    first = rows[0][0].policy
    if rows[-1][0].policy is first:  # versions only go up
        return [(0, len(rows), first.view)]  # type: ignore[attr-defined]
    found = []
    start = 0
    for row in range(1, len(rows) + 1):
        policy = rows[start][0].policy
        if row == len(rows) or rows[row][0].policy is not policy:
            found.append((start, row, policy.view))  # type: ignore[attr-defined]
            start = row
    return found
