"""``AsyncPolicyClient``: the same verbs as coroutines, for any number of tasks of a loop.

Thin, as ``client`` is; see there for what each verb means. ``aio_episode`` has its objects. Loop only,
but for the constructor.
"""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from client_sdk.aio_episode import Alone, AsyncEpisode, AsyncEpisodeBatch
from client_sdk.aio_remote_actor import AioRemoteActor
from client_sdk.client_base import ClientBase
from client_sdk.errors import ConcurrentUseError, NotConnectedError
from client_sdk.exchange import Exchange
from client_sdk.rows import end_status
from client_sdk.verbs import AioActor


class AsyncPolicyClient(ClientBase):
    """A simulator's connection to a policy server, for ``asyncio``.

    ::

        async with AsyncPolicyClient("localhost:9900") as client:
            async with client.episode() as episode:
                action = await episode.act(observation)
                ...
                await episode.end(observation, reward, terminated=True)

    Made anywhere, it belongs to the event loop that connects it. Tasks may share it, but not one
    episode at a time. Arguments and errors are ``PolicyClient``'s; connecting is left to ``connect``
    (or ``async with``), so that the constructor does no I/O.

    Do not fork while it is connected: gRPC's own fork handlers may crash the child before this
    client can tell it what is wrong. GRPC_ENABLE_FORK_SUPPORT=false turns them off.
    """

    _what = "AsyncPolicyClient"
    _actor: AioActor | None = None
    _connecting: asyncio.Lock | None = None

    async def connect(self) -> None:
        """Open the session; nothing happens if it is open.

        Raises:
            ConnectError: Nobody answers within ``timeouts.connect_s``; its subclass says how.
            UnauthenticatedError: The token is missing or wrong.
            SpaceMismatchError: The server's spaces are others; the message says where.
        """
        if self._connecting is None:
            self._connecting = asyncio.Lock()
        async with self._connecting:  # a second task finds what the first has opened
            await self._connect()

    async def _connect(self) -> None:
        if self._actor is not None:
            self._guard.check()
            return
        actor = self._make_actor()
        try:
            await actor.connect()
        except BaseException:
            await actor.abort()
            raise
        self._actor, self._loop = actor, asyncio.get_running_loop()
        self._guard.closed = False

    def _make_actor(self) -> AioActor:
        if isinstance(self._handshake, Exchange):
            return AioRemoteActor(self._endpoint, self._handshake, self._timeouts)
        from client_sdk.local_actor import AioLocalActor

        return AioLocalActor(self._handshake, self._make_background(), self._timeouts)

    # -- RLlib's verbs -------------------------------------------------------------------------

    async def start_episode(
        self, episode_id: str | None = None, training_enabled: bool = True, explore: bool = True
    ) -> str:
        """See ``PolicyClient.start_episode``."""
        self._check()
        return self._start(episode_id, training_enabled, explore).id

    async def get_action(self, episode_id: str, observation: Any) -> Any:
        """See ``PolicyClient.get_action``."""
        actor, track = self._check(), self._book.find(episode_id)
        with Alone(track):
            return await actor.act(track, observation)

    async def log_action(
        self, episode_id: str, observation: Any, action: Any, logp: float | None = None
    ) -> None:
        """See ``PolicyClient.log_action``."""
        actor, track = self._check(), self._book.find(episode_id)
        with Alone(track):
            await actor.log_action(track, observation, action, logp)

    async def log_returns(
        self,
        episode_id: str,
        reward: float,
        info: Mapping[Any, Any] | None = None,
        multiagent_done_dict: Mapping[Any, Any] | None = None,
    ) -> None:
        """See ``PolicyClient.log_returns``."""
        self._check()
        self._log_returns(episode_id, reward, info, multiagent_done_dict)

    async def end_episode(
        self, episode_id: str, observation: Any, *, truncated: bool = False
    ) -> None:
        """See ``PolicyClient.end_episode``."""
        actor, track = self._check(), self._book.find(episode_id)
        with Alone(track):
            await actor.end(track, observation, end_status(terminated=False, truncated=truncated))
            self._ended(track)

    async def update_policy_weights(self) -> None:
        """See ``PolicyClient.update_policy_weights``."""
        await self._check().update_policy_weights()

    # -- objects -------------------------------------------------------------------------------

    def episode(
        self,
        episode_id: str | None = None,
        *,
        training_enabled: bool = True,
        explore: bool = True,
    ) -> AsyncEpisode:
        """Begin an episode; see ``Episode``. No coroutine: it costs nothing before its first row."""
        self._check()
        return AsyncEpisode(self, self._start(episode_id, training_enabled, explore))

    def episodes(
        self, n: int, *, training_enabled: bool = True, explore: bool = True
    ) -> AsyncEpisodeBatch:
        """N episodes that step together; see ``EpisodeBatch``. No coroutine, as ``episode``."""
        self._check()
        return AsyncEpisodeBatch(self, self._start_batch(n, training_enabled, explore))

    # -- life ----------------------------------------------------------------------------------

    async def ping(self) -> float:
        """See ``PolicyClient.ping``."""
        return await self._check().ping()

    async def close(self) -> None:
        """End the session; calls under way raise ClosedClientError. Idempotent."""
        actor = self._actor
        if self._guard.closed or actor is None:
            return
        self._guard.closed = True
        if not self._guard.forked:
            await actor.finish()

    def _check(self) -> AioActor:
        actor = self._actor
        if actor is None:
            raise NotConnectedError(
                "connect first: async with AsyncPolicyClient(...) as client, or await "
                "client.connect()"
            )
        guard = self._guard
        if guard.closed or guard.forked:
            guard.check()
        if asyncio.get_running_loop() is not self._loop:
            raise ConcurrentUseError(
                "this AsyncPolicyClient was connected in another event loop: make one in each loop"
            )
        return actor

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    def __del__(self) -> None:
        guard = getattr(self, "_guard", None)
        if guard is None or guard.closed or guard.forked or self._actor is None:
            return
        warnings.warn(f"{self!r} was never closed", ResourceWarning, stacklevel=2, source=self)
        self._actor.forget()
