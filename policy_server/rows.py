"""``ActRequest`` to recorded rows.

Loop thread only. Decoding checks a whole request before anything of it is recorded; faults of
single rows are found on the way and reported in band.
"""

from __future__ import annotations

import functools

import numpy as np

from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.batches import Columns, SpaceCodec
from client_sdk.wire.faults import Fault, Reason
from client_sdk.wire.leaf_kinds import FLOAT32_MAX
from policy_server.actions import LoggedActions
from policy_server.episodes import EpisodeBook
from policy_server.masks import mask_path, nothing_allowed
from policy_server.refusals import logp_required, unknown_agent
from policy_server.requests import Ask, Fields, Group, fields_of
from policy_server.terms import Terms
from policy_server.tracks import ABANDONED, RUNNING, TRUNCATED, AgentTrack

_ONLY_AGENT = ""


class RowRecorder:
    """Knows the spaces, and what a row may be.

    Attributes:
        observations: Codec of the observation space.
    """

    def __init__(self, terms: Terms, *, max_rows: int) -> None:
        self.observations = SpaceCodec(terms.observation_space)
        self._actions = SpaceCodec(terms.action_space)
        self._logged = LoggedActions(terms.action_space, normalize=terms.normalize_actions)
        self._mask = mask_path(terms.observation_space, terms.action_space)
        self._max_rows = max_rows
        self._need_logp = terms.logged_actions_need_logp

    # Decode.

    def decode(self, request: pb.ActRequest) -> list[Group]:
        """All groups of a request, checked; nothing is recorded yet.

        Raises:
            Fault: The request as a whole is malformed, or too large.
        """
        groups: list[Group] = []
        rows = 0
        # A slice, as below: to go over a repeated field one by one costs several times as much.
        for index, message in enumerate(request.groups[:]):
            # An empty group costs something too.
            rows += len(message.episodes) or 1
            if rows > self._max_rows:
                raise self._too_many_rows(request)
            groups.append(self._decode_group(message, fields_of(index)))
        return groups

    def _too_many_rows(self, request: pb.ActRequest) -> Fault:
        rows = sum(len(message.episodes) or 1 for message in request.groups)
        return Fault(
            Reason.LIMIT_EXCEEDED,
            f"expected at most max_rows_per_request={self._max_rows} rows in one request, got "
            f"{rows}; send several requests, or raise that setting on the server",
            "groups",
        )

    def _decode_group(self, message: pb.StepRows, fields: Fields) -> Group:
        episodes, steps = message.episodes[:], message.steps[:]
        n = len(episodes)
        rewards = message.rewards[:] or [0.0] * n
        group = Group(fields, episodes, steps, rewards)
        if len(steps) != n:
            raise _wrong_length(fields.steps, len(steps), n)
        if len(rewards) != n:
            raise _wrong_length(fields.rewards, len(rewards), n)
        if message.agents:
            group.agents = list(message.agents)
            if len(group.agents) != n:
                raise _wrong_length(fields.agents, len(group.agents), n)
        if message.statuses:
            group.statuses = list(message.statuses)
            if len(group.statuses) != n:
                raise _wrong_length(fields.statuses, len(group.statuses), n)
            for index, status in enumerate(group.statuses):
                if not 0 <= status <= ABANDONED:
                    raise Fault(
                        Reason.MALFORMED_TENSOR,
                        f"expected a StepStatus from 0 to {ABANDONED}, got {status}",
                        f"{fields.statuses}[{index}]",
                    )
        if message.HasField("observations"):
            codec = self.observations
            columns = codec.decode(message.observations, n, fields.observations)
            group.observations = columns
            self._check_observations(group, columns)
        else:
            self._check_observations_optional(group, n)
        if message.HasField("logged_actions"):
            self._decode_logged(message, group, n)
        elif message.logged_logps:
            raise Fault(
                Reason.MALFORMED_TENSOR,
                f"expected none without logged_actions, got {len(message.logged_logps)}; send "
                "both, or neither to ask for actions",
                fields.logged_logps,
            )
        _check_rewards(group)
        return group

    def check(self, group: Group) -> None:
        """Note the faults of running rows that have an observation and a reward each."""
        self._check_observations(group, group.observations or {})
        _check_rewards(group)

    def _check_observations(self, group: Group, columns: Columns) -> None:
        group.faults = self.observations.row_faults(columns, group.fields.observations)
        if self._mask is not None:
            self._check_mask(group, self._mask)

    def _check_mask(self, group: Group, path: str) -> None:
        masks = (group.observations or {})[path]
        for index in np.flatnonzero(~masks.any(axis=1)).tolist():
            field = f'{group.fields.observations}["{path}"][{index}]'
            group.faults.setdefault(index, nothing_allowed(field))

    def _check_observations_optional(self, group: Group, n: int) -> None:
        for index, status in enumerate(group.statuses or [RUNNING] * n):
            if status in (0, RUNNING, TRUNCATED):
                name = "TRUNCATED" if status == TRUNCATED else "RUNNING"
                raise Fault(
                    Reason.SPACE_MISMATCH,
                    f"rows[{index}] is {name} and needs an observation; only groups of TERMINATED "
                    "and ABANDONED rows may leave them out",
                    group.fields.observations,
                )

    def _decode_logged(self, message: pb.StepRows, group: Group, n: int) -> None:
        fields = group.fields
        group.logged = self._actions.decode(message.logged_actions, n, fields.logged_actions)
        group.faults |= self._actions.row_faults(group.logged, fields.logged_actions, bounds=True)
        if not message.logged_logps:
            if self._need_logp:
                raise logp_required(fields.logged_logps)
            return
        group.logps = message.logged_logps[:]
        if len(group.logps) != n:
            raise _wrong_length(fields.logged_logps, len(group.logps), n)
        _note_not_finite(group.faults, group.logps, fields.logged_logps, "log-density")

    # Record.

    def record(self, rows: Group, book: EpisodeBook, ask: Ask) -> None:
        """Record each row that is in order, and ask for the actions that are due."""
        tracks = rows.tracks
        indices: list[int] = []
        running = book.running
        statuses = rows.statuses
        agents = rows.agents
        faults = rows.faults
        trained = evaluated = learning = 0
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
                episode is not None
                and track is not None
                and step == track.step + 1
                and status == RUNNING
                and track.awaiting is None
            ):
                # As AgentTrack.observe, which would cost a call for every row.
                track.step = step
                track.reward = reward
                episode.return_ += reward
                episode.length += 1
                if track.training:
                    track.rewards.append(reward)
                    trained += 1
                else:
                    evaluated += 1
            else:
                try:
                    track = self._record_uncommon(
                        rows, index, book, track, number, agent, step, status, reward, ask
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
            learning += track.training
        if trained or evaluated:
            book.count_steps(trained=trained, evaluated=evaluated)
        if tracks:
            self._ask(rows, ask, indices, learning)

    def _record_uncommon(
        self,
        rows: Group,
        index: int,
        book: EpisodeBook,
        track: AgentTrack | None,
        number: int,
        agent: str,
        step: int,
        status: int,
        reward: float,
        ask: Ask,
    ) -> AgentTrack | None:
        """A first row, a last one, a repeat or a mistake. Returns a track that needs an action."""
        field = f"{rows.fields.steps}[{index}]"
        if agent != _ONLY_AGENT:
            raise unknown_agent(agent, f"{rows.fields.agents}[{index}]")
        if track is None:
            if book.end_again(number, agent, step, status):
                return None
            if step == 0 and reward != 0.0:
                raise Fault(
                    Reason.STEP_OUT_OF_ORDER,
                    f"expected reward 0 at step 0 (no action came before it), got {reward}",
                    f"{rows.fields.rewards}[{index}]",
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
                rows.repeats.append((index, track, track.last))
                return None
            if track.queued:
                rows.repeats.append((index, track, None))
                ask.join(track)
                return None
            return track  # it was answered NOT_READY before
        expected = f"episode {number} is at step {track.step}"
        if status != RUNNING:
            expected += f"; expected its end at step {track.step + 1}"
        elif track.awaiting is not None:
            expected += ", which is not answered yet; expected that one again"
        else:
            expected += f"; expected that one again or step {track.step + 1}"
        raise Fault(Reason.STEP_OUT_OF_ORDER, f"{expected}, got step {step}", field)

    def _end(
        self,
        rows: Group,
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

    def _ask(self, rows: Group, ask: Ask, indices: list[int], learning: int) -> None:
        """Hand the recorded rows that need an action to the batcher."""
        observations, logged, logps = rows.observations, rows.logged, rows.logps
        if observations is None:  # decoded groups of running rows have them
            raise TypeError("running rows without observations")
        if len(indices) < len(rows.episodes):
            rows.indices = indices
            observations = {path: values[indices] for path, values in observations.items()}
            if logged is not None:
                logged = {path: values[indices] for path, values in logged.items()}
                logps = None if logps is None else [logps[index] for index in indices]
        rows.asked = observations
        if logged is not None:
            rows.substitute = functools.partial(
                self._logged.substitute,
                actions=logged,
                logps=None if logps is None else np.array(logps),
            )
            ask.fills = ask.fills or learning > 0
        elif learning:
            ask.gated = True
        if learning < len(indices):  # only episodes that are not learnt from are ever greedy
            rows.any_greedy = any(track.episode.options.greedy for track in rows.tracks)
        ask.add(rows)


def _wrong_length(field: str, got: int, expected: int) -> Fault:
    return Fault(
        Reason.MALFORMED_TENSOR,
        f"expected {expected} entries, one per entry of episodes, got {got}",
        field,
    )


def _check_rewards(group: Group) -> None:
    if not sum(map(abs, group.rewards)) <= FLOAT32_MAX:  # NaN neither
        _note_not_finite(group.faults, group.rewards, group.fields.rewards, "reward")


def _note_not_finite(faults: dict[int, Fault], values: list[float], field: str, what: str) -> None:
    """Refuse the rows whose number the learner, which computes in float32, would not survive."""
    for index, value in enumerate(values):
        if not abs(value) <= FLOAT32_MAX:  # so is NaN
            faults.setdefault(
                index,
                Fault(
                    Reason.NOT_FINITE,
                    f"expected a {what} that is finite in float32, got {value}",
                    f"{field}[{index}]",
                ),
            )
