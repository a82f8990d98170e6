"""Answered groups to the contract's messages. Loop thread only."""

from __future__ import annotations

from collections.abc import Sequence

from client_sdk.templates import MOST_KEPT_BYTES, usable
from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.batches import Columns, SpaceCodec
from policy_server.requests import Group

_MAX_TEMPLATES = 64
"""Of different numbers of rows."""


class AnswerEncoder:
    """Knows the action space, and keeps the answers that are alike but for their actions."""

    def __init__(self, actions: SpaceCodec) -> None:
        self._actions = actions
        self._refills = usable(actions)
        self._templates: dict[int, _Template] = {}

    def stream_response(self, number: int, groups: Sequence[Group]) -> bytes:
        """The serialized ``StreamActResponse`` to request ``number``.

        Raises:
            Fault: The policy's actions are not of the action space.
        """
        if len(groups) == 1:
            (group,) = groups
            batch = group.batch
            # What nearly every message is: rows that were all asked and all answered.
            if (
                batch is not None
                and group.indices is None
                and group.substitute is None
                and not group.faults
                and self._refills
            ):
                n = len(group.tracks)
                template = self._templates.get(n) or self._template(n)
                columns = batch.env_actions if group.whole else _part(group)
                data = template.fill(number, batch.policy.version, columns)
                if data is not None:
                    return data
        response = pb.StreamActResponse(request=number)
        self.fill(groups, response.act)
        return response.SerializeToString()

    def _template(self, n: int) -> _Template:
        if len(self._templates) >= _MAX_TEMPLATES:
            self._templates.clear()
        template = self._templates[n] = _Template(self._actions, n)
        return template

    def fill(self, groups: Sequence[Group], response: pb.ActResponse) -> None:
        """Write answered groups into an empty response.

        Raises:
            Fault: The policy's actions are not of the action space.
        """
        for group in groups:
            self._fill_group(group, response.groups.add())

    def _fill_group(self, group: Group, message: pb.ActionRows) -> None:
        batch = group.batch
        columns: Columns = {}
        if batch is not None and group.substitute is None:
            message.policy_version = batch.policy.version
            columns = _part(group)
            if group.indices is not None or group.faults:
                answered, columns = columns, self._actions.zeros(len(group.episodes))
                for path, values in answered.items():
                    columns[path][... if group.indices is None else group.indices] = values
        elif group.repeats:
            columns = self._actions.zeros(len(group.episodes))
        for index, track, known in group.repeats:
            # A row that was queued when it was repeated has been answered meanwhile.
            if (last := known or track.last) is not None:
                batch, row = last
                message.policy_version = max(message.policy_version, batch.policy.version)
                for path, values in batch.env_actions.items():
                    columns[path][index] = values[row]
        if columns:
            self._actions.encode(columns, message.actions)
        for index, fault in sorted(group.faults.items()):
            message.faults.add(index=index, error=fault.to_detail())


def _part(group: Group) -> Columns:
    """The group's rows of its inference: ``[M, ...]`` by leaf."""
    batch, stop = group.batch, group.start + len(group.tracks)
    if batch is None:
        return {}
    return {path: values[group.start : stop] for path, values in batch.env_actions.items()}


class _Template:
    """An answer with one group of n actions, serialized again and again with other numbers."""

    def __init__(self, actions: SpaceCodec, n: int) -> None:
        self._actions = actions
        self._zeros = actions.zeros(n)
        self._make()

    def _make(self) -> None:
        self._message = pb.StreamActResponse()
        self._group = self._message.act.groups.add()
        self._actions.encode(self._zeros, self._group.actions)
        self._kept = 0
        # These stay parts of the message.
        self._tensors = [
            (path, self._group.actions.leaves[path], column.dtype, column.shape)
            for path, column in self._zeros.items()
        ]

    def fill(self, number: int, policy_version: int, columns: Columns) -> bytes | None:
        """The serialized response; None where a column has to be cast, or refused."""
        self._message.request = number
        self._group.policy_version = policy_version
        for path, tensor, dtype, shape in self._tensors:
            column = columns[path]
            if column.dtype != dtype or column.shape != shape:
                return None
            tensor.data = column.tobytes()
        data = self._message.SerializeToString()
        self._kept += len(data)
        if self._kept > MOST_KEPT_BYTES:
            self._make()
        return data
