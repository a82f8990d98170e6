"""``RemoteSteps``: what each verb of remote inference says to the server, as the request to send.

It neither sends nor waits: both actors do, and see that what was told before is settled. Owned by one
of them; one call, or its loop, at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from client_sdk.batch_track import BatchTrack
from client_sdk.episode_track import EpisodeTrack
from client_sdk.exchange import Exchange
from client_sdk.pending import Pending
from client_sdk.rows import Rows, Status, Track


class RemoteSteps:
    """All verbs but ``act`` and ``act_batch``, made at every step: the actors write these out.

    Where a verb returns None, there is nothing to say.
    """

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def log_action(
        self, track: EpisodeTrack, observation: Any, action: Any, logp: float | None, reward: float
    ) -> Pending:
        """What the application did by itself; unless it is ``told``, wait, and call ``logged``."""
        exchange = self._exchange
        columns, logged = exchange.observation(observation), exchange.logged_action(action, logp)
        track.add_reward(reward)
        rows = track.row(columns, Status.RUNNING, logged, logp)
        # Refused for the algorithm's sake, or never: so the first one of each kind is waited for.
        told = (logp is not None) in exchange.welcome_with_logp
        return exchange.issue(track, rows, told=told)

    def logged(self, pending: Pending) -> None:
        """A first logged action has its answer.

        Raises:
            PolicyClientError: It was refused.
        """
        self._exchange.acknowledge(pending)
        self._exchange.welcome_with_logp.add(bool(pending.rows.logged_logps))

    def end(
        self, track: EpisodeTrack, observation: Any, status: Status, reward: float
    ) -> Pending | None:
        """Where an episode ended."""
        columns = self._exchange.last_observation(observation, status)
        track.add_reward(reward)
        if track.step:
            return self._tell(track, track.row(columns, status))
        return self.abandon(track)  # an episode without a step

    def abandon(self, track: EpisodeTrack) -> Pending | None:
        """That an episode is taken back, and with it what the server put off."""
        if not track.begun:
            return None
        self._exchange.withdraw(track)
        return self._tell(track, track.last_row())

    def abandon_rows(self, track: BatchTrack, indices: Sequence[int]) -> Pending | None:
        """That some episodes of a batch are taken back."""
        return self._tell(track, track.abandon(indices))

    def close_batch(self, track: BatchTrack) -> Pending | None:
        """That all are, and what the server put off as well."""
        self._exchange.withdraw(track)
        return self._tell(track, track.abandon(track.running()))

    def _tell(self, track: Track, last: Rows | None) -> Pending | None:
        """Rows that end what they speak of; nobody waits for the answer."""
        return None if last is None else self._exchange.issue(track, last, told=True, final=True)
