"""``RowRequests``: rows as the messages of one session, and the columns back out of a message.

Owned by one ``Exchange``. No I/O.
"""

from __future__ import annotations

from typing import Any

from client_sdk.pending import Pending
from client_sdk.rows import EpisodeOptions
from client_sdk.templates import RowsTemplate, usable
from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.batches import SpaceCodec

_MAX_TEMPLATES = 8
"""Of different numbers of rows."""


def add_start(starts: Any, episode: int, options: EpisodeOptions, *, resumed: bool) -> None:
    """Say in a message how an episode begins."""
    starts.add(
        episode=episode,
        label=options.label,
        evaluation=not options.training_enabled,
        greedy=not options.explore,
        resumed=resumed,
    )


class RowRequests:
    """Encodes ``StreamActRequest``s: where they are plain, by refilling a template."""

    def __init__(self, session_id: str, observations: SpaceCodec, actions: SpaceCodec) -> None:
        self._session_id = session_id
        self._observations = observations
        self._actions = actions
        self._refills = usable(observations)
        self._templates: dict[int, RowsTemplate] = {}

    def presence(self) -> bytes:
        """The first message of a stream, with nothing in it: from here on it keeps the lease."""
        message = pb.StreamActRequest()
        message.act.session_id = self._session_id
        return message.SerializeToString()

    def encode(self, pending: Pending) -> bytes:
        """The message of a request; its rows have no columns afterwards."""
        rows = pending.rows
        if rows.plain and self._refills:
            n = len(rows.episodes)
            data = (self._templates.get(n) or self._template(n)).fill(pending.number, rows)
            rows.observations = None  # the caller's memory, from here on
            return data
        message = pb.StreamActRequest(request=pending.number)
        act = message.act
        act.session_id = self._session_id
        if rows.begun:
            options = rows.options
            for number in rows.begun:
                add_start(act.starts, number, options, resumed=number in rows.resumed)
        for number, values in rows.metrics.items():
            act.metrics.add(episode=number, values=values)
        group = act.groups.add()
        group.episodes.extend(rows.episodes)
        group.steps.extend(rows.steps)
        if rows.rewards:
            group.rewards.extend(rows.rewards)
        if rows.statuses:
            group.statuses.extend(rows.statuses)  # type: ignore[arg-type]
        if rows.observations is not None:
            self._observations.encode(rows.observations, group.observations)
            rows.observations = None  # the caller's memory, from here on
        if rows.logged_actions is not None:
            self._actions.encode(rows.logged_actions, group.logged_actions)
            group.logged_logps.extend(rows.logged_logps)
            rows.logged_actions = None
        return message.SerializeToString()

    def _template(self, n: int) -> RowsTemplate:
        if len(self._templates) >= _MAX_TEMPLATES:
            self._templates.clear()
        template = RowsTemplate(self._session_id, self._observations, n)
        self._templates[n] = template
        return template

    def reload(self, pending: Pending) -> None:
        """Take the columns of a sent request back from its own bytes."""
        group = pb.StreamActRequest.FromString(pending.data).act.groups[0]
        rows, n = pending.rows, len(group.episodes)
        rows.observations = self._observations.decode(group.observations, n, "observations")
        if group.HasField("logged_actions"):
            rows.logged_actions = self._actions.decode(group.logged_actions, n, "logged_actions")
