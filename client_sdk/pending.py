"""``Pending``: one request on its way, and what came of it. Touched by whoever owns its ``Exchange``."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from client_sdk.errors import PolicyTimeout, error_from_fault

if TYPE_CHECKING:
    from client_sdk.rows import Rows, Track
    from client_sdk.wire.batches import Columns
    from client_sdk.wire.faults import Fault


class Pending:
    """One request, until its answer has been looked at."""

    answered = False
    actions: Columns | None = None
    """By row of the request; None: none were due."""
    faults: dict[int, Fault] | None = None
    """Refused rows of the request; None: none."""
    failure: Fault | None = None
    """Of the whole request: nothing was recorded."""
    again: Fault | None = None
    """Why the server wants to be asked again; cleared when it is."""
    why: Fault | None = None
    """What it said then; kept."""
    tries = 0
    due = 0.0
    """The shell's: when to ask again, or to give up."""
    waiter: Any = None
    """The shell's: who waits."""
    stream: Any = None
    """The shell's: on which it was sent last."""

    def __init__(self, number: int, track: Track, rows: Rows, told: bool, final: bool) -> None:
        self.number = number
        self.track = track
        self.rows = rows
        self.told = told
        """Nobody waits for its answer."""
        self.final = final
        """Its rows end what they speak of: not worth repeating to a server that knows nothing."""
        self.data = b""
        """As it was sent."""

    @property
    def fault(self) -> Fault | None:
        """Why the request, or the first refused row of it, was not recorded; None: it was."""
        return self.failure or next(iter((self.faults or {}).values()), None)

    def again_in_s(self) -> float:
        """When to ask again: as the server said, or ever later, scattered among clients."""
        self.tries += 1
        if self.again is not None and self.again.retry_after_s is not None:
            return self.again.retry_after_s
        return min(0.05 * 2.0 ** min(self.tries, 10), 1.0) * random.uniform(0.5, 1.0)  # noqa: S311

    def overdue(self, address: object, waited_s: float) -> PolicyTimeout:
        """The error for no answer in time."""
        error = PolicyTimeout(
            f"no answer from {address} within {waited_s:.3g} s (Timeouts.action_s). Calling again "
            "asks for the same step."
        )
        if self.why is not None:
            error.__cause__ = error_from_fault(self.why)
        return error
