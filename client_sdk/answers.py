"""``AnswerReader``: the actions in an answer that is like one before but for its number and them.

No I/O. Owned by one ``Exchange``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.batches import Columns, SpaceCodec
from client_sdk.wire.layouts import FixedLayout

_MAX_KNOWN = 8
"""Of different numbers of rows."""

_MOST_BYTES = 1 << 20
"""Of actions. To parse more is little beside sending it, and a layout takes a few times as much."""

_NUMBER_BEGINS = pb.StreamActResponse(request=1).SerializeToString()[0]


def leading_number(data: bytes) -> tuple[int, int]:
    """The request's number where an answer begins with it, and where the rest begins.

    Returns:
        Twice 0: it does not, or has no actions.
    """
    if len(data) < 10 or data[0] != _NUMBER_BEGINS:
        return 0, 0
    byte = data[1]
    number, end = byte & 0x7F, 2
    while byte > 0x7F and end < 10:
        byte = data[end]
        number |= (byte & 0x7F) << 7 * end - 7
        end += 1
    return (number, end) if byte <= 0x7F else (0, 0)


class _Known(NamedTuple):
    """What plain answers of n actions look like under one policy version."""

    layout: FixedLayout
    """Of what follows the number."""
    columns_in: Callable[[bytes], Columns]
    """Finds the actions there."""
    policy_version: int


class AnswerReader:
    """Reads answers that have one group of actions and nothing else, as nearly all have.

    Under one policy version they differ in the request's number and the actions' own bytes. To see
    that it is so, and to take those, costs a fraction of parsing them::

        number, start = leading_number(data)
        found = reader.read(data, start, n)
        if found is None:
            ...  # parse it; if it has actions and no faults:
            reader.learn(data, n, policy_version)
    """

    def __init__(self, actions: SpaceCodec) -> None:
        self._actions = actions
        self._known: dict[int, _Known] = {}  # by n
        self._can_learn = actions.is_plain and all(actions.byte_sizes(1))

    def read(self, data: bytes, start: int, n: int) -> tuple[Columns, int] | None:
        """The n actions in an answer, and the policy version; None: it must be parsed.

        Args:
            data: From anyone; nothing about it is taken for granted.
            start: Where its rest begins: see ``leading_number``.
            n: How many there must be.

        Returns:
            Columns that are read-only views of bytes, and the version.
        """
        known = self._known.get(n)
        if known is None:
            return None
        layout, columns_in, policy_version = known
        rest = data[start:]
        return (columns_in(rest), policy_version) if layout.fits(rest) else None

    def learn(self, data: bytes, n: int, policy_version: int) -> None:
        """Know answers like this one from now on; it was parsed, and had n actions, no faults."""
        codec = self._actions
        sizes = codec.byte_sizes(n)
        if not self._can_learn or n == 0 or sum(sizes) > _MOST_BYTES:
            return
        message, *variants = (
            _message(codec, columns, policy_version) for columns in codec.specimens(n)
        )
        layout = FixedLayout(message, variants, sizes)
        if not layout.fits(data[leading_number(data)[1] :]):
            # Its server writes them in another way: no need to find that out again each time.
            self._can_learn = False
            return
        if len(self._known) >= _MAX_KNOWN:
            self._known.clear()
        self._known[n] = _Known(layout, codec.columns_in(layout.offsets, n), policy_version)


def _message(codec: SpaceCodec, columns: Columns, policy_version: int) -> pb.StreamActResponse:
    message = pb.StreamActResponse()
    group = message.act.groups.add()
    codec.encode(columns, group.actions)
    group.policy_version = policy_version
    return message
