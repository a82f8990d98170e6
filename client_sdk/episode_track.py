"""``EpisodeTrack``: where one episode stands: its number, step, reward and end. No I/O, no wire.

Owned by one client and touched by one of its calls at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from client_sdk.errors import EpisodeEndedError, InvalidValueError, LimitExceededError
from client_sdk.rows import EpisodeOptions, Numbering, Rows, Status
from client_sdk.values import finite_number, not_finite
from client_sdk.wire import MAX_METRICS
from client_sdk.wire.leaf_kinds import FLOAT32_MAX

if TYPE_CHECKING:
    from client_sdk.pending import Pending
    from client_sdk.wire.batches import Columns


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
            raise already_ended(self.id)

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


def already_ended(episode_id: str) -> EpisodeEndedError:
    """The error for a call that comes too late."""
    return EpisodeEndedError(f"episode {episode_id!r} has already ended; start another one")
