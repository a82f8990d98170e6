"""``Waiting``: a call that waits for something on the loop. Loop thread only."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from client_sdk.wire.faults import Fault


class Waiting:
    """One call, from its beginning to its end; see ``sessions.Call``."""

    def __init__(self) -> None:
        self._woken = asyncio.Event()
        self._fault: Fault | None = None

    async def news(self, timeout_s: float) -> bool:
        """Wait until something woke it.

        Returns:
            False where nothing did in that time.

        Raises:
            Fault: What the call was ended with.
        """
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._woken.wait(), timeout_s)
        woken = self._woken.is_set()
        self._woken.clear()
        if self._fault is not None:
            raise self._fault
        return woken

    def wake(self) -> None:
        """What it waits for may be there."""
        self._woken.set()

    def end(self, fault: Fault) -> None:
        """See ``sessions.Call``."""
        self._fault = fault
        self._woken.set()
