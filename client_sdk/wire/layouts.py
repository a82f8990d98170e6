"""``FixedLayout``: serialized messages that are alike but for some bytes, whose places are known.

Immutable once built; any thread.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
from google.protobuf.message import Message


class FixedLayout:
    """Puts values into a serialized message, and finds them in one, without building the message.

    Where every value has a fixed size, messages differ in nothing but the values' own bytes. Going
    through them field by field costs more than all else that a step of an environment needs.

    Attributes:
        size: Of every such message, in bytes.
        offsets: Where each value begins.
    """

    __slots__ = ("_fixed", "_fixed_in", "_in_order", "_order", "_parts", "offsets", "size")

    def __init__(self, message: Message, variants: Sequence[Message], sizes: Sequence[int]) -> None:
        """Find the places.

        Args:
            message: Any such message.
            variants: For each value the same message with another one: each of its bytes differs,
                and nothing else.
            sizes: Of each value in bytes.

        Raises:
            ValueError: A value is not found: it is empty, or of no fixed size.
        """
        # Deterministic: else the entries of a map come in any order.
        data = message.SerializeToString(deterministic=True)
        self.size = len(data)
        self.offsets = tuple(
            _place(data, variant.SerializeToString(deterministic=True), size)
            for variant, size in zip(variants, sizes, strict=True)
        )
        self._order = sorted(range(len(sizes)), key=self.offsets.__getitem__)
        self._in_order = self._order == [*range(len(sizes))]
        starts = [self.offsets[value] for value in self._order]
        stops = [self.offsets[value] + sizes[value] for value in self._order]
        gaps = list(zip((0, *stops), (*starts, self.size), strict=True))
        self._fixed = tuple(data[start:stop] for start, stop in gaps)
        # With a place for each value between them.
        self._parts: list[bytes | memoryview] = [b""] * (2 * len(gaps) - 1)
        self._parts[0::2] = self._fixed
        # Takes all that is fixed at once: piece by piece would cost as much as parsing.
        values = [f"{sizes[value]}x" for value in self._order]
        self._fixed_in = struct.Struct(
            "".join(
                f"{stop - start}s{value}"
                for (start, stop), value in zip(gaps, [*values, ""], strict=True)
            )
        ).unpack

    def join(self, values: Sequence[bytes | memoryview]) -> bytes:
        """The serialized message with these values, each of its size."""
        parts = self._parts.copy()
        parts[1::2] = values if self._in_order else [values[value] for value in self._order]
        return b"".join(parts)

    def fits(self, data: bytes) -> bool:
        """Whether that is such a message, with values at ``offsets``."""
        return len(data) == self.size and self._fixed_in(data) == self._fixed


def _place(data: bytes, variant: bytes, size: int) -> int:
    if len(data) != len(variant):
        raise ValueError("the size of these messages depends on their values")
    differing = np.flatnonzero(np.frombuffer(data, np.uint8) != np.frombuffer(variant, np.uint8))
    if len(differing) != size or size == 0 or differing[-1] - differing[0] != size - 1:
        raise ValueError(f"no value of {size} bytes is what these messages differ in")
    return int(differing[0])
