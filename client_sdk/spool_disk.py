"""``SpoolDisk``: the part of a spool that memory does not hold, in unnamed files: a kill leaves nothing.

Touched under the spool's lock alone, but for reading.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import IO, Final

_SEGMENT_BYTES: Final = 16 * 2**20
"""Of one file, about."""


class SpoolDisk:
    """Keeps bytes in a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._segment: _Segment | None = None  # that is appended to

    def prepare(self) -> None:
        """Make the directory, if it is not there.

        Raises:
            OSError: It cannot be.
        """
        self.directory.mkdir(parents=True, exist_ok=True)

    def store(self, data: bytes) -> Stored:
        """Keep those bytes.

        Raises:
            OSError: The disk does not take them.
        """
        if self._segment is None or self._segment.size_bytes >= _SEGMENT_BYTES:
            self.prepare()
            fresh = _Segment(self.directory)
            self.close()
            self._segment = fresh
        return Stored(self._segment, self._segment.append(data), len(data))

    def close(self) -> None:
        """Nothing more is stored; what is stays until it is released."""
        if self._segment is not None:
            self._segment.retire()
            self._segment = None


class Stored:
    """Bytes on disk, until they are released."""

    __slots__ = ("_offset", "_segment", "_size")

    def __init__(self, segment: _Segment, offset: int, size: int) -> None:
        self._segment = segment
        self._offset = offset
        self._size = size

    def read(self) -> bytes:
        """The bytes.

        Raises:
            OSError: The disk does not give them back.
        """
        return self._segment.read(self._offset, self._size)

    def release(self) -> None:
        """They are not needed any more."""
        self._segment.release()


class _Segment:
    """An unnamed file, gone when it is full and the last of what it holds is released."""

    def __init__(self, directory: Path) -> None:
        # Closed by release().
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115
        self._entries = 0
        self.size_bytes = 0
        self.retired = False
        """Nothing is appended any more."""

    def append(self, data: bytes) -> int:
        offset = self.size_bytes
        view = memoryview(data)
        while view:
            written = os.pwrite(self._file.fileno(), view, self.size_bytes)
            view = view[written:]
            self.size_bytes += written
        self._entries += 1
        return offset

    def read(self, offset: int, size: int) -> bytes:
        data = os.pread(self._file.fileno(), size, offset)
        if len(data) != size:
            raise OSError(f"expected {size} bytes, got {len(data)}")
        return data

    def release(self) -> None:
        self._entries -= 1
        if self.retired and not self._entries:
            self._file.close()

    def retire(self) -> None:
        self.retired = True
        if not self._entries:
            self._file.close()
