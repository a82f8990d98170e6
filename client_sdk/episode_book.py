"""``EpisodeBook``: the open episodes of a client by the application's ids, and which have ended.

No I/O. Owned by one client and touched by one of its calls at a time.
"""

from __future__ import annotations

import uuid
from collections import OrderedDict

from client_sdk.episode_track import EpisodeTrack, already_ended
from client_sdk.errors import EpisodeStateError, UnknownEpisodeError
from client_sdk.rows import EpisodeOptions, Numbering
from client_sdk.values import sendable_text

ENDED_IDS_REMEMBERED = 4096
"""So many ended episodes are told apart from episodes that never were."""


class EpisodeBook:
    """The open episodes of a client by the application's id."""

    def __init__(self, numbering: Numbering) -> None:
        self._numbering = numbering
        self.open: dict[str, EpisodeTrack] = {}
        self._ended: OrderedDict[str, None] = OrderedDict()

    def start(
        self, episode_id: str | None, *, training_enabled: bool, explore: bool
    ) -> EpisodeTrack:
        """Open an episode under that id, or under one of our own.

        Raises:
            EpisodeStateError: One of that id is running.
            InvalidValueError: It is no text that can be sent.
        """
        label = "" if episode_id is None else sendable_text(episode_id, "episode_id")
        name = label or uuid.uuid4().hex
        if name in self.open:
            raise EpisodeStateError(
                f"episode {name!r} is running; end it first, or start another id"
            )
        self._ended.pop(name, None)
        options = EpisodeOptions(label, training_enabled, explore)
        track = self.open[name] = EpisodeTrack(name, self._numbering, options)
        return track

    def find(self, episode_id: str) -> EpisodeTrack:
        """The running episode of that id.

        Raises:
            EpisodeEndedError: It has ended.
            UnknownEpisodeError: It was never started here, or ended long ago.
        """
        track = self.open.get(episode_id)
        if track is not None:
            return track
        if episode_id in self._ended:
            raise already_ended(episode_id)
        raise UnknownEpisodeError(
            f"episode {episode_id!r} was not started by this client (or ended long ago); "
            "start_episode() returns the id to use"
        )

    def end(self, track: EpisodeTrack) -> None:
        """Forget a track, but not that it was there."""
        track.ended = True
        if self.open.pop(track.id, None) is not None:
            self._ended[track.id] = None
            if len(self._ended) > ENDED_IDS_REMEMBERED:
                self._ended.popitem(last=False)
