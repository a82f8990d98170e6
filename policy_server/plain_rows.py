"""``PlainRowReader``: requests for the next action of one running episode, read by their places.

Loop thread only; one for each stream.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from client_sdk.answers import leading_number
from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.batches import Columns, SpaceCodec
from client_sdk.wire.layouts import FixedLayout

_MOST_BYTES = 64 * 1024
"""Of an observation. To parse more is little beside receiving it, and a layout takes several times as
much."""

_MOST_VARINT_BYTES = 4
"""Of a number that is read by its place: up to 2^28."""

_PARSED_BETWEEN_LESSONS = 64
"""Requests, at least: a lesson costs as much as parsing about so many."""

_DOUBLE = struct.Struct("<d")


class PlainRow(NamedTuple):
    """What such a request says."""

    request: int
    """The client's own number."""
    episode: int
    step: int
    reward: float
    observations: Columns
    """Of the one row; their values are not checked."""


class PlainRowReader:
    """Reads the requests that look like one that was parsed before.

    Nearly all that a stream of one environment brings differs from the request before in its numbers
    and in the observation alone. Where the size is the same, so are their places; to see that it is
    so, and to take them, costs half of parsing them and of checking what was parsed::

        row = reader.read(data)
        if row is None:
            ...  # parse it
            reader.learn(message)
    """

    def __init__(self, observations: SpaceCodec) -> None:
        self._observations = observations
        sizes = observations.byte_sizes(1)
        self._can_learn = observations.is_plain and all(sizes) and 0 < sum(sizes) <= _MOST_BYTES
        self._known: dict[int, _Places] = {}  # by the size of what follows the request's number
        self._lesson_in = 0

    def read(self, data: bytes) -> PlainRow | None:
        """What a request says; None: it must be parsed.

        Args:
            data: From anyone; nothing about it is taken for granted.
        """
        request, start = leading_number(data)
        places = self._known.get(len(data) - start)
        if places is None:
            return None
        rest = data[start:]
        if not places.layout.fits(rest):
            return None
        episode, step = _number(rest, *places.episode), _number(rest, *places.step)
        if episode < 0 or step < 0:
            return None
        (reward,) = _DOUBLE.unpack_from(rest, places.reward)
        columns = self._observations.from_bytes(rest, places.leaves, 1)
        return PlainRow(request, episode, step, reward, columns)

    def learn(self, message: pb.StreamActRequest) -> None:
        """Know requests like this one from now on, which had to be parsed and was in order."""
        self._lesson_in -= 1
        if self._lesson_in >= 0 or not self._can_learn or len(message.act.groups) != 1:
            return
        group = message.act.groups[0]
        if not len(group.episodes) == len(group.steps) == len(group.rewards) == 1:
            return
        sizes = _varint_size(group.episodes[0]), _varint_size(group.steps[0])
        if max(sizes) <= _MOST_VARINT_BYTES:
            places = _places(message.act.session_id, sizes, self._observations)
            self._known[places.layout.size] = places
            self._lesson_in = _PARSED_BETWEEN_LESSONS

    def forget(self) -> None:
        """What was learnt was for another session."""
        self._known.clear()
        self._lesson_in = 0


class _Places(NamedTuple):
    """Where what follows the request's number has its values, in one session."""

    layout: FixedLayout
    episode: tuple[int, int]
    """From, to."""
    step: tuple[int, int]
    reward: int
    leaves: tuple[int, ...]


def _places(session_id: str, sizes: Sequence[int], codec: SpaceCodec) -> _Places:
    """They are found by comparing messages that differ in one value each."""

    def request(episode: int, step: int, reward: float, columns: Columns) -> pb.StreamActRequest:
        message = pb.StreamActRequest()
        message.act.session_id = session_id
        group = message.act.groups.add()
        group.episodes.append(episode)
        group.steps.append(step)
        group.rewards.append(reward)
        codec.encode(columns, group.observations)
        return message

    zeros, *others = codec.specimens(1)
    (episode, other_episode), (step, other_step) = map(_two_of, sizes)
    (all_bits,) = _DOUBLE.unpack(b"\xff" * _DOUBLE.size)
    layout = FixedLayout(
        request(episode, step, 0.0, zeros),
        [
            request(other_episode, step, 0.0, zeros),
            request(episode, other_step, 0.0, zeros),
            request(episode, step, all_bits, zeros),
            *(request(episode, step, 0.0, columns) for columns in others),
        ],
        [*sizes, _DOUBLE.size, *codec.byte_sizes(1)],
    )
    at_episode, at_step, at_reward, *leaves = layout.offsets
    ends = at_episode + sizes[0], at_step + sizes[1]
    return _Places(layout, (at_episode, ends[0]), (at_step, ends[1]), at_reward, tuple(leaves))


def _varint_size(number: int) -> int:
    return max((number.bit_length() + 6) // 7, 1)


def _two_of(size: int) -> tuple[int, int]:
    """Numbers whose varints have that size, and differ in each byte."""
    ones = sum(1 << 7 * place for place in range(size))
    return ones, 2 * ones


def _number(data: bytes, start: int, stop: int) -> int:
    """The varint that goes from there to there; -1: none does."""
    number = data[stop - 1]
    if number > 127:
        return -1
    for place in range(stop - 2, start - 1, -1):
        byte = data[place]
        if byte < 128:
            return -1
        number = number << 7 | byte & 127
    return number
