"""One ``Act`` request on its way through the server: what it said, and what it still waits for.

Loop thread only. ``rows`` decodes and records it, ``batcher`` brings its actions, ``answers``
encodes them. Made for every message, so ``Group`` and ``Ask`` are flat and hold columns, not rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from client_sdk.wire.faults import Fault
from policy_server.experience import InferredBatch
from policy_server.tracks import AgentTrack

if TYPE_CHECKING:
    from client_sdk.wire.batches import Columns


class Fields:
    """Paths into a request's group, for faults."""

    def __init__(self, index: int) -> None:
        self.group = f"groups[{index}]"
        self.episodes = f"{self.group}.episodes"
        self.agents = f"{self.group}.agents"
        self.steps = f"{self.group}.steps"
        self.rewards = f"{self.group}.rewards"
        self.statuses = f"{self.group}.statuses"
        self.observations = f"{self.group}.observations"
        self.logged_actions = f"{self.group}.logged_actions"
        self.logged_logps = f"{self.group}.logged_logps"


fields_of = functools.lru_cache(maxsize=64)(Fields)
"""Made once for each place, not for each request."""


class Group:
    """The rows of one ``StepRows``: checked columns of N rows, then their actions.

    Attributes:
        fields: Paths into the request, for faults.
        episodes: ``[N]``, and so are the further columns.
        agents: None: all are the only agent's.
        statuses: None: all are running.
        logged: The application's own actions; None to ask.
        logps: Their log-densities; None if there are none.
        faults: Refused rows, and why.
        repeats: Rows answered before, with their answer, or being answered for another request.
        tracks: ``[M]`` whose rows the batcher is to answer; empty if none are.
        indices: ``[M]`` which rows those are; None for all of them in order.
        asked: ``[M, ...]`` their observations by leaf.
        any_greedy: Some of them take the likeliest action.
        substitute: Puts the application's own actions in place of the chosen ones; None to ask.
        batch: The inference that answered them, None until then; they are its rows from
            ``start`` on.
        whole: They are all of its rows.
    """

    __slots__ = (
        "agents",
        "any_greedy",
        "asked",
        "batch",
        "episodes",
        "faults",
        "fields",
        "indices",
        "logged",
        "logps",
        "observations",
        "repeats",
        "rewards",
        "start",
        "statuses",
        "steps",
        "substitute",
        "tracks",
        "whole",
    )

    def __init__(
        self, fields: Fields, episodes: list[int], steps: list[int], rewards: list[float]
    ) -> None:
        self.fields = fields
        self.episodes = episodes
        self.steps = steps
        self.rewards = rewards
        self.agents: list[str] | None = None
        self.statuses: list[int] | None = None
        self.observations: Columns | None = None
        self.logged: Columns | None = None
        self.logps: list[float] | None = None
        self.faults: dict[int, Fault] = {}
        self.repeats: list[tuple[int, AgentTrack, tuple[InferredBatch, int] | None]] = []
        self.tracks: list[AgentTrack] = []
        self.indices: list[int] | None = None
        self.asked: Columns = {}
        self.any_greedy = False
        self.substitute: Callable[[InferredBatch], InferredBatch] | None = None
        self.batch: InferredBatch | None = None
        self.start = 0
        self.whole = False

    @property
    def greedy(self) -> NDArray[np.bool_]:
        """``[M]`` which of the asked rows take the likeliest action."""
        if self.any_greedy:
            return np.array([track.episode.options.greedy for track in self.tracks], np.bool_)
        return none_greedy(len(self.tracks))

    def refuse(self, asked: int, fault: Fault) -> None:
        """No action for that one of the asked rows."""
        self.faults[asked if self.indices is None else self.indices[asked]] = fault


@functools.lru_cache(maxsize=256)
def none_greedy(n: int) -> NDArray[np.bool_]:
    """``[n]`` of False, not to be written to."""
    greedy = np.zeros(n, np.bool_)
    greedy.setflags(write=False)
    return greedy


class Ask:
    """What one request still waits for; ``done`` is called once, with a fault or with None.

    Attributes:
        number: The caller's own, for ``done``.
        groups: All of the request's, in order.
        asked: Those with rows for the batcher. Repeats of rows that another request brought are
            not among them.
        size: How many rows those are.
        missing: Rows not answered yet, repeats included.
        gated: Some row asks for a training episode's action, and has to pass the gate.
        fills: Some training episode's row brings its own action: never held back while RLlib
            learns, but the buffer must have room for it.
        deadline_s: When waiting at the gate ends, on the loop's clock.
    """

    __slots__ = (
        "_done",
        "asked",
        "deadline_s",
        "fills",
        "gated",
        "groups",
        "missing",
        "number",
        "size",
    )

    def __init__(
        self, groups: list[Group], done: Callable[[Ask, Fault | None], None], number: int = 0
    ) -> None:
        self.groups = groups
        self.number = number
        self.asked: list[Group] = []
        self.size = 0
        self.missing = 0
        self.gated = False
        self.fills = False
        self.deadline_s = 0.0
        self._done: Callable[[Ask, Fault | None], None] | None = done

    def add(self, group: Group) -> None:
        """Ask for the actions of these rows too."""
        size = len(group.tracks)
        self.asked.append(group)
        self.size += size
        self.missing += size

    @property
    def finished(self) -> bool:
        """Whether ``done`` was called."""
        return self._done is None

    @property
    def held(self) -> bool:
        """Whether it had to wait at the gate."""
        return self.deadline_s > 0.0

    def join(self, track: AgentTrack) -> None:
        """Wait for a row that another request is asking for already."""
        self.missing += 1
        track.waiters.append(self._joined)

    def part(self) -> None:
        """Wait no longer for rows that other requests are asking for."""
        mine = self._joined
        for track in {
            track for group in self.groups for _, track, known in group.repeats if known is None
        }:
            track.waiters = [waiter for waiter in track.waiters if waiter != mine]

    def _joined(self, fault: Fault | None) -> None:
        if fault is None:
            self.arrived(1)
        else:
            self.finish(fault)

    def arrived(self, count: int) -> None:
        """That many of its rows were answered."""
        self.missing -= count
        if self.missing <= 0:
            self.finish(None)

    def finish(self, fault: Fault | None) -> None:
        """Answer the request; later news is ignored."""
        done, self._done = self._done, None
        if done is not None:
            done(self, fault)
