"""``PolicyClient``: the blocking client, in the verbs of RLlib's old one; ``episode`` has its objects.

Thin: its tracks know where episodes stand, ``exchange`` what travels, ``remote_actor`` how. Not
thread-safe, and it says so when it notices; not to be used after a fork.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from client_sdk.client_base import ClientBase
from client_sdk.episode import Episode, EpisodeBatch
from client_sdk.exchange import Exchange
from client_sdk.remote_actor import RemoteActor
from client_sdk.rows import end_status
from client_sdk.verbs import Actor


class PolicyClient(ClientBase):
    """A simulator's connection to a policy server.

    ::

        with PolicyClient("localhost:9900") as client:
            episode_id = client.start_episode()
            observation, _ = env.reset()
            done = False
            while not done:
                action = client.get_action(episode_id, observation)
                observation, reward, terminated, truncated, info = env.step(action)
                client.log_returns(episode_id, reward)
                done = terminated or truncated
            client.end_episode(episode_id, observation, truncated=not terminated)

    Use it from one thread at a time, in the process that made it; any number of episodes may be
    open. When the connection is lost, the call under way connects again and goes on; what became of
    the open episodes is logged ("client_sdk") and counted (``stats``).

    Args:
        address: ``"host:port"`` or ``"http://host:port"``.
        inference_mode: ``"remote"``: the server is asked for every action. ``"local"``: the policy
            is downloaded and acts here, experience is uploaded in the background.
        update_interval: Local inference fetches the policy at most once in so many seconds; 0: as
            soon as there is another; None: only ``update_policy_weights`` does. Without effect with
            remote inference.
        token: Bearer token; refused over plaintext beyond this machine unless ``insecure``.
        tls: Certificates; None: plaintext.
        insecure: Send the token in plaintext to other machines all the same.
        timeouts: How long to wait for what.
        name: For the server's logs; host name and process id if not given.
        observation_space: What this program believes in; a server with another one is refused.
        action_space: Likewise.
        cache_dir: Local inference keeps policy files there, for the next start; processes may share
            it. None: in memory only.
        spool_dir: Local inference keeps experience there that does not fit into memory while the
            server is away; it is gone with the process. The directory is made if it is not there.
            None: in memory only.
        spool_bytes: Local inference keeps so much experience for the server at most (256 MiB if not
            given); beyond that the oldest is lost, and counted in ``stats``.

    Raises:
        ConnectError: Nobody answers within ``timeouts.connect_s``; its subclass says how.
        UnauthenticatedError: The token is missing or wrong.
        SpaceMismatchError: The server's spaces are others; the message says where.
        InvalidValueError: An argument is none that can work.
    """

    _actor: Actor

    def _constructed(self) -> None:
        self._actor = self._make_actor()
        try:
            self._actor.connect()
        except BaseException:
            self._actor.abort()
            raise
        self._guard.closed = False

    def _make_actor(self) -> Actor:
        if isinstance(self._handshake, Exchange):
            return RemoteActor(self._endpoint, self._handshake, self._timeouts)
        from client_sdk.local_actor import LocalActor

        return LocalActor(self._handshake, self._make_background())

    # -- RLlib's verbs -------------------------------------------------------------------------

    def start_episode(
        self, episode_id: str | None = None, training_enabled: bool = True, explore: bool = True
    ) -> str:
        """Begin an episode. Costs nothing until its first action.

        Args:
            episode_id: A name that no running episode of this client has; None: one is made up.
            training_enabled: False keeps it out of training; its return is reported apart.
            explore: False asks for the likeliest actions; kept out of training as well.

        Returns:
            The id by which the other verbs know it.

        Raises:
            EpisodeStateError: An episode of that name is running.
        """
        with self._guard:
            return self._start(episode_id, training_enabled, explore).id

    def get_action(self, episode_id: str, observation: Any) -> Any:
        """Record where the episode is and return what to do next.

        Args:
            episode_id: From ``start_episode``.
            observation: One value of the observation space.

        Returns:
            One value of the action space. Arrays are yours to keep.

        Raises:
            InvalidValueError: The observation is none; nothing was recorded, and the episode goes
                on with the next call.
            EpisodeStateError: The episode has ended, or never began.
            PolicyTimeout: No answer in time. Calling again is safe: it asks for the same step, for
                the observation that was sent.
            ConnectError: The connection was lost and could not be made again in time.
        """
        with self._guard:
            return self._actor.act(self._book.find(episode_id), observation)

    def log_action(
        self, episode_id: str, observation: Any, action: Any, logp: float | None = None
    ) -> None:
        """Record where the episode is and what the application does there by itself.

        Does not wait for the answer (but the first time): a refusal is raised by the next call for
        this episode.

        Args:
            episode_id: From ``start_episode``.
            observation: One value of the observation space.
            action: One value of the action space.
            logp: Log-density of that action; some algorithms (PPO) cannot learn without.

        Raises:
            LogpRequiredError: This algorithm needs ``logp``.
            InvalidValueError: One of them is not what it should be; nothing was recorded.
        """
        with self._guard:
            self._actor.log_action(self._book.find(episode_id), observation, action, logp)

    def log_returns(
        self,
        episode_id: str,
        reward: float,
        info: Mapping[Any, Any] | None = None,
        multiagent_done_dict: Mapping[Any, Any] | None = None,
    ) -> None:
        """Add to what the last action earned. Sent with the next row.

        Args:
            episode_id: From ``start_episode``.
            reward: Added to what was logged since the last action; none at all means 0.
            info: Its numbers become metrics of the episode; the last value of a name counts.
            multiagent_done_dict: None.

        Raises:
            NotFiniteError: A reward is not finite in float32, or a number in ``info`` not at all.
            InvalidValueError: A reward before the first action.
        """
        with self._guard:
            self._log_returns(episode_id, reward, info, multiagent_done_dict)

    def end_episode(self, episode_id: str, observation: Any, *, truncated: bool = False) -> None:
        """Record where the episode ended. Costs no round trip.

        Args:
            episode_id: From ``start_episode``.
            observation: The final one.
            truncated: It was cut off from outside (a time limit), and might have gone on.

        Raises:
            InvalidValueError: The observation is none; the episode is still running.
        """
        with self._guard:
            track = self._book.find(episode_id)
            self._actor.end(track, observation, end_status(terminated=False, truncated=truncated))
            self._ended(track)

    def update_policy_weights(self) -> None:
        """Act with the newest policy from here on.

        Remote inference always does. Local inference fetches it, if there is a newer one, and
        returns when the next action comes from it.

        Raises:
            PolicyTimeout: The server did not answer within ``timeouts.action_s``.
        """
        with self._guard:
            self._actor.update_policy_weights()

    # -- objects -------------------------------------------------------------------------------

    def episode(
        self,
        episode_id: str | None = None,
        *,
        training_enabled: bool = True,
        explore: bool = True,
    ) -> Episode:
        """Begin an episode; see ``Episode``. Arguments as in ``start_episode``."""
        with self._guard:
            return Episode(self, self._start(episode_id, training_enabled, explore))

    def episodes(
        self, n: int, *, training_enabled: bool = True, explore: bool = True
    ) -> EpisodeBatch:
        """N episodes that step together; see ``EpisodeBatch``.

        Raises:
            LimitExceededError: More than the server accepts in one message, or open at a time.
        """
        with self._guard:
            return EpisodeBatch(self, self._start_batch(n, training_enabled, explore))

    # -- life ----------------------------------------------------------------------------------

    def ping(self) -> float:
        """Seconds that a round trip to the server takes, without an action in it.

        Raises:
            ConnectError: The connection is lost; the next call connects again.
        """
        with self._guard:
            return self._actor.ping()

    def close(self) -> None:
        """End the session; running episodes are truncated at their last step. Idempotent.

        Waits at most ``timeouts.close_s`` for what is on its way. May be called by another thread,
        or by a signal handler, while a call is under way: that call raises ClosedClientError. Where
        another thread closes it so, the session ends with its lease.
        """
        if self._guard.closed:
            return
        self._guard.closed = True
        if self._guard.forked:
            return  # the connection is the parent's
        if self._guard.take(blocking=False):
            self._actor.finish()
            return
        self._actor.interrupt()
        if self._guard.take(timeout=min(self._timeouts.close_s, threading.TIMEOUT_MAX)):
            self._actor.abort()

    def __enter__(self) -> Self:
        self._guard.check()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        guard = getattr(self, "_guard", None)
        if guard is None or guard.closed or guard.forked:
            return
        warnings.warn(f"{self!r} was never closed", ResourceWarning, stacklevel=2, source=self)
        if (
            not sys.is_finalizing()
        ):  # gRPC's threads are gone by then, and waiting for them is for ever
            self._actor.abort()
