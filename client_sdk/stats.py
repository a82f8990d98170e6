"""``ClientStats``: what a client counts. Written by whichever of its threads does the work; any reads."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class ClientStats:
    """What became of connections and episodes so far. Counters only go up."""

    requests: int = 0
    """Messages sent, repetitions not counted."""
    asked_again: int = 0
    """Messages repeated because the server said "not now"."""
    reconnects: int = 0
    """Connections lost and made again."""
    sessions_lost: int = 0
    """Sessions that the server no longer knew: it restarted, or the lease was over."""
    episodes_resumed: int = 0
    """Episodes that went on in another session as new ones, their beginning lost."""
    ends_lost: int = 0
    """Ends of episodes that were on their way when the session was lost."""
    rows_refused: int = 0
    """Rows that the server refused."""
    policies_loaded: int = 0
    """Local inference: policy files taken over."""
    steps_uploaded: int = 0
    """Local inference: steps that the server has taken."""
    chunks_refused: int = 0
    """Local inference: chunks that the server refused, and those that followed them."""
    steps_dropped: int = 0
    """Local inference: steps lost because the server was away for too long, or refused their
    episode."""
