"""``RemoteEnv``: an environment that a host runs, as Gymnasium knows it.

Resets and steps; ``remote_shell`` has the rest, ``remote_client`` values, ``env_driver``
messages. One thread at a time, as any Gymnasium environment.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium as gym

from client_sdk.config import TlsConfig
from client_sdk.remote_client import RemoteClient
from client_sdk.remote_shell import RemoteShell
from client_sdk.wire.structs import dict_of_struct


class RemoteEnv(RemoteShell, gym.Env[Any, Any]):
    """An environment that runs on a host elsewhere.

    ::

        env = RemoteEnv("localhost:9901")          # policy-client host CartPole-v1 --port 9901
        observation, info = env.reset(seed=1)
        observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
        env.close()

    Observations, rewards and ends are the same as in-process, bit for bit. Integers in ``info``
    come as floats and arrays as lists. The host runs an environment for this object alone, and
    closes it with the connection.

    Not thread-safe; not usable after a fork.
    """

    def __init__(
        self,
        address: str,
        env_id: str | None = None,
        *,
        kwargs: Mapping[str, Any] | None = None,
        render_mode: str | None = None,
        connect_timeout: float = 60.0,
        step_timeout: float = 300.0,
        token: str | None = None,
        tls: TlsConfig | None = None,
        insecure: bool = False,
    ) -> None:
        """Connect, and have the environment made.

        Args:
            address: Of the host: ``host:port``.
            env_id: Which environment; None: the one that the host was started with.
            kwargs: Its keyword arguments: JSON values.
            render_mode: ``"rgb_array"``, or ``"human"`` for a window on this side.
            connect_timeout: Wait so many seconds for a host that is not up yet, and for it to make
                the environment; again where it has to be made again.
            step_timeout: Give an episode up when a reset or a step takes longer.
            token: The host's bearer token.
            tls: Encrypts the connection.
            insecure: Send the token without TLS to another machine all the same.

        Raises:
            ConnectError: No host answered in time; the class says how.
            UnknownEnvironmentError: The host has no such environment.
            EnvironmentFailedError: The environment could not be made.
            PolicyClientError: The host refuses this client.
        """
        self._remote = remote = RemoteClient(
            type(self).__name__,
            address,
            env_id,
            0,
            kwargs=kwargs,
            render_mode=render_mode,
            connect_timeout=connect_timeout,
            step_timeout=step_timeout,
            token=token,
            tls=tls,
            insecure=insecure,
        )
        self.observation_space = remote.driver.observation_space
        self.action_space = remote.driver.action_space
        self.metadata = remote.metadata
        self.render_mode = render_mode

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin an episode; the environment is made again where the last one is gone.

        Raises:
            EnvironmentFailedError: The environment raised; the next reset makes another.
            ConnectError: The host is gone and did not come back in time.
            PolicyClientError: The host refuses.
        """
        remote = self._open()
        with remote.guard:
            response = remote.reset(None if seed is None else [seed], options)
            super().reset(seed=None if seed is None else int(seed))  # for its own np_random
            observation = remote.observations.value(remote.first(response), 0)
            info = dict_of_struct(response.infos[0]) if response.infos else {}
        self._show()
        return observation, info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """One step.

        Raises:
            InvalidValueError: No such action; nothing has stepped.
            EpisodeStateError: Before the first reset, or after the end.
            EnvironmentLostError: The host is gone, and the episode with it.
            EnvironmentFailedError: The environment raised, and has been closed.
        """
        remote = self._remote or self._open()
        with remote.guard:
            result = remote.step_one(action)
        if remote.viewer is not None:
            self._show()
        return result

    def render(self) -> Any:
        """The frame, [height, width, 3], in mode ``"rgb_array"``; in ``"human"`` it is shown."""
        if self.render_mode != "rgb_array":
            self._show()
            return None
        remote = self._open()
        with remote.guard:
            return remote.frame(0)

    def close(self) -> None:
        """Have the environment closed. Idempotent."""
        if self._remote is not None:
            self._remote.close()
