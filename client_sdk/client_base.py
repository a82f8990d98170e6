"""What the blocking and the asyncio client share: their construction, and what they know.

No I/O. Owned by one client, like everything that it holds.
"""

from __future__ import annotations

import operator
import os
import socket
from collections.abc import Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any

import gymnasium as gym

from client_sdk.batch_track import BatchTrack
from client_sdk.config import Address, Timeouts, TlsConfig, check_token
from client_sdk.endpoint import Endpoint
from client_sdk.episode_book import EpisodeBook
from client_sdk.episode_track import EpisodeTrack
from client_sdk.errors import InvalidValueError, LimitExceededError, NotConnectedError
from client_sdk.exchange import Exchange
from client_sdk.guard import Guard
from client_sdk.local_options import LocalOptions
from client_sdk.rows import EpisodeOptions
from client_sdk.session import Handshake, Session
from client_sdk.stats import ClientStats
from client_sdk.values import check_type, is_number, numbers_of_info, sendable_text
from client_sdk.wire import policyserver_pb2 as pb

if TYPE_CHECKING:
    from client_sdk.background import Background


class ClientBase:
    """A server to talk to, and the episodes that are open there."""

    _what = "PolicyClient"

    def __init__(
        self,
        address: str,
        inference_mode: str = "remote",
        update_interval: float | None = 0.0,
        *,
        token: str | None = None,
        tls: TlsConfig | None = None,
        insecure: bool = False,
        timeouts: Timeouts | None = None,
        name: str | None = None,
        observation_space: gym.Space[Any] | None = None,
        action_space: gym.Space[Any] | None = None,
        cache_dir: str | PathLike[str] | None = None,
        spool_dir: str | PathLike[str] | None = None,
        spool_bytes: int | None = None,
    ) -> None:
        # First of all, so that __del__ finds them whatever is refused below.
        self._guard = Guard(self._what)
        self._guard.closed = True
        if inference_mode not in ("remote", "local"):  # no set: what is unhashable, too
            raise InvalidValueError(
                f'expected "remote" or "local", got {inference_mode!r}', field="inference_mode"
            )
        if update_interval is not None and not (
            is_number(update_interval) and update_interval >= 0
        ):
            raise InvalidValueError(
                f"expected a number of seconds from 0 up, or None, got {update_interval!r}",
                field="update_interval",
            )
        self._address = Address.parse(address)
        check_token(token, self._address, tls=tls, insecure=insecure)
        check_type(timeouts, (Timeouts, type(None)), "Timeouts(...) or None", "timeouts")
        self._endpoint = Endpoint(self._address, tls, token)
        self._timeouts = timeouts or Timeouts()
        self._name = sendable_text(name or f"{socket.gethostname()}-{os.getpid()}", "name")
        local = LocalOptions.checked(
            inference_mode, update_interval, cache_dir, spool_dir, spool_bytes
        )
        self._local = local
        self._handshake: Handshake = (
            Exchange(self._name, observation_space, action_space)
            if local is None
            else Handshake(self._name, pb.INFERENCE_MODE_LOCAL, observation_space, action_space)
        )
        self._book = EpisodeBook(self._handshake.numbering)
        self._constructed()

    def _constructed(self) -> None:
        """What else construction does; here nothing, for it must not wait on an event loop."""

    def __repr__(self) -> str:
        state = "closed" if self._guard.closed else f"{len(self._book.open)} open episodes"
        return f"<{type(self).__name__} {self._name!r} of {self._address}, {state}>"

    @property
    def observation_space(self) -> gym.Space[Any]:
        """Of the policy, as the server told it."""
        return self._session.observation_space

    @property
    def action_space(self) -> gym.Space[Any]:
        """Of the actions that the application executes, as the server told it."""
        return self._session.action_space

    @property
    def config(self) -> dict[str, Any]:
        """What the training side tells its simulators: level, difficulty, frame skip. A copy.

        Whole numbers are ints, whatever they were before they travelled.
        """
        return dict(self._session.config)

    @property
    def policy_version(self) -> int:
        """Of the policy that gave the latest action."""
        return self._handshake.policy_version

    @property
    def stats(self) -> ClientStats:
        """What became of connections and episodes so far. Live; read only."""
        return self._handshake.stats

    @property
    def closed(self) -> bool:
        """Whether ``close`` has been called."""
        return self._guard.closed

    @property
    def _session(self) -> Session:
        session = self._handshake.session
        if session is None:
            raise NotConnectedError(
                "nothing is known of the server before the first connection: connect first"
            )
        return session

    def _make_background(self) -> Background:
        from client_sdk.background import Background

        return Background(
            self._endpoint, self._handshake, self._timeouts, self._local or LocalOptions()
        )

    def _start(self, episode_id: str | None, training_enabled: bool, explore: bool) -> EpisodeTrack:
        track = self._book.start(episode_id, training_enabled=training_enabled, explore=explore)
        self._handshake.tracks.add(track)
        return track

    def _ended(self, track: EpisodeTrack) -> None:
        self._handshake.tracks.discard(track)
        self._book.end(track)

    def _start_batch(self, n: int, training_enabled: bool, explore: bool) -> BatchTrack:
        try:
            n = int(operator.index(n))
        except TypeError:
            raise InvalidValueError(f"expected a whole number, got {n!r}", field="n") from None
        if n < 1:
            raise InvalidValueError(f"expected at least 1, got {n}", field="n")
        session = self._session
        # Local inference sends no vector steps, but chunks.
        max_rows = session.max_rows_per_request if self._local is None else 0
        for limit, setting in (
            (max_rows, "max_rows_per_request"),
            (session.max_open_episodes, "max_open_episodes_per_session"),
        ):
            if 0 < limit < n:
                raise LimitExceededError(
                    f"a batch of {n} episodes exceeds the server's limit of {limit} "
                    f"(PolicyServerConfig.{setting}). Use several smaller batches, or raise it."
                )
        track = BatchTrack(
            self._handshake.numbering, n, EpisodeOptions("", training_enabled, explore)
        )
        self._handshake.tracks.add(track)
        return track

    def _batch_ended(self, track: BatchTrack) -> None:
        self._handshake.tracks.discard(track)

    def _log_returns(
        self,
        episode_id: str,
        reward: float,
        info: Mapping[Any, Any] | None,
        multiagent_done_dict: Mapping[Any, Any] | None,
    ) -> None:
        if multiagent_done_dict is not None:
            raise InvalidValueError(
                "expected None: the server's episodes have a single agent. Say that an episode is "
                "over with end_episode().",
                field="multiagent_done_dict",
            )
        track = self._book.find(episode_id)
        metrics = numbers_of_info(info)
        # In this order: noting metrics twice, after a refused reward, does no harm.
        track.add_metrics(metrics)
        track.add_reward(reward)
