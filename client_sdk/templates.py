"""Requests of running rows that differ only in their numbers: made once, refilled for each step.

Making messages anew costs several times as much as everything else that a client does for a step.
Owned by one ``Exchange``.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.tensors import wire_dtype

if TYPE_CHECKING:
    from client_sdk.rows import Rows
    from client_sdk.wire.batches import SpaceCodec


def usable(codec: SpaceCodec) -> bool:
    """Whether columns may be copied as they lie in memory: the wire is little-endian."""
    dtypes = [codec.leaf(path).dtype for path in codec.paths]
    return all(wire_dtype(dtype) == dtype for dtype in dtypes)


class RowsTemplate:
    """A request of N running rows, each with an observation and a reward and nothing else."""

    def __init__(self, session_id: str, codec: SpaceCodec, n: int) -> None:
        self._message = message = pb.StreamActRequest()
        message.act.session_id = session_id
        group = message.act.groups.add()
        self._zeros = [0.0] * n
        self._numbers: list[int] = []  # of the episodes that are in the message
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
        return message.SerializeToString()


def varint(number: int) -> bytes:
    """A number from 0 up, as protobuf writes it."""
    if number < 1 << 7:
        return bytes((number,))
    if number < 1 << 14:
        return bytes((number & 0x7F | 0x80, number >> 7))
    return bytes((number & 0x7F | 0x80,)) + varint(number >> 7)


def _begin(field: int) -> bytes:
    """What begins a field of bytes; how many there are comes next."""
    return varint(field << 3 | 2)


_NUMBER = varint(pb.StreamActRequest.REQUEST_FIELD_NUMBER << 3)
_ACT = _begin(pb.StreamActRequest.ACT_FIELD_NUMBER)
_GROUP = _begin(pb.ActRequest.GROUPS_FIELD_NUMBER)
_EPISODES = _begin(pb.StepRows.EPISODES_FIELD_NUMBER)
_STEPS = _begin(pb.StepRows.STEPS_FIELD_NUMBER)
_REWARDS = _begin(pb.StepRows.REWARDS_FIELD_NUMBER) + varint(8)
_OBSERVATIONS = _begin(pb.StepRows.OBSERVATIONS_FIELD_NUMBER)


class RowTemplate:
    """As ``RowsTemplate``, for a single row: put together from bytes, those that protobuf writes.

    To fill a message would cost more than all else that happens before the row is sent.
    """

    def __init__(self, session_id: str, codec: SpaceCodec) -> None:
        self._session = pb.ActRequest(session_id=session_id).SerializeToString()
        self._pack = struct.Struct(f"<{len(_REWARDS)}sd").pack
        heads, sizes = _heads_of_leaves(codec), codec.byte_sizes(1)
        size = sum(map(len, heads)) + sum(sizes)
        heads[0] = _OBSERVATIONS + varint(size) + heads[0]
        self._leaves = list(zip(codec.paths, heads, strict=True))
        # Of everything behind the step.
        self._tail_size = len(_REWARDS) + 8 + sum(map(len, heads)) + sum(sizes)
        # What the head, from behind the number to before the step, was written for.
        self._episode, self._steps = 0, range(0)
        self._head = b""

    def fill(self, number: int, rows: Rows) -> bytes:
        """The serialized request.

        Args:
            number: Of the request.
            rows: One plain row, its columns checked by the codec.
        """
        columns = rows.observations
        if columns is None:
            raise TypeError("plain rows have observations")
        (episode,), (step,) = rows.episodes, rows.steps
        if episode != self._episode or step not in self._steps:
            self._write_head(episode, step)
        reward = self._pack(_REWARDS, rows.rewards[0] if rows.rewards else 0.0)
        parts = [_NUMBER, varint(number), self._head, varint(step), reward]
        for path, head in self._leaves:
            parts += head, columns[path].tobytes()
        return b"".join(parts)

    def _write_head(self, episode: int, step: int) -> None:
        """For that episode, and steps that take as many bytes as this one."""
        number, step_size = varint(episode), len(varint(step))
        behind = step_size + self._tail_size
        row = b"".join((_EPISODES, varint(len(number)), number, _STEPS, varint(step_size)))
        act = b"".join((self._session, _GROUP, varint(len(row) + behind), row))
        self._head = _ACT + varint(len(act) + behind) + act
        self._episode = episode
        self._steps = range(1 << 7 * (step_size - 1) if step_size > 1 else 0, 1 << 7 * step_size)


def _heads_of_leaves(codec: SpaceCodec) -> list[bytes]:
    """What stands before each leaf's bytes in the message of one value; with them the leaf ends."""
    batch = pb.Batch()
    codec.encode(codec.zeros(1), batch)
    heads = []
    for path, size in zip(codec.paths, codec.byte_sizes(1), strict=True):
        leaf = pb.Batch(leaves={path: batch.leaves[path]}).SerializeToString()
        heads.append(leaf[: len(leaf) - size])
    return heads
