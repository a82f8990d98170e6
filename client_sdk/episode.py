"""The episode state machine: numbers, steps, rewards and ends of what is running. No I/O, no wire.

``EpisodeTrack`` is one episode, ``BatchTrack`` is N of them that step together; both turn calls into
``Rows`` and learn from the answer what has been recorded. ``EpisodeBook`` finds them by id. Owned by
one client and touched by one of its calls at a time.

Shapes: N rows of a vector step.
"""

from __future__ import annotations

import dataclasses
import uuid
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from enum import IntEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from client_sdk.errors import (
    EpisodeEndedError,
    EpisodeStateError,
    InvalidValueError,
    LimitExceededError,
    SpaceMismatchError,
    UnknownEpisodeError,
)
from client_sdk.values import finite_number, not_finite, sendable_text
from client_sdk.wire import MAX_METRICS
from client_sdk.wire.leaf_kinds import FLOAT32_MAX

if TYPE_CHECKING:
    from client_sdk.exchange import Pending
    from client_sdk.wire.batches import Columns

ENDED_IDS_REMEMBERED = 4096
"""So many ended episodes are told apart from episodes that never were."""


class Status(IntEnum):
    """Where a row leaves its episode: ``StepStatus`` of the contract."""

    RUNNING = 1
    TERMINATED = 2
    TRUNCATED = 3
    ABANDONED = 4


@dataclasses.dataclass(frozen=True, slots=True)
class EpisodeOptions:
    """How an episode is to be treated; fixed when it starts."""

    label: str = ""
    """A name for logs and metrics."""
    training_enabled: bool = True
    """False keeps it out of training; its return is reported apart."""
    explore: bool = True
    """False takes the likeliest action; kept out of training as well."""

    @property
    def are_default(self) -> bool:
        """Whether an episode may start without a word about them."""
        return self.training_enabled and self.explore and not self.label

    @property
    def trains(self) -> bool:
        """Whether the learner sees it."""
        return self.training_enabled and self.explore


class Numbering:
    """The client's own numbers for its episodes: from 1, never reused."""

    __slots__ = ("_next",)

    def __init__(self) -> None:
        self._next = 1

    def take(self, count: int = 1) -> int:
        """Reserve ``count`` numbers; returns the first."""
        first = self._next
        self._next += count
        return first


_DEFAULTS = EpisodeOptions()
_NO_METRICS: Mapping[int, dict[str, float]] = MappingProxyType({})


class Rows:
    """The rows of one request, column-wise, before they become a message.

    What most rows do without is a default of the class: millions of them are made.
    """

    plain = True
    """Running, with observations, and nothing below."""
    statuses: Sequence[int] = ()
    """Empty: all running."""
    logged_actions: Columns | None = None
    logged_logps: Sequence[float] = ()
    metrics: Mapping[int, dict[str, float]] = _NO_METRICS
    """By episode."""
    begun: Sequence[int] = ()
    """Episodes that begin here and have something to say about it."""
    resumed: Sequence[int] = ()
    """Those of them whose beginning was lost with another session."""
    options: EpisodeOptions = _DEFAULTS
    """Of the episodes that begin here."""
    index: NDArray[np.intp] | None = None
    """[len(episodes)] Which row of the caller's each is; None: they are the same."""
    ended: NDArray[np.bool_] | None = None
    """[N] The caller's rows that end here; None: none does."""

    def __init__(
        self,
        episodes: list[int],
        steps: list[int],
        rewards: list[float],
        observations: Columns | None,
    ) -> None:
        self.episodes = episodes
        self.steps = steps
        self.rewards = rewards
        """Empty: all 0."""
        self.observations = observations
        """Belongs to the caller until encoded; None afterwards, and where a row has none."""


class Track(Protocol):
    """What a request belongs to. Its state follows the answers, whether anyone waits or not."""

    options: EpisodeOptions
    """Of all that is in it."""
    pending: Pending | None
    """Its latest request, until someone has looked at the answer."""
    busy: bool
    """A task is inside one of its calls."""

    def accepted(self, rows: Rows, faulty: Sequence[int] = ()) -> None:
        """The server has recorded those rows, but for the faulty ones (the caller's indices)."""

    def refused(self, rows: Rows) -> None:
        """Nothing of those rows has been recorded."""

    def restarted(self, rows: Rows | None) -> tuple[int, int]:
        """The server has forgotten everything: go on under new numbers.

        Args:
            rows: On their way, to be said again; changed in place, maybe to nothing. None: none are.

        Returns:
            How many episodes go on without their beginning, and how many ends are lost.
        """


class EpisodeTrack:
    """One episode of one agent.

    ::

        track.add_reward(1.0)
        rows = track.row(observation_columns)   # to be sent
        track.accepted(rows)                    # or refused(rows): as if it had not been said
    """

    __slots__ = (
        "_issued",
        "_metrics",
        "_number",
        "_numbering",
        "_resumed",
        "_reward",
        "busy",
        "ended",
        "id",
        "options",
        "pending",
        "step",
    )

    def __init__(self, episode_id: str, numbering: Numbering, options: EpisodeOptions) -> None:
        self.id = episode_id
        self.options = options
        self.step = 0
        self.ended = False
        self.busy = False
        self.pending: Pending | None = None
        self._numbering = numbering
        self._number = numbering.take()
        self._reward = 0.0
        self._metrics: dict[str, float] = {}
        self._resumed = False
        self._issued = False

    @property
    def begun(self) -> bool:
        """Whether the server may know of it; also where it refused, or failed at, every row."""
        return self._issued

    def check_running(self) -> None:
        """Raise if it has ended.

        Raises:
            EpisodeEndedError: It has.
        """
        if self.ended:
            raise _already_ended(self.id)

    def add_reward(self, reward: float) -> None:
        """Add to what the next row reports.

        Raises:
            NotFiniteError: The sum is not finite, or not in float32.
            InvalidValueError: No number; or a reward before the first action, which nobody earned.
        """
        if reward.__class__ is float:
            if reward == 0.0:
                return
            value = reward
        else:
            value = finite_number(reward, "reward")
        if not -FLOAT32_MAX <= self._reward + value <= FLOAT32_MAX:
            raise not_finite(self._reward + value, "reward")
        if value and self.step == 0 and self.pending is None:
            if self._resumed:
                return  # earned by an action that the server does not know
            raise InvalidValueError(
                f"expected 0 before the first action of episode {self.id!r}, got {value}: "
                "a reward belongs to the action before it",
                field="reward",
            )
        self._reward += value

    def take_reward(self) -> float:
        """What was earned since the last time this was asked."""
        reward, self._reward = self._reward, 0.0
        return reward

    def add_metrics(self, metrics: Mapping[str, float]) -> None:
        """Report those numbers with the next row; the last value of a name counts.

        Raises:
            LimitExceededError: More names than the server takes; none of them was noted.
        """
        names = len(self._metrics.keys() | metrics.keys())
        if names > MAX_METRICS:
            raise LimitExceededError(
                f"expected at most {MAX_METRICS} names in one episode, got {names}; report fewer",
                field="info",
            )
        self._metrics.update(metrics)

    def take_metrics(self) -> dict[str, float]:
        """The numbers to report since the last time this was asked."""
        metrics, self._metrics = self._metrics, {}
        return metrics

    def row(
        self,
        observation: Columns | None,
        status: Status = Status.RUNNING,
        logged_action: Columns | None = None,
        logp: float | None = None,
    ) -> Rows:
        """The next row of the episode, with all rewards and metrics since the last one."""
        # A client that lost its session in between must not earn at step 0.
        rewards = [self._reward] if self._reward and self.step else []
        rows = Rows([self._number], [self.step], rewards, observation)
        self._reward = 0.0
        self._issued = True
        if status is not Status.RUNNING:
            rows.plain = False
            rows.statuses = [status]
        if logged_action is not None:
            rows.plain = False
            rows.logged_actions = logged_action
            rows.logged_logps = () if logp is None else [logp]
        if self._metrics:
            rows.plain = False
            rows.metrics = {self._number: self._metrics}
            self._metrics = {}
        if self.step == 0:
            self._announce(rows)
        return rows

    def last_row(self) -> Rows:
        """The row that takes the episode back, whatever is still on its way."""
        on_its_way = self.pending is not None and not self.pending.answered
        rows = Rows([self._number], [self.step + on_its_way], [], None)
        rows.plain = False
        rows.statuses = [Status.ABANDONED]
        return rows

    def __str__(self) -> str:
        return repr(self.id)

    def _announce(self, rows: Rows) -> None:
        if self._resumed or not self.options.are_default:
            rows.plain = False
            rows.begun = rows.episodes
            rows.options = self.options
            rows.resumed = rows.episodes if self._resumed else ()

    def accepted(self, rows: Rows, faulty: Sequence[int] = ()) -> None:
        """See ``Track``."""
        if faulty:
            self.refused(rows)
        else:
            self.step += 1

    def refused(self, rows: Rows) -> None:
        """See ``Track``: what was earned and measured goes into the next row."""
        if rows.rewards:
            self._reward += rows.rewards[0]
        for metrics in rows.metrics.values():
            self._metrics = metrics | self._metrics

    def restarted(self, rows: Rows | None) -> tuple[int, int]:
        """See ``Track``. A first row is said again as it is: nothing of it is lost."""
        if self.step == 0:
            return 0, 0
        self._number = self._numbering.take()
        self.step = 0
        self._resumed = True
        if rows is None:
            self._reward = 0.0  # earned by an action that the server does not know
            return 1, 0
        if rows.metrics:
            rows.metrics = {self._number: next(iter(rows.metrics.values()))}
        rows.episodes, rows.steps, rows.rewards = [self._number], [0], []
        self._announce(rows)
        return 1, 0


class BatchTrack:
    """N episodes that step together, in Gymnasium's NEXT_STEP order.

    Where a row ended, its observation is the final one; the row of the next call is the first of
    another episode, and its reward is nobody's.
    """

    def __init__(self, numbering: Numbering, n: int, options: EpisodeOptions) -> None:
        self.n = n
        self.options = options
        self.busy = False
        self.pending: Pending | None = None
        self._numbering = numbering
        self._numbers = np.zeros(n, np.int64)
        self._steps = np.zeros(n, np.int64)
        self._begins = np.ones(n, np.bool_)  # the next row is the first of an episode
        self._issued = np.zeros(n, np.bool_)  # the server may know the number
        self._resumed = np.zeros(n, np.bool_)  # ... or its beginning was lost
        self._any_begins = True

    def rows(
        self,
        observations: Columns,
        rewards: Any = None,
        terminated: Any = None,
        truncated: Any = None,
    ) -> Rows | None:
        """The rows of a vector step; None where there is nothing to say.

        Raises:
            InvalidValueError: A column is not [N] or not finite.
        """
        earned, over, ended = self.checked(rewards, terminated, truncated, self._begins)
        if self._any_begins:
            begins = self._begins
            # A first row that was refused keeps its number: the server may have opened the episode.
            fresh = begins & ~self._issued
            if count := int(fresh.sum()):
                self._numbers[fresh] = np.arange(count) + self._numbering.take(count)
                self._issued |= fresh
            self._steps[begins] = 0
            if earned is not None:
                earned = np.where(begins, 0.0, earned)
        rows = Rows(
            self._numbers.tolist(),
            self._steps.tolist(),
            [] if earned is None else earned.tolist(),
            observations,
        )
        rows.ended = ended
        if ended is not None:
            rows.plain = False
            no_bootstrap = np.zeros(self.n, np.bool_) if over is None else over
            statuses = np.where(no_bootstrap, Status.TERMINATED, Status.TRUNCATED)
            rows.statuses = np.where(ended, statuses, Status.RUNNING).tolist()
            if self._any_begins and (empty := self._begins & ended).any():
                # An episode without a step: there is nothing to say about it, nor does what was
                # lost before it concern the one that follows.
                self._resumed[empty] = False
                self._issued[empty & fresh] = False
                select_rows(rows, np.flatnonzero(~empty))
        if self._any_begins:
            self._announce(rows)
        return rows if rows.episodes else None

    def checked(
        self, rewards: Any, terminated: Any, truncated: Any, begins: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float64] | None, NDArray[np.bool_] | None, NDArray[np.bool_] | None]:
        """What a vector step says beside its observations.

        Args:
            rewards: [N] or None: none.
            terminated: Likewise.
            truncated: Likewise.
            begins: [N] Rows whose reward is nobody's.

        Returns:
            [N] rewards, rows that are terminated, rows that ended at all; None: none.

        Raises:
            InvalidValueError: A column is not [N] or not finite.
        """
        earned = self._column("rewards", rewards, np.float64)
        over = self._column("terminated", terminated, np.bool_)
        cut = self._column("truncated", truncated, np.bool_)
        if earned is not None and not (finite := np.abs(earned) <= FLOAT32_MAX).all():
            bad = np.flatnonzero(~finite & ~begins)
            if len(bad):
                raise not_finite(earned[bad[0]], f"rewards[{bad[0]}]")
        ended: NDArray[np.bool_] | None = None
        if over is not None or cut is not None:
            either = over if cut is None else cut if over is None else over | cut
            ended = either if either is not None and either.any() else None
        return earned, over, ended

    def check_rows(self, indices: Sequence[int]) -> None:
        """See that those are rows.

        Raises:
            InvalidValueError: No such row.
        """
        for row in indices:
            if not 0 <= row < self.n:
                raise InvalidValueError(f"expected 0 to {self.n - 1}, got {row}", field="rows")

    def __str__(self) -> str:
        return f"of a batch of {self.n}"

    def _column(self, name: str, values: Any, dtype: Any) -> NDArray[Any] | None:
        if values is None:
            return None
        try:
            column = np.asarray(values, dtype)
        except (TypeError, ValueError) as error:
            raise InvalidValueError(
                f"expected {self.n} values of {np.dtype(dtype)}: {error}", field=name
            ) from None
        if column.shape != (self.n,):
            raise SpaceMismatchError(
                f"expected one value per row, [{self.n}], got {list(column.shape)}", field=name
            )
        return column

    def _announce(self, rows: Rows) -> None:
        first = [number for number, step in zip(rows.episodes, rows.steps, strict=True) if not step]
        lost = set(self._numbers[self._resumed].tolist())
        rows.resumed = [number for number in first if number in lost]
        rows.begun = rows.resumed if self.options.are_default else first
        rows.plain = rows.plain and not rows.begun
        rows.options = self.options

    def accepted(self, rows: Rows, faulty: Sequence[int] = ()) -> None:
        """See ``Track``. Faulty rows go on as episodes whose beginning was lost."""
        self._steps += 1
        had_begun = self._any_begins
        if rows.ended is None:
            self._any_begins = False
            if had_begun:
                self._begins[:] = False
                self._resumed[:] = False
        else:
            self._any_begins = True
            self._begins = rows.ended.copy()
            self._resumed[:] = False
        for row in faulty:
            # An end that was refused ends it for us all the same.
            self._resumed[row] = not self._begins[row]
            self._begins[row] = True
            self._any_begins = True
        if self._any_begins:
            self._issued &= ~self._begins

    def refused(self, rows: Rows) -> None:
        """See ``Track``: the same call will be made again, with its rewards."""

    def abandon(self, indices: Sequence[int]) -> Rows | None:
        """Rows that give up those episodes; their next observations begin new ones.

        Raises:
            InvalidValueError: No such row.
        """
        self.check_rows(indices)
        rows_given = list(dict.fromkeys(indices))
        running = [row for row in rows_given if self._issued[row]]
        on_its_way = self.pending is not None and not self.pending.answered
        self._begins[running] = True
        self._issued[running] = False
        self._resumed[rows_given] = False
        self._any_begins = bool(self._begins.any())
        if not running:
            return None
        steps = self._steps[running] + on_its_way
        rows = Rows(self._numbers[running].tolist(), steps.tolist(), [], None)
        rows.plain = False
        rows.statuses = [Status.ABANDONED] * len(running)
        return rows

    def running(self) -> list[int]:
        """Rows whose episode the server may know, and that has not ended."""
        return np.flatnonzero(self._issued).tolist()

    def restarted(self, rows: Rows | None) -> tuple[int, int]:
        """See ``Track``."""
        if rows is None:
            lost = ~self._begins
            self._begins[:] = True
            self._issued[:] = False
            self._resumed |= lost
            self._any_begins = True
            return int(lost.sum()), 0
        index = np.arange(self.n) if rows.index is None else rows.index
        had_begun = np.asarray(rows.steps) > 0
        ended = np.zeros(len(index), np.bool_) if rows.ended is None else rows.ended[index]
        anew = index[had_begun & ~ended]
        self._numbers[anew] = np.arange(len(anew)) + self._numbering.take(len(anew))
        self._steps[anew] = 0
        self._resumed[anew] = True
        rows.episodes = self._numbers[index].tolist()
        rows.steps = [0] * len(index)
        rows.rewards = []
        ends_lost = had_begun & ended
        if ends_lost.any():
            select_rows(rows, np.flatnonzero(~ends_lost))
        self._announce(rows)
        return len(anew), int(ends_lost.sum())


def select_rows(rows: Rows, keep: NDArray[np.intp]) -> None:
    """Keep only those rows, in place; ``index`` remembers where they stood."""
    rows.index = keep if rows.index is None else rows.index[keep]
    order = keep.tolist()
    rows.episodes = [rows.episodes[row] for row in order]
    rows.steps = [rows.steps[row] for row in order]
    if rows.rewards:
        rows.rewards = [rows.rewards[row] for row in order]
    if rows.statuses:
        rows.statuses = [rows.statuses[row] for row in order]
    if rows.observations is not None:
        rows.observations = {path: column[keep] for path, column in rows.observations.items()}


class EpisodeBook:
    """The open episodes of a client by the application's id."""

    def __init__(self, numbering: Numbering) -> None:
        self._numbering = numbering
        self.open: dict[str, EpisodeTrack] = {}
        self._ended: OrderedDict[str, None] = OrderedDict()

    def start(
        self, episode_id: str | None, *, training_enabled: bool, explore: bool
    ) -> EpisodeTrack:
        """Open an episode under that id, or under one of our own.

        Raises:
            EpisodeStateError: One of that id is running.
            InvalidValueError: It is no text that can be sent.
        """
        label = "" if episode_id is None else sendable_text(episode_id, "episode_id")
        name = label or uuid.uuid4().hex
        if name in self.open:
            raise EpisodeStateError(
                f"episode {name!r} is running; end it first, or start another id"
            )
        self._ended.pop(name, None)
        options = EpisodeOptions(label, training_enabled, explore)
        track = self.open[name] = EpisodeTrack(name, self._numbering, options)
        return track

    def find(self, episode_id: str) -> EpisodeTrack:
        """The running episode of that id.

        Raises:
            EpisodeEndedError: It has ended.
            UnknownEpisodeError: It was never started here, or ended long ago.
        """
        track = self.open.get(episode_id)
        if track is not None:
            return track
        if episode_id in self._ended:
            raise _already_ended(episode_id)
        raise UnknownEpisodeError(
            f"episode {episode_id!r} was not started by this client (or ended long ago); "
            "start_episode() returns the id to use"
        )

    def end(self, track: EpisodeTrack) -> None:
        """Forget a track, but not that it was there."""
        track.ended = True
        if self.open.pop(track.id, None) is not None:
            self._ended[track.id] = None
            if len(self._ended) > ENDED_IDS_REMEMBERED:
                self._ended.popitem(last=False)


def end_status(*, terminated: bool, truncated: bool) -> Status:
    """How an episode ends that was ended with those flags; with neither, it terminated."""
    return Status.TRUNCATED if truncated and not terminated else Status.TERMINATED


def _already_ended(episode_id: str) -> EpisodeEndedError:
    return EpisodeEndedError(f"episode {episode_id!r} has already ended; start another one")
