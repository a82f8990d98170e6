"""``RemoteEnv`` and ``RemoteVectorEnv``: environments that a host runs, as Gymnasium knows them.

Thin shells: values here, messages in ``env_driver``. One thread at a time, as any Gymnasium env.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Self

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from client_sdk.config import Address, TlsConfig, check_token
from client_sdk.env_driver import EnvDriver
from client_sdk.errors import InvalidValueError, error_from_fault
from client_sdk.transport import Endpoint, Guard
from client_sdk.viewer import Viewer
from client_sdk.wire import PROTOCOL_VERSION
from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.batches import Columns, SpaceCodec
from client_sdk.wire.faults import Fault
from client_sdk.wire.structs import Unsendable, dict_of_struct, fill_struct
from client_sdk.wire.tensors import tensor_from_proto

_INT64 = np.iinfo(np.int64)


class _Remote:
    """What both have in common: where the host is, and values in and out of messages."""

    def __init__(
        self,
        what: str,
        address: str,
        env_id: str | None,
        num_envs: int,
        *,
        kwargs: Mapping[str, Any] | None,
        render_mode: str | None,
        connect_timeout: float,
        step_timeout: float,
        token: str | None,
        tls: TlsConfig | None,
        insecure: bool,
    ) -> None:
        self.guard = Guard(what)
        self.guard.closed = True
        if render_mode not in (None, "rgb_array", "human"):
            raise InvalidValueError(
                f'expected None, "rgb_array" or "human", got {render_mode!r}: frames are what '
                "crosses the wire",
                "render_mode",
            )
        for name, value in (("connect_timeout", connect_timeout), ("step_timeout", step_timeout)):
            if not value > 0:
                raise InvalidValueError(
                    f"expected a positive number of seconds, got {value!r}", name
                )
        where = Address.parse(address)
        check_token(token, where, tls=tls is not None, insecure=insecure)
        make = pb.MakeRequest(
            protocol_version=PROTOCOL_VERSION,
            env_id=env_id or "",
            # Shown here, the host only draws.
            render_mode="rgb_array" if render_mode else "",
            num_envs=num_envs,
        )
        try:
            fill_struct(make.kwargs, kwargs or {})
        except Unsendable as error:
            raise InvalidValueError(str(error), "kwargs") from None
        self.viewer = Viewer(where) if render_mode == "human" else None
        self.driver = EnvDriver(
            Endpoint(where, tls, token, peer="host of environments"),
            make,
            connect_timeout_s=connect_timeout,
            step_timeout_s=step_timeout,
        )
        self.guard.closed = False
        self.n = num_envs or 1
        self.observations = SpaceCodec(self.driver.observation_space)
        self.actions = SpaceCodec(self.driver.action_space)
        self.metadata = dict(self.driver.metadata)
        modes = self.metadata.get("render_modes")
        self.metadata["render_modes"] = _shown_here(modes if isinstance(modes, list) else [])
        self._reset = pb.DriveRequest()
        self._step = pb.DriveRequest()

    def reset(
        self, seeds: Sequence[int] | None, options: Mapping[str, Any] | None
    ) -> pb.ResetResponse:
        request = self._reset
        request.Clear()
        reset = request.reset
        reset.SetInParent()
        for seed in seeds or ():
            if not (_is_whole(seed) and 0 <= seed <= _INT64.max):
                raise InvalidValueError(
                    f"expected a whole number from 0 to {_INT64.max}, got {seed!r}", "seed"
                )
            reset.seeds.append(int(seed))
        if options is not None:
            try:
                fill_struct(reset.options, options)
            except Unsendable as error:
                raise InvalidValueError(str(error), "options") from None
        return self.driver.reset(request)

    def step(self, columns: Columns) -> pb.StepResponse:
        actions = self._step.step.actions
        actions.Clear()
        self.actions.encode(columns, actions)
        return self.driver.step(self._step)

    def observed(self, response: pb.ResetResponse | pb.StepResponse) -> Columns:
        return self.observations.decode(response.observations, self.n, "observations")

    def frame(self, index: int) -> NDArray[np.uint8]:
        try:
            return np.array(tensor_from_proto(self.driver.render(index), "frame"))
        except Fault as fault:
            raise error_from_fault(fault) from None

    def close(self) -> None:
        if self.guard.closed:
            return
        self.guard.closed = True
        if self.viewer is not None:
            self.viewer.close()
        if not self.guard.forked:  # else the connection is the parent's
            self.driver.close()

    def forget(self, owner: object) -> None:
        """Nobody holds the environment any more."""
        if self.guard.closed or self.guard.forked:
            return
        warnings.warn(f"{owner!r} was never closed", ResourceWarning, stacklevel=3, source=owner)
        if not sys.is_finalizing():
            self.guard.closed = True
            self.driver.abort()


class RemoteEnv(gym.Env[Any, Any]):
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
        self._remote: _Remote | None = None
        self._remote = remote = _Remote(
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
        self._address = address
        self._guard = remote.guard
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
        with self._guard:
            response = remote.reset(None if seed is None else [seed], options)
            super().reset(seed=None if seed is None else int(seed))  # for its own np_random
            seen = self._seen(response)
        self._show()
        return seen

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """One step.

        Raises:
            InvalidValueError: No such action; nothing has stepped.
            EpisodeStateError: Before the first reset, or after the end.
            EnvironmentLostError: The host is gone, and the episode with it.
            EnvironmentFailedError: The environment raised, and has been closed.
        """
        remote = self._open()
        with self._guard:
            try:
                columns = remote.actions.columns_of(action, "action")
            except Fault as fault:
                raise error_from_fault(fault) from None
            response = remote.step(columns)
            observation, info = self._seen(response)
            result = (
                observation,
                response.rewards[0],
                response.terminated[0],
                response.truncated[0],
                info,
            )
        self._show()
        return result

    def _seen(self, response: pb.ResetResponse | pb.StepResponse) -> tuple[Any, dict[str, Any]]:
        remote = self._open()
        try:
            observation = remote.observations.value(remote.observed(response), 0)
        except Fault as fault:
            raise error_from_fault(fault) from None
        return observation, dict_of_struct(response.infos[0]) if response.infos else {}

    def render(self) -> Any:
        """The frame, [height, width, 3], in mode ``"rgb_array"``; in ``"human"`` it is shown."""
        if self.render_mode != "rgb_array":
            self._show()
            return None
        remote = self._open()
        with self._guard:
            return remote.frame(0)

    def _show(self) -> None:
        remote = self._open()
        if remote.viewer is not None:
            with self._guard:
                remote.viewer.show(remote.frame(0), self.metadata.get("render_fps"))

    def _open(self) -> _Remote:
        if self._remote is None:
            raise AttributeError("this RemoteEnv was never connected")
        return self._remote

    def close(self) -> None:
        """Have the environment closed. Idempotent."""
        if self._remote is not None:
            self._remote.close()

    @property
    def connected(self) -> bool:
        """Whether the environment is there, as far as this side knows; else ``reset`` makes it."""
        return not self._guard.closed and self._open().driver.connected

    @property
    def traffic(self) -> dict[str, int]:
        """Messages and bytes of resets and steps since it was connected; read it for statistics."""
        return self._open().driver.traffic.snapshot()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} at {getattr(self, '_address', 'nowhere')}>"

    __str__ = __repr__

    def __del__(self) -> None:
        remote = getattr(self, "_remote", None)
        if remote is not None:
            remote.forget(self)


class RemoteVectorEnv(VectorEnv[Any, Any, Any]):
    """N environments that one host steps together: one message per step for all.

    ::

        envs = RemoteVectorEnv("localhost:9901", num_envs=64)
        observations, infos = envs.reset(seed=1)
        observations, rewards, terminations, truncations, infos = envs.step(actions)
        envs.close()

    Where one has ended, the next step resets it and ignores its action: Gymnasium's NEXT_STEP
    autoreset. Otherwise like ``RemoteEnv``.
    """

    def __init__(
        self,
        address: str,
        env_id: str | None = None,
        *,
        num_envs: int,
        kwargs: Mapping[str, Any] | None = None,
        render_mode: str | None = None,
        connect_timeout: float = 60.0,
        step_timeout: float = 300.0,
        token: str | None = None,
        tls: TlsConfig | None = None,
        insecure: bool = False,
    ) -> None:
        """Connect, and have the environments made; see ``RemoteEnv`` for all but ``num_envs``."""
        self.closed = True
        self._remote: _Remote | None = None
        if num_envs < 1:
            raise InvalidValueError(f"expected at least 1, got {num_envs!r}", "num_envs")
        self._remote = remote = _Remote(
            type(self).__name__,
            address,
            env_id,
            num_envs,
            kwargs=kwargs,
            render_mode=render_mode,
            connect_timeout=connect_timeout,
            step_timeout=step_timeout,
            token=token,
            tls=tls,
            insecure=insecure,
        )
        self.closed = False
        self._address = address
        self._guard = remote.guard
        self.num_envs = num_envs
        self.single_observation_space = remote.driver.observation_space
        self.single_action_space = remote.driver.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.metadata = {**remote.metadata, "autoreset_mode": AutoresetMode.NEXT_STEP}
        self.render_mode = render_mode

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        """Begin an episode in each.

        Args:
            seed: Of the first; environment i gets ``seed + i``. Or one for each.
            options: For each.

        Raises:
            InvalidValueError: Seeds of another number, or none for some of them.
            PolicyClientError: As in ``RemoteEnv.reset``.
        """
        remote = self._open()
        with self._guard:
            if options is not None and "reset_mask" in options:
                raise InvalidValueError(
                    "expected options without it: where an episode has ended, the next step resets "
                    "that environment by itself",
                    'options["reset_mask"]',
                )
            response = remote.reset(self._seeds(seed), options)
            seen = self._seen(response)
        self._show()
        return seen

    def _seeds(self, seed: int | Sequence[int | None] | None) -> Sequence[int] | None:
        if seed is None:
            return None
        if isinstance(seed, int | np.integer):
            return [int(seed) + index for index in range(self.num_envs)]
        given = [each for each in seed if each is not None]
        if len(seed) != self.num_envs or len(given) not in (0, self.num_envs):
            raise InvalidValueError(
                f"expected a seed for each of {self.num_envs} environments or for none, got "
                f"{len(given)}",
                "seed",
            )
        return given

    def step(
        self, actions: Any
    ) -> tuple[Any, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """One step of each; raises as ``RemoteEnv.step``."""
        remote = self._open()
        with self._guard:
            try:
                columns = remote.actions.columns_of_batch(actions, self.num_envs, "actions")
            except Fault as fault:
                raise error_from_fault(fault) from None
            response = remote.step(columns)
            observations, infos = self._seen(response)
            result = (
                observations,
                np.array(response.rewards, np.float64),
                np.array(response.terminated, np.bool_),
                np.array(response.truncated, np.bool_),
                infos,
            )
        self._show()
        return result

    def _seen(self, response: pb.ResetResponse | pb.StepResponse) -> tuple[Any, dict[str, Any]]:
        remote = self._open()
        try:
            observations = remote.observations.batched_value(remote.observed(response))
        except Fault as fault:
            raise error_from_fault(fault) from None
        told = [dict_of_struct(info) for info in response.infos]
        try:
            return observations, self._batched([_with_arrays(info) for info in told])
        except ValueError:  # arrays of different shapes stay lists
            return observations, self._batched(told)

    def _batched(self, told: list[dict[str, Any]]) -> dict[str, Any]:
        infos: dict[str, Any] = {}
        for index, info in enumerate(told):
            infos = self._add_info(infos, info, index)
        return infos

    def render(self) -> tuple[Any, ...] | None:
        """A frame of each in mode ``"rgb_array"``; in ``"human"`` the first one is shown."""
        if self.render_mode != "rgb_array":
            self._show()
            return None
        remote = self._open()
        with self._guard:
            return tuple(remote.frame(index) for index in range(self.num_envs))

    def _show(self) -> None:
        remote = self._open()
        if remote.viewer is not None:
            with self._guard:
                remote.viewer.show(remote.frame(0), self.metadata.get("render_fps"))

    def _open(self) -> _Remote:
        if self._remote is None:
            raise AttributeError("this RemoteVectorEnv was never connected")
        return self._remote

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close_extras(self, **_kwargs: Any) -> None:
        """Have the environments closed; ``close`` calls it once."""
        if self._remote is not None:
            self._remote.close()

    @property
    def connected(self) -> bool:
        """Whether the environment is there, as far as this side knows; else ``reset`` makes it."""
        return not self._guard.closed and self._open().driver.connected

    @property
    def traffic(self) -> dict[str, int]:
        """Messages and bytes of resets and steps since it was connected; read it for statistics."""
        return self._open().driver.traffic.snapshot()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} at {getattr(self, '_address', 'nowhere')}>"

    __str__ = __repr__

    def __del__(self) -> None:
        remote = getattr(self, "_remote", None)
        if remote is not None:
            remote.forget(self)


def _with_arrays(info: dict[str, Any]) -> dict[str, Any]:
    """Lists of numbers as the arrays that they probably were, for Gymnasium to stack."""
    arrays = dict(info)
    for key, value in info.items():
        if isinstance(value, dict):
            arrays[key] = _with_arrays(value)
        elif isinstance(value, list):
            array = np.array(value) if value else np.zeros(0)
            if array.dtype.kind in "bf":
                arrays[key] = array
    return arrays


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _shown_here(modes: list[Any]) -> list[Any]:
    """Whatever can be drawn can be shown on this side."""
    return sorted({"human", "rgb_array"} if "rgb_array" in modes else [])
