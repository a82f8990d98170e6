"""One running agent: its last row, the steps since, and how they become a chunk.

Loop thread only. Nothing is refused here: whoever calls has checked what comes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from policy_server.experience import (
    Chunk,
    EpisodeEnd,
    EpisodeIdentity,
    InferredBatch,
    Receipt,
    RowContext,
)

if TYPE_CHECKING:
    from client_sdk.wire.batches import Columns
    from client_sdk.wire.faults import Fault

RUNNING, TERMINATED, TRUNCATED, ABANDONED = 1, 2, 3, 4
"""``StepStatus`` of the contract; 0, unspecified, is read as running."""


class EpisodeOptions:
    """How an episode was announced; the defaults if it was not."""

    __slots__ = ("greedy", "label", "resumed", "training")

    def __init__(
        self,
        *,
        label: str = "",
        evaluation: bool = False,
        greedy: bool = False,
        resumed: bool = False,
    ) -> None:
        self.label = label
        self.training = not (evaluation or greedy)
        self.greedy = greedy
        self.resumed = resumed


DEFAULT_OPTIONS = EpisodeOptions()


class UploadedSteps:
    """What an uploaded chunk says, checked.

    Attributes:
        rewards: ``[T]``.
        status: After the last step.
        logged: The application chose the actions.
        batch: The T steps; None where they are abandoned.
        last_observation: Where the last one led, by leaf: ``[1, ...]``; empty without ``batch``.
    """

    __slots__ = ("batch", "last_observation", "logged", "rewards", "status")

    def __init__(self, rewards: list[float], status: int, *, logged: bool) -> None:
        self.rewards = rewards
        self.status = status
        self.logged = logged
        self.batch: InferredBatch | None = None
        self.last_observation: Columns = {}


class AgentTrack(RowContext):
    """One running agent: its last row, the steps of its current chunk, and what the policy keeps.

    A step becomes complete when the next row tells its reward. ``rows`` therefore holds one entry
    more than ``rewards``, unless the last row still awaits its action.
    """

    __slots__ = (
        "agent",
        "awaiting",
        "episode",
        "first_step",
        "identity",
        "last",
        "logged_steps",
        "queued",
        "receipt",
        "rewards",
        "rows",
        "step",
        "training",
        "waiters",
    )

    def __init__(self, episode: Episode, agent: str) -> None:
        super().__init__()
        self.episode = episode
        self.agent = agent
        self.training = episode.options.training
        self.identity = EpisodeIdentity(episode.options.label)
        self.step = -1
        # Where the last row's observation is kept while no action has been chosen for it.
        self.awaiting: tuple[Columns, int] | None = None
        self.queued = False  # with the batcher, which will answer it
        # Repeats of the last row that came while it was queued.
        self.waiters: list[Callable[[Fault | None], None]] = []
        self.last: tuple[InferredBatch, int] | None = None  # answers a repeat of the last row
        self.rows: list[tuple[InferredBatch, int]] = []
        self.rewards: list[float] = []
        self.first_step = 0
        self.logged_steps: list[int] = []
        self.receipt: Receipt | None = None  # of uploads that no chunk was made of yet

    def observe(self, step: int, reward: float) -> None:
        """The row of a step > 0, which completes the step before it."""
        self.step = step
        self.reward = reward
        episode = self.episode
        episode.return_ += reward
        episode.length += 1
        if self.training:
            self.rewards.append(reward)

    def append(self, steps: UploadedSteps, receipt: Receipt) -> None:
        """The client acted alone: its next steps, all at once."""
        rewards, batch = steps.rewards, steps.batch
        self.step += len(rewards)
        self.episode.return_ += math.fsum(rewards)
        self.episode.length += len(rewards)
        if batch is not None:
            # Copies, not views: the steps' memory goes with their chunk.
            last = {path: column.copy() for path, column in steps.last_observation.items()}
            self.awaiting = (last, 0)
            self.last = (InferredBatch(batch.policy, last, {}, {}, {}), 0)
        if not self.training:
            receipt.settle()
            return
        if batch is not None:
            if steps.logged:
                start = len(self.rows)
                self.logged_steps.extend(range(start, start + len(rewards)))
            self.rows.extend(zip(itertools.repeat(batch), range(len(rewards)), strict=False))
        self.rewards.extend(rewards)
        if self.receipt is None:
            self.receipt = receipt
        else:
            self.receipt.sequences.extend(receipt.sequences)

    def last_observation(self) -> Columns:
        """Of the last row, ``[1, ...]`` by leaf."""
        if self.awaiting is not None:
            columns, row = self.awaiting
        else:
            batch, row = self.last  # type: ignore[misc]  # a recorded row is one or the other
            columns = batch.observations
        return {path: values[row : row + 1] for path, values in columns.items()}

    def take_chunk(self, last_observation: Columns) -> Chunk | None:
        """The complete steps so far as a chunk; the next one starts where it stops."""
        steps = len(self.rewards)
        if not steps:
            return None
        acting = self.rows[steps:]
        chunk = Chunk(
            identity=self.identity,
            agent=self.agent,
            policy=self.rows[0][0].policy,
            rows=self.rows[:steps],
            rewards=self.rewards,
            last_observation=last_observation,
            first_step=self.first_step,
            logged=[i for i in self.logged_steps if i < steps],
            receipt=self.receipt,
        )
        self.receipt = None
        self.logged_steps = [i - steps for i in self.logged_steps if i >= steps]
        self.rows, self.rewards = acting, []
        self.first_step += steps
        return chunk


class Episode:
    """One run from reset to end, of one or several agents."""

    __slots__ = ("begin_s", "length", "metrics", "number", "options", "return_", "tracks")

    def __init__(self, number: int, options: EpisodeOptions, now_s: float) -> None:
        self.number = number
        self.options = options
        self.begin_s = now_s
        self.return_ = 0.0
        self.length = 0
        self.metrics: dict[str, float] = {}
        self.tracks: dict[str, AgentTrack] = {}

    def end(self, now_s: float, *, reported: bool = True) -> EpisodeEnd:
        """What to report of it."""
        return EpisodeEnd(
            episode_return=self.return_,
            length=self.length,
            duration_s=now_s - self.begin_s,
            metrics=self.metrics,
            reported=reported and not self.options.resumed,
        )
