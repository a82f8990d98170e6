"""When an upload is taken and when it is answered: room in the buffer, and hold mode.

Loop thread only. Before it is taken, experience to learn from waits for room, first come, first
served. Once taken, in hold mode its answer waits until RLlib wants more or a newer policy is there,
for the client goes on acting when it has the answer.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

from client_sdk.wire.faults import Fault, Reason

if TYPE_CHECKING:
    from policy_server.buffer import ExperienceBuffer
    from policy_server.waiting import Waiting

_RETRY_AFTER_S = 0.1
"""Told to clients that had to wait too long; they have waited already."""


class UploadGate:
    """Holds uploads back."""

    def __init__(
        self, buffer: ExperienceBuffer, *, hold: bool, hold_timeout_s: float, wait_timeout_s: float
    ) -> None:
        self._buffer = buffer
        self._hold = hold
        self._hold_timeout_s = hold_timeout_s
        self._wait_timeout_s = wait_timeout_s
        self._queue: deque[Waiting] = deque()  # for room
        self._held: set[Waiting] = set()

    @property
    def waiting(self) -> int:
        """Uploads held back, before or after they were taken."""
        return len(self._queue) + len(self._held)

    async def room(self, call: Waiting) -> None:
        """Wait until the buffer can take more; what is taken must be put there without waiting.

        Raises:
            Fault: LIMIT_EXCEEDED; it took too long. Or what the call was ended with.
        """
        if not self._queue and not self._buffer.full:
            return
        deadline = asyncio.get_running_loop().time() + self._wait_timeout_s
        self._queue.append(call)
        try:
            while self._buffer.full or self._queue[0] is not call:
                left_s = deadline - asyncio.get_running_loop().time()
                if left_s <= 0:
                    raise self._full()
                await call.news(left_s)
        finally:
            self._queue.remove(call)
            self.let_in()

    async def answer(self, call: Waiting) -> None:
        """Wait until a client may act on, in hold mode.

        Raises:
            Fault: NOT_READY; it took too long, what was taken stays. Or what the call was ended
                with.
        """
        if not self._hold or self._buffer.wanted:
            return
        self._held.add(call)
        try:
            if not await call.news(self._hold_timeout_s):
                raise Fault(
                    Reason.NOT_READY,
                    "the experience is here, and RLlib learns: act on later. Send the same upload "
                    "again, it is not stored twice",
                    retry_after_s=_RETRY_AFTER_S,
                )
        finally:
            self._held.discard(call)

    def demand_changed(self) -> None:
        """``sample()`` asks for experience, or took some."""
        self.let_in()
        if self._buffer.wanted:
            self.policy_arrived()

    def let_in(self) -> None:
        """There may be room for the first in the queue, who lets the next one in."""
        if self._queue and not self._buffer.full:
            self._queue[0].wake()

    def policy_arrived(self) -> None:
        """All that were taken are answered."""
        for call in self._held:
            call.wake()

    def cancel(self, fault: Fault) -> None:
        """Answer all that waits with an error."""
        for call in (*self._queue, *self._held):
            call.end(fault)

    def _full(self) -> Fault:
        return Fault(
            Reason.LIMIT_EXCEEDED,
            f"the experience buffer is full ({self._buffer.capacity_steps} steps, "
            f"buffer_fragments) and there was no room within wait_timeout_s={self._wait_timeout_s:g}; "
            "send the same upload again, or set when_full='discard'",
            retry_after_s=_RETRY_AFTER_S,
        )
