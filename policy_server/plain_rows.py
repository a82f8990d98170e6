"""``PlainRowReader``: requests for the next action of one running episode, read by their places.

Loop thread only; one for each stream.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple

from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.batches import Columns, SpaceCodec
from client_sdk.wire.layouts import FixedLayout
from policy_server.requests import Group, fields_of

_MOST_BYTES = 64 * 1024
"""Of an observation. To parse more is little beside receiving it, and a layout takes several times as
much."""

_MOST_VARINT_BYTES = 4
"""Of a number that is read by its place: up to 2^28."""

_PARSED_BETWEEN_LESSONS = 16
"""Requests, at least: a lesson costs what so many are spared."""

_DOUBLE = struct.Struct("<d")


class PlainRowReader:
    """Reads the requests that look like one that was parsed before.

    Nearly all that a stream of one environment brings differs from the request before in its numbers
    and in the observation alone. Where the size is the same, so are their places; to see that it is
    so, and to take them, costs half of parsing them and of checking what was parsed::

        plain = reader.read(data)
        if plain is None:
            ...  # parse it
            reader.learn(message)
    """

    def __init__(self, observations: SpaceCodec) -> None:
        self._observations = observations
        sizes = observations.byte_sizes(1)
        self._can_learn = observations.is_plain and all(sizes) and 0 < sum(sizes) <= _MOST_BYTES
        self._known: dict[int, _Places] = {}  # by the size of the request
        self._lesson_in = 0

    def read(self, data: bytes) -> tuple[int, Group] | None:
        """A request's own number, and its row; None: it must be parsed.

        Args:
            data: From anyone; nothing about it is taken for granted. The row's values are not
                checked.
        """
        places = self._known.get(len(data))
        if places is None or not places.layout.fits(data):
            return None
        numbers = _numbers(data, places.numbers)
        if numbers is None:
            return None
        request, episode, step = numbers
        (reward,) = _DOUBLE.unpack_from(data, places.reward)
        group = Group(fields_of(0), [episode], [step], [reward])
        group.observations = places.columns_in(data)
        return request, group

    def learn(self, message: pb.StreamActRequest) -> None:
        """Know requests like this one from now on, which had to be parsed and was in order."""
        self._lesson_in -= 1
        if self._lesson_in >= 0 or not self._can_learn or len(message.act.groups) != 1:
            return
        group = message.act.groups[0]
        if not len(group.episodes) == len(group.steps) == len(group.rewards) == 1:
            return
        numbers = message.request, group.episodes[0], group.steps[0]
        sizes = [_varint_size(number) for number in numbers]
        if message.request and max(sizes) <= _MOST_VARINT_BYTES:
            places = _places(message.act.session_id, sizes, self._observations)
            self._known[places.layout.size] = places
            self._lesson_in = _PARSED_BETWEEN_LESSONS

    def forget(self) -> None:
        """What was learnt was for another session."""
        self._known.clear()
        self._lesson_in = 0


class _Places(NamedTuple):
    """Where requests of one session and size have their values."""

    layout: FixedLayout
    numbers: list[tuple[int, int]]
    """First and last byte of the request's number, the episode and the step."""
    reward: int
    columns_in: Callable[[bytes], Columns]
    """Finds the observation."""


def _places(session_id: str, sizes: list[int], codec: SpaceCodec) -> _Places:
    """They are found by comparing messages that differ in one value each."""

    def request(numbers: list[int], reward: float, columns: Columns) -> pb.StreamActRequest:
        message = pb.StreamActRequest(request=numbers[0])
        message.act.session_id = session_id
        group = message.act.groups.add()
        group.episodes.append(numbers[1])
        group.steps.append(numbers[2])
        group.rewards.append(reward)
        codec.encode(columns, group.observations)
        return message

    zeros, *others = codec.specimens(1)
    # Of those sizes, and of others in each byte.
    ones, twos = ([sum(bits << 7 * i for i in range(size)) for size in sizes] for bits in (1, 2))
    (all_bits,) = _DOUBLE.unpack(b"\xff" * _DOUBLE.size)
    layout = FixedLayout(
        request(ones, 0.0, zeros),
        [
            *(request([*ones[:i], twos[i], *ones[i + 1 :]], 0.0, zeros) for i in range(len(ones))),
            request(ones, all_bits, zeros),
            *(request(ones, 0.0, columns) for columns in others),
        ],
        [*sizes, _DOUBLE.size, *codec.byte_sizes(1)],
    )
    starts, (reward, *leaves) = layout.offsets[:3], layout.offsets[3:]
    numbers = [(start, start + size - 1) for start, size in zip(starts, sizes, strict=True)]
    return _Places(layout, numbers, reward, codec.columns_in(leaves, 1))


def _varint_size(number: int) -> int:
    return max((number.bit_length() + 6) // 7, 1)


def _numbers(data: bytes, places: list[tuple[int, int]]) -> list[int] | None:
    """The varints that fill those places; None: some do not."""
    numbers = []
    for first, last in places:
        number = data[last]
        if number > 127:
            return None
        place = last
        while place > first:
            place -= 1
            byte = data[place]
            if byte < 128:
                return None
            number = number << 7 | byte & 127
        numbers.append(number)
    return numbers
