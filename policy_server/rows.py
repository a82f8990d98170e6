"""``ActRequest`` to recorded rows, and recorded rows to ``ActResponse``.

Loop thread only. Decoding checks a whole request before anything of it is recorded; faults of
single rows are found on the way and reported in band.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import gymnasium as gym
import numpy as np

from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.batches import Columns, SpaceCodec
from client_sdk.wire.faults import Fault, Reason
from policy_server.actions import LoggedActions
from policy_server.batcher import Ask, Rows
from policy_server.episodes import ABANDONED, RUNNING, TRUNCATED, AgentTrack, EpisodeBook

_ONLY_AGENT = ""


class DecodedGroup:
    """One ``StepRows``, checked: columns of N rows."""

    __slots__ = (
        "agents",
        "episodes",
        "faults",
        "field",
        "logged",
        "logps",
        "observations",
        "rewards",
        "statuses",
        "steps",
    )

    def __init__(self, field: str) -> None:
        self.field = field
        self.episodes: list[int] = []
        self.agents: list[str] | None = None  # None: the only agent
        self.steps: list[int] = []
        self.rewards: list[float] = []
        self.statuses: list[int] | None = None  # None: all running
        self.observations: Columns | None = None
        self.logged: Columns | None = None
        self.logps: list[float] | None = None
        self.faults: dict[int, Fault] = {}


class GroupAnswer:
    """What one group's response will be made of.

    Attributes:
        size: N.
        asked: The rows that the batcher answers, None if there are none.
        indices: Which rows of the group those are; None for all of them in order.
        repeats: Rows answered before, or being answered for another request.
        faults: Refused rows.
    """

    __slots__ = ("asked", "faults", "indices", "repeats", "size")

    def __init__(self, size: int, faults: dict[int, Fault]) -> None:
        self.size = size
        self.asked: Rows | None = None
        self.indices: list[int] | None = None
        self.repeats: list[tuple[int, AgentTrack]] = []
        self.faults = faults


class RowRecorder:
    """Knows the spaces, and what a row may be."""

    def __init__(
        self,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        *,
        max_rows: int,
        normalize_actions: bool,
        logged_actions_need_logp: bool,
    ) -> None:
        self._observations = SpaceCodec(observation_space)
        self._actions = SpaceCodec(action_space)
        self._logged = LoggedActions(action_space, normalize=normalize_actions)
        self._max_rows = max_rows
        self._need_logp = logged_actions_need_logp

    # Decode.

    def decode(self, request: pb.ActRequest) -> list[DecodedGroup]:
        """All groups of a request, checked; nothing is recorded yet.

        Raises:
            Fault: The request as a whole is malformed, or too large.
        """
        groups = request.groups
        if len(groups) == 1:
            return [self._decode_group(groups[0], "groups[0]", self._max_rows)]
        decoded = []
        room = self._max_rows
        for index, group in enumerate(groups):
            decoded.append(self._decode_group(group, f"groups[{index}]", room))
            room -= len(group.episodes)
        return decoded

    def _decode_group(self, group: pb.StepRows, field: str, max_rows: int) -> DecodedGroup:
        rows = DecodedGroup(field)
        rows.episodes = list(group.episodes)
        rows.steps = list(group.steps)
        n = len(rows.episodes)
        if n > max_rows:
            raise Fault(
                Reason.LIMIT_EXCEEDED,
                f"more than max_rows_per_request={self._max_rows} rows in one request; "
                "send several requests, or raise that setting on the server",
                f"{field}.episodes",
            )
        if len(rows.steps) != n:
            raise _wrong_length(f"{field}.steps", len(rows.steps), n)
        rows.rewards = list(group.rewards) or [0.0] * n
        if len(rows.rewards) != n:
            raise _wrong_length(f"{field}.rewards", len(rows.rewards), n)
        if group.agents:
            rows.agents = list(group.agents)
            if len(rows.agents) != n:
                raise _wrong_length(f"{field}.agents", len(rows.agents), n)
        if group.statuses:
            rows.statuses = list(group.statuses)
            if len(rows.statuses) != n:
                raise _wrong_length(f"{field}.statuses", len(rows.statuses), n)
            if not all(0 <= status <= ABANDONED for status in rows.statuses):
                raise Fault(
                    Reason.MALFORMED_TENSOR,
                    f"unknown StepStatus {max(rows.statuses)}",
                    f"{field}.statuses",
                )
        if group.HasField("observations"):
            rows.observations = self._observations.decode(
                group.observations, n, f"{field}.observations"
            )
            rows.faults = self._observations.row_faults(rows.observations, f"{field}.observations")
        else:
            self._check_observations_optional(rows, n)
        if group.HasField("logged_actions"):
            self._decode_logged(group, rows, n)
        if not math.isfinite(sum(rows.rewards)):
            for index, reward in enumerate(rows.rewards):
                if not math.isfinite(reward):
                    rows.faults.setdefault(
                        index,
                        Fault(
                            Reason.NOT_FINITE,
                            f"expected a finite reward, got {reward}",
                            f"{field}.rewards[{index}]",
                        ),
                    )
        return rows

    def _check_observations_optional(self, rows: DecodedGroup, n: int) -> None:
        statuses = rows.statuses or [RUNNING] * n
        for index, status in enumerate(statuses):
            if status in (0, RUNNING, TRUNCATED):
                name = "TRUNCATED" if status == TRUNCATED else "RUNNING"
                raise Fault(
                    Reason.SPACE_MISMATCH,
                    f"rows[{index}] is {name} and needs an observation; only groups of TERMINATED "
                    "and ABANDONED rows may leave them out",
                    f"{rows.field}.observations",
                )

    def _decode_logged(self, group: pb.StepRows, rows: DecodedGroup, n: int) -> None:
        field = f"{rows.field}.logged_actions"
        rows.logged = self._actions.decode(group.logged_actions, n, field)
        rows.faults |= self._actions.row_faults(rows.logged, field, bounds=True)
        if not group.logged_logps:
            if self._need_logp:
                raise Fault(
                    Reason.LOGP_REQUIRED,
                    "this algorithm corrects for how likely the behaviour's actions were: "
                    "log_action needs logp=, the log-density of the action as given here",
                    f"{rows.field}.logged_logps",
                )
            return
        rows.logps = list(group.logged_logps)
        if len(rows.logps) != n:
            raise _wrong_length(f"{rows.field}.logged_logps", len(rows.logps), n)
        for index, logp in enumerate(rows.logps):
            if not math.isfinite(logp):
                rows.faults.setdefault(
                    index,
                    Fault(
                        Reason.NOT_FINITE,
                        f"expected a finite log-density, got {logp}",
                        f"{rows.field}.logged_logps[{index}]",
                    ),
                )

    # Record.

    def record(self, rows: DecodedGroup, book: EpisodeBook, ask: Ask) -> GroupAnswer:
        """Record each row that is in order, and ask for the actions that are due."""
        answer = GroupAnswer(len(rows.episodes), rows.faults)
        tracks: list[AgentTrack] = []
        indices: list[int] = []
        running = book.running
        statuses = rows.statuses
        agents = rows.agents
        faults = rows.faults
        trained = evaluated = 0
        for index, (number, step, reward) in enumerate(
            zip(rows.episodes, rows.steps, rows.rewards, strict=True)
        ):
            if faults and index in faults:
                continue
            agent = _ONLY_AGENT if agents is None else agents[index]
            status = RUNNING if statuses is None else statuses[index] or RUNNING
            episode = running.get(number)
            track = None if episode is None else episode.tracks.get(agent)
            # The common case first: a running episode's next step.
            if (
                track is not None
                and step == track.step + 1
                and status == RUNNING
                and track.awaiting is None
            ):
                track.observe(step, reward)
                if track.training:
                    trained += 1
                else:
                    evaluated += 1
            else:
                try:
                    track = self._record_uncommon(
                        rows, index, book, track, number, agent, step, status, reward, answer, ask
                    )
                except Fault as fault:
                    faults[index] = fault
                    continue
                if track is None:
                    continue
            track.awaiting = (rows.observations, index)  # type: ignore[assignment]
            track.queued = True
            tracks.append(track)
            indices.append(index)
        if trained or evaluated:
            book.count_steps(trained=trained, evaluated=evaluated)
        if tracks:
            self._ask(rows, answer, ask, tracks, indices)
        return answer

    def _record_uncommon(
        self,
        rows: DecodedGroup,
        index: int,
        book: EpisodeBook,
        track: AgentTrack | None,
        number: int,
        agent: str,
        step: int,
        status: int,
        reward: float,
        answer: GroupAnswer,
        ask: Ask,
    ) -> AgentTrack | None:
        """A first row, a last one, a repeat or a mistake. Returns a track that needs an action."""
        field = f"{rows.field}.steps[{index}]"
        if agent != _ONLY_AGENT:
            raise Fault(
                Reason.UNKNOWN_AGENT,
                f'unknown agent {agent!r}; this server knows one agent, ""',
                f"{rows.field}.agents[{index}]",
            )
        if track is None:
            if book.ended_like(number, agent, step, status):
                return None
            if step == 0 and reward != 0.0:
                raise Fault(
                    Reason.STEP_OUT_OF_ORDER,
                    f"expected reward 0 at step 0 (no action came before it), got {reward}",
                    f"{rows.field}.rewards[{index}]",
                )
            track = book.start(number, agent, step, field)
            if status != RUNNING:
                self._end(rows, index, book, track, step, status, 0.0)
                return None
            track.step = 0
            return track
        if status == ABANDONED or (status != RUNNING and step == track.step + 1):
            self._end(rows, index, book, track, step, status, reward)
            return None
        if step == track.step and status == RUNNING:
            if track.awaiting is None:
                answer.repeats.append((index, track))
                return None
            if track.queued:
                answer.repeats.append((index, track))
                ask.join(track)
                return None
            return track  # it was answered NOT_READY before
        raise Fault(
            Reason.STEP_OUT_OF_ORDER,
            f"episode {number} is at step {track.step}"
            + (", which is not answered yet" if track.awaiting is not None else "")
            + f"; expected that one again or step {track.step + 1}, got {step}",
            field,
        )

    def _end(
        self,
        rows: DecodedGroup,
        index: int,
        book: EpisodeBook,
        track: AgentTrack,
        step: int,
        status: int,
        reward: float,
    ) -> None:
        last = None
        if rows.observations is not None:
            last = {path: values[index : index + 1] for path, values in rows.observations.items()}
        book.end(track, step, status, reward, last)

    def _ask(
        self,
        rows: DecodedGroup,
        answer: GroupAnswer,
        ask: Ask,
        tracks: list[AgentTrack],
        indices: list[int],
    ) -> None:
        observations, logged, logps = rows.observations, rows.logged, rows.logps
        if observations is None:  # decoded groups of running rows have them
            raise TypeError("running rows without observations")
        if len(tracks) < answer.size:
            answer.indices = indices
            observations = {path: values[indices] for path, values in observations.items()}
            if logged is not None:
                logged = {path: values[indices] for path, values in logged.items()}
                logps = None if logps is None else [logps[index] for index in indices]
        substitute = None
        if logged is not None:
            substitute = functools.partial(
                self._logged.substitute,
                actions=logged,
                logps=None if logps is None else np.array(logps),
            )
        elif not ask.gated:
            ask.gated = any(track.training for track in tracks)
        answer.asked = Rows(tracks, observations, substitute)
        ask.add(answer.asked)

    # Encode.

    def encode(self, answers: list[GroupAnswer], response: pb.ActResponse) -> None:
        """Fill the response, once every row has its action."""
        for answer in answers:
            self._encode_group(answer, response.groups.add())

    def _encode_group(self, answer: GroupAnswer, group: pb.ActionRows) -> None:
        asked = answer.asked
        batch = None if asked is None else asked.batch
        if asked is not None and batch is not None and asked.logged is None:
            group.policy_version = batch.policy.version
            start, stop = asked.start, asked.start + len(asked.tracks)
            if answer.indices is None:
                self._actions.encode(
                    {path: values[start:stop] for path, values in batch.env_actions.items()},
                    group.actions,
                )
                return
            columns = self._actions.zeros(answer.size)
            for path, values in batch.env_actions.items():
                columns[path][answer.indices] = values[start:stop]
        elif answer.repeats:
            columns = self._actions.zeros(answer.size)
        else:
            columns = {}
        for index, track in answer.repeats:
            if track.last is not None:
                batch, row = track.last
                group.policy_version = max(group.policy_version, batch.policy.version)
                for path, values in batch.env_actions.items():
                    columns[path][index] = values[row]
        if columns:
            self._actions.encode(columns, group.actions)
        for index, fault in sorted(answer.faults.items()):
            group.faults.add(index=index, error=fault.to_detail())


def _wrong_length(field: str, got: int, expected: int) -> Fault:
    return Fault(
        Reason.MALFORMED_TENSOR,
        f"expected {expected} entries, one per entry of episodes, got {got}",
        field,
    )
