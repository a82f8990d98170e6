"""Requests of running rows that differ only in their numbers: made once, refilled for each step.

Making messages anew costs several times as much as everything else that a client does for a step.
Owned by one ``Exchange``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.tensors import wire_dtype

if TYPE_CHECKING:
    from client_sdk.rows import Rows
    from client_sdk.wire.batches import SpaceCodec


MOST_KEPT_BYTES = 1 << 20
"""Protobuf frees what a field held before only with the whole message: after so much, make another."""


def usable(codec: SpaceCodec) -> bool:
    """Whether columns may be copied as they lie in memory: the wire is little-endian."""
    dtypes = [codec.leaf(path).dtype for path in codec.paths]
    return all(wire_dtype(dtype) == dtype for dtype in dtypes)


class RowsTemplate:
    """A request of N running rows, each with an observation and a reward and nothing else."""

    def __init__(self, session_id: str, codec: SpaceCodec, n: int) -> None:
        self._session_id = session_id
        self._codec = codec
        self._n = n
        self._zeros = [0.0] * n
        self._make()

    def _make(self) -> None:
        codec, n = self._codec, self._n
        self._message = message = pb.StreamActRequest()
        message.act.session_id = self._session_id
        group = message.act.groups.add()
        self._numbers: list[int] = []  # of the episodes that are in the message
        self._kept = 0
        group.episodes.extend([0] * n)
        group.steps.extend([0] * n)
        group.rewards.extend(self._zeros)
        codec.encode(codec.zeros(n), group.observations)
        # These stay parts of the message.
        self._episodes, self._steps, self._rewards = group.episodes, group.steps, group.rewards
        self._tensors = [(path, group.observations.leaves[path]) for path in codec.paths]

    def fill(self, number: int, rows: Rows) -> bytes:
        """The serialized request.

        Args:
            number: Of the request.
            rows: N plain rows, their columns checked by the codec.
        """
        columns = rows.observations
        if columns is None:
            raise TypeError("plain rows have observations")
        message = self._message
        message.request = number
        if rows.episodes != self._numbers:
            self._episodes[:] = self._numbers = rows.episodes
        self._steps[:] = rows.steps
        self._rewards[:] = rows.rewards or self._zeros
        for path, tensor in self._tensors:
            tensor.data = columns[path].tobytes()
        data = message.SerializeToString()
        self._kept += len(data)
        if self._kept > MOST_KEPT_BYTES:
            self._make()
        return data
