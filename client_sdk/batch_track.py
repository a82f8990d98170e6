"""``BatchTrack``: where N episodes stand that step together, column by column. No I/O, no wire.

Owned by one client and touched by one of its calls at a time.

Shapes: N rows of a vector step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from client_sdk.errors import InvalidValueError, SpaceMismatchError
from client_sdk.rows import EpisodeOptions, Numbering, Rows, Status
from client_sdk.values import not_finite
from client_sdk.wire.leaf_kinds import FLOAT32_MAX

if TYPE_CHECKING:
    from client_sdk.pending import Pending
    from client_sdk.wire.batches import Columns


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
        self._numbers = [0] * n  # replaced, never changed: rows on their way hold them
        self._steps = np.zeros(n, np.int64)
        self._none = bytes(n)  # a column of flags that are all False
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
            if fresh.any():
                self._renumber(np.flatnonzero(fresh))
                self._issued |= fresh
            self._steps[begins] = 0
            if earned is not None:
                earned = np.where(begins, 0.0, earned)
        rewards = [] if earned is None else earned.tolist()
        rows = Rows(self._numbers, self._steps.tolist(), rewards, observations)
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
                rows.keep(np.flatnonzero(~empty))
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
        # A sum of squares bounds each of them: exact when it says yes.
        if earned is not None and not np.vdot(earned, earned) < FLOAT32_MAX:
            bad = np.flatnonzero(~(np.abs(earned) <= FLOAT32_MAX) & ~begins)
            if len(bad):
                raise not_finite(earned[bad[0]], f"rewards[{bad[0]}]")
        if over is not None and over.tobytes() == self._none:
            over = None
        if cut is not None and cut.tobytes() == self._none:
            cut = None
        if over is None and cut is None:
            return earned, None, None
        ended = np.zeros(self.n, np.bool_)  # the caller's columns may change meanwhile
        for column in (over, cut):
            if column is not None:
                ended |= column
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

    def _renumber(self, rows: NDArray[np.intp]) -> None:
        """Other episodes are in those rows from here on."""
        self._numbers = self._numbers.copy()
        for number, row in enumerate(rows.tolist(), self._numbering.take(len(rows))):
            self._numbers[row] = number

    def _announce(self, rows: Rows) -> None:
        first = [number for number, step in zip(rows.episodes, rows.steps, strict=True) if not step]
        lost = {self._numbers[row] for row in np.flatnonzero(self._resumed)}
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
        numbers = [self._numbers[row] for row in running]
        steps = self._steps[running] + on_its_way
        rows = Rows(numbers, steps.tolist(), [], None)
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
        self._renumber(anew)
        self._steps[anew] = 0
        self._resumed[anew] = True
        rows.episodes = [self._numbers[row] for row in index]
        rows.steps = [0] * len(index)
        rows.rewards = []
        ends_lost = had_begun & ended
        if ends_lost.any():
            rows.keep(np.flatnonzero(~ends_lost))
        self._announce(rows)
        return len(anew), int(ends_lost.sum())
