"""What is cut from a recording and kept in a spool: ``CutChunk``, and the ``Lineage`` it belongs to.

No I/O. A chunk belongs to the spool once it is added; until then to whoever acts.
"""

from __future__ import annotations

import dataclasses

from client_sdk.rows import EpisodeOptions, Status


class Lineage:
    """One episode of the application, under whatever numbers servers know it.

    Attributes:
        options: How it is to be treated.
        cut: Some of it has been cut, so that the server may know of it.
        number: By which a session knows it. This and what follows is the spool's.
        session: Which session that is, counted from 1; 0: none.
        next_step: First step of the chunk that may follow there.
        resumed: Its beginning is not known under that number.
    """

    __slots__ = ("cut", "next_step", "number", "options", "resumed", "session")

    def __init__(self, options: EpisodeOptions) -> None:
        self.options = options
        self.cut = False
        self.number = 0
        self.session = 0
        self.next_step = 0
        self.resumed = False

    def lose_beginning(self) -> None:
        """What is sent from here on goes to the server as another episode."""
        self.session = 0
        self.resumed = True


@dataclasses.dataclass(slots=True)
class CutChunk:
    """T steps of one episode, encoded but for the numbers that belong to a session."""

    lineage: Lineage
    steps: int
    """T."""
    first_step: int
    status: Status
    data: bytes
    """A ``Chunk`` without ``sequence`` and ``episode``."""
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    """The application's own numbers since the chunk before."""
