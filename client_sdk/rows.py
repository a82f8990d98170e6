"""``Rows``: what a client tells of its episodes in one request, and the words for it.

A ``Track`` (``EpisodeTrack``, ``BatchTrack``) makes rows and learns from the answer what has been
recorded; an ``Exchange`` makes messages of them. No I/O, no wire. Owned by one client and touched by
one of its calls at a time, like everything here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from client_sdk.values import check_type

if TYPE_CHECKING:
    from client_sdk.pending import Pending
    from client_sdk.wire.batches import Columns


class Status(IntEnum):
    """Where a row leaves its episode: ``StepStatus`` of the contract."""

    RUNNING = 1
    TERMINATED = 2
    TRUNCATED = 3
    ABANDONED = 4


def end_status(*, terminated: bool, truncated: bool) -> Status:
    """How an episode ends that was ended with those flags; with neither, it terminated."""
    return Status.TRUNCATED if truncated and not terminated else Status.TERMINATED


@dataclasses.dataclass(frozen=True, slots=True)
class EpisodeOptions:
    """How an episode is to be treated; fixed when it starts."""

    label: str = ""
    """A name for logs and metrics."""
    training_enabled: bool = True
    """False keeps it out of training; its return is reported apart."""
    explore: bool = True
    """False takes the likeliest action; kept out of training as well."""

    def __post_init__(self) -> None:
        for field in ("training_enabled", "explore"):
            check_type(getattr(self, field), (bool, np.bool_), "True or False", field)

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

    def keep(self, indices: NDArray[np.intp]) -> None:
        """Keep only those rows; ``index`` remembers where they stood."""
        self.index = indices if self.index is None else self.index[indices]
        order = indices.tolist()
        self.episodes = [self.episodes[row] for row in order]
        self.steps = [self.steps[row] for row in order]
        if self.rewards:
            self.rewards = [self.rewards[row] for row in order]
        if self.statuses:
            self.statuses = [self.statuses[row] for row in order]
        if self.observations is not None:
            self.observations = {
                path: column[indices] for path, column in self.observations.items()
            }

    def callers(self, rows: Iterable[int]) -> list[int]:
        """Which of the caller's rows those are."""
        return [row if self.index is None else int(self.index[row]) for row in rows]


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
