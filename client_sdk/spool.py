"""``Spool``: chunks on their way to the server, in order, within bounds.

Whoever acts adds; the uploader takes, and removes what the server has delivered. One lock, held for
moments. Kept in memory, and what is more than ``MEMORY_BYTES`` on disk if there is a directory.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Container, Iterable, Sequence
from pathlib import Path
from typing import Final

from client_sdk.chunks import CutChunk
from client_sdk.log import logger
from client_sdk.rows import Numbering
from client_sdk.spool_disk import SpoolDisk, Stored

MEMORY_BYTES: Final = 32 * 2**20
"""So much stays in memory where there is a directory for the rest."""
TAKEN_SHARE: Final = 0.25
"""Of the bound, for what the server has but has not delivered; it is most probably safe there."""


class Entry:
    """One chunk, until the server has delivered it.

    Attributes:
        chunk: What it is; its ``data`` is empty while it is on disk.
        size_bytes: Of the encoded chunk.
        sequence: Its number in the session, once it is sent.
        episode: The number of its episode there.
        starts: It is the first of that episode there.
        sent: Some server may know it.
    """

    __slots__ = (
        "_place",
        "chunk",
        "episode",
        "sent",
        "sequence",
        "size_bytes",
        "starts",
    )

    def __init__(self, chunk: CutChunk) -> None:
        self.chunk = chunk
        self.size_bytes = len(chunk.data)
        self.sequence = 0
        self.episode = 0
        self.starts = False
        self.sent = False
        self._place: Stored | None = None

    def data(self) -> bytes:
        """The encoded chunk.

        Raises:
            OSError: The disk does not give it back.
        """
        return self.chunk.data if self._place is None else self._place.read()

    def move(self, disk: SpoolDisk) -> None:
        """Keep the encoded chunk on disk.

        Raises:
            OSError: The disk does not take it; it stays in memory.
        """
        self._place = disk.store(self.chunk.data)
        self.chunk.data = b""

    def forget(self) -> None:
        """It is not needed any more."""
        if self._place is not None:
            self._place.release()

    @property
    def on_disk(self) -> bool:
        """Whether its memory is free."""
        return self._place is not None


class Spool:
    """A bounded queue of chunks: waiting, on their way, taken by the server, delivered.

    Args:
        limit_bytes: More than that is never kept; the oldest goes first.
        directory: For what does not fit into memory; None: memory alone.
        dropped: Told, under the lock, which chunks are lost; what the server has already is not.
    """

    def __init__(
        self,
        limit_bytes: int,
        directory: Path | None,
        dropped: Callable[[Sequence[CutChunk]], None],
    ) -> None:
        self._limit_bytes = limit_bytes
        self._disk = None if directory is None else SpoolDisk(directory)
        self._memory_limit = limit_bytes if directory is None else min(limit_bytes, MEMORY_BYTES)
        self._dropped = dropped
        # Reentrant, as ``Guard``'s is, for the same reason.
        self._lock = threading.RLock()
        # Oldest first, the three queues one behind the other.
        self._taken: deque[Entry] = deque()
        self._in_flight: list[Entry] = []
        self._waiting: deque[Entry] = deque()
        self._bytes = 0
        self._taken_bytes = 0
        self._memory_bytes = 0
        self._steps = 0
        self._taken_steps = 0
        self._session = 1
        self._next_sequence = 1
        self._numbering = Numbering()
        self._disk_failed = False
        self._closed = False
        self.added = 0
        """Chunks so far."""
        if self._disk is not None:
            try:
                self._disk.prepare()
            except OSError as error:
                self._tell_of(self._disk, error)

    @property
    def size_bytes(self) -> int:
        """Of everything kept, delivered or not."""
        return self._bytes

    @property
    def untaken(self) -> int:
        """How many chunks the server does not have."""
        return len(self._in_flight) + len(self._waiting)

    @property
    def waiting(self) -> int:
        """How many have not been sent."""
        return len(self._waiting)

    @property
    def settled(self) -> int:
        """How many of the added chunks need not be sent any more: taken, refused or lost."""
        return self.added - self.untaken

    def untaken_steps(self) -> int:
        """Likewise, in steps."""
        with self._lock:
            return self._steps - self._taken_steps

    def add(self, chunks: Iterable[CutChunk]) -> None:
        """Keep chunks, and forget the oldest ones if they are too many."""
        with self._lock:
            if self._closed:
                return
            for chunk in chunks:
                entry = Entry(chunk)
                self._bytes += entry.size_bytes
                self._steps += chunk.steps
                fits = self._memory_bytes + entry.size_bytes <= self._memory_limit
                if fits or not self._store(entry):
                    self._memory_bytes += entry.size_bytes
                self._waiting.append(entry)
                self.added += 1
            if self._too_much():
                while self._taken and self._too_much():
                    self._release_taken()
                self._lose(self._shed_waiting())

    def take(self, limit_bytes: int, limit_steps: int) -> list[Entry]:
        """The next chunks to send, numbered; the same ones again until there is an answer.

        Args:
            limit_bytes: Of all of them together; one that is larger comes alone.
            limit_steps: Likewise.
        """
        with self._lock:
            if not self._in_flight:
                self._choose(limit_bytes, limit_steps)
            return list(self._in_flight)

    def answered(self, accepted_sequence: int, delivered_sequence: int) -> int:
        """The server has taken chunks up to a number, and handed over those up to another.

        Returns:
            How many steps were newly taken.
        """
        with self._lock:
            taken = [entry for entry in self._in_flight if entry.sequence <= accepted_sequence]
            self._note_taken(taken)
            del self._in_flight[: len(taken)]
            self._forget_delivered(delivered_sequence)
            while self._taken_bytes > self._limit_bytes * TAKEN_SHARE:
                self._release_taken()
            return sum(entry.chunk.steps for entry in taken)

    def refused(self, sequences: Container[int]) -> int:
        """The server wants none of these chunks, nor what follows them in their episodes.

        What is recorded from now on goes to the server as other episodes.

        Args:
            sequences: Their numbers, of those on their way.

        Returns:
            How many chunks are lost.
        """
        with self._lock:
            refused = [entry for entry in self._in_flight if entry.sequence in sequences]
            unwanted = {entry.chunk.lineage for entry in refused}
            rest = [entry for entry in self._waiting if entry.chunk.lineage in unwanted]
            gone = {*refused, *rest}
            self._in_flight = [entry for entry in self._in_flight if entry not in gone]
            if rest:
                self._waiting = deque(entry for entry in self._waiting if entry not in gone)
            for entry in gone:
                self._release(entry)
            self._lose([*refused, *rest])
            return len(gone)

    def rejected(self) -> int:
        """The request on its way as a whole was none: its numbers are free again.

        Returns:
            How many chunks are lost.
        """
        with self._lock:
            lost, self._in_flight = self._in_flight, []
            if lost:
                self._next_sequence = lost[0].sequence
            for entry in lost:
                self._release(entry)
            self._lose(lost)
            return len(lost)

    def another_session(self, delivered_sequence: int) -> None:
        """Nobody knows these chunks any more: they will be offered again, under other numbers.

        Args:
            delivered_sequence: What the session before has handed over.
        """
        with self._lock:
            # What was on its way may have arrived, and only the answer was lost.
            self._note_taken(self._in_flight)
            self._in_flight.clear()
            self._forget_delivered(delivered_sequence)
            self._waiting.extendleft(reversed(self._taken))
            self._taken.clear()
            self._taken_bytes = self._taken_steps = 0
            self._session += 1
            self._next_sequence = 1

    def close(self) -> None:
        """Forget everything, lost or not."""
        with self._lock:
            self._closed = True
            for entry in (*self._taken, *self._in_flight, *self._waiting):
                self._release(entry)
            self._taken.clear()
            self._taken_bytes = self._taken_steps = 0
            self._in_flight.clear()
            self._waiting.clear()
            if self._disk is not None:
                self._disk.close()

    # -- under the lock ------------------------------------------------------------------------

    def _choose(self, limit_bytes: int, limit_steps: int) -> None:
        """Number what comes next, within the limits."""
        while self._waiting:
            entry = self._waiting[0]
            chunk, lineage = entry.chunk, entry.chunk.lineage
            known = lineage.session == self._session and lineage.next_step == chunk.first_step
            if not chunk.steps and not known:  # the server has nothing of it to take back
                self._release(self._waiting.popleft())
                continue
            limit_bytes -= entry.size_bytes
            limit_steps -= chunk.steps
            if self._in_flight and (limit_bytes < 0 or limit_steps < 0):
                return
            if not known:
                # What was on its way may have been learnt from, and its return reported.
                lineage.resumed = lineage.resumed or entry.sent or chunk.first_step > 0
                lineage.session, lineage.number = self._session, self._numbering.take()
            lineage.next_step = chunk.first_step + chunk.steps
            entry.episode, entry.starts, entry.sent = lineage.number, not known, True
            entry.sequence, self._next_sequence = self._next_sequence, self._next_sequence + 1
            self._in_flight.append(self._waiting.popleft())

    def _store(self, entry: Entry) -> bool:
        """Put a new chunk on disk; False: it has to stay in memory."""
        if self._disk is None:
            return False
        try:
            entry.move(self._disk)
        except OSError as error:
            self._tell_of(self._disk, error)
            return False
        return True

    def _tell_of(self, disk: SpoolDisk, error: OSError) -> None:
        """Warn, once, that memory is all there is."""
        if self._disk_failed:
            return
        self._disk_failed = True
        logger.warning(
            "cannot keep experience in %s (%s): what does not fit into %d MiB of memory is lost, the "
            "oldest first",
            disk.directory,
            error.strerror or error,
            self._memory_limit // 2**20,
        )

    def _too_much(self) -> bool:
        return self._bytes > self._limit_bytes or self._memory_bytes > self._memory_limit

    def _shed_waiting(self) -> list[Entry]:
        """Drop the oldest until everything fits, but for the newest one."""
        gone: list[Entry] = []
        spared: list[Entry] = []
        while len(self._waiting) > 1 and self._too_much():
            entry = self._waiting.popleft()
            if entry.on_disk and self._bytes <= self._limit_bytes:
                spared.append(entry)  # only memory is short
            else:
                self._release(entry)
                gone.append(entry)
        self._waiting.extendleft(reversed(spared))
        return gone

    def _lose(self, entries: Sequence[Entry]) -> None:
        """Chunks are lost; what follows them goes on as other episodes."""
        for entry in entries:
            entry.chunk.lineage.lose_beginning()
        if entries:
            self._dropped([entry.chunk for entry in entries])

    def _forget_delivered(self, sequence: int) -> None:
        while self._taken and self._taken[0].sequence <= sequence:
            self._release_taken()

    def _note_taken(self, entries: Sequence[Entry]) -> None:
        self._taken.extend(entries)
        self._taken_bytes += sum(entry.size_bytes for entry in entries)
        self._taken_steps += sum(entry.chunk.steps for entry in entries)

    def _release_taken(self) -> None:
        """Forget the oldest that the server has: it cannot be offered to another one any more."""
        entry = self._taken.popleft()
        self._taken_bytes -= entry.size_bytes
        self._taken_steps -= entry.chunk.steps
        self._release(entry)

    def _release(self, entry: Entry) -> None:
        self._bytes -= entry.size_bytes
        self._steps -= entry.chunk.steps
        self._memory_bytes -= 0 if entry.on_disk else entry.size_bytes
        with contextlib.suppress(OSError):
            entry.forget()
