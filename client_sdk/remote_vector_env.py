"""``RemoteVectorEnv``: environments that one host steps together, as Gymnasium knows them.

Resets and steps; ``remote_shell`` has the rest, ``remote_client`` values, ``env_driver``
messages. One thread at a time, as any Gymnasium environment.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np
from google.protobuf.struct_pb2 import Struct
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from client_sdk.config import TlsConfig
from client_sdk.errors import InvalidValueError, error_from_fault
from client_sdk.remote_client import RemoteClient
from client_sdk.remote_shell import RemoteShell
from client_sdk.values import check_type, is_whole
from client_sdk.wire.faults import Fault
from client_sdk.wire.structs import dict_of_struct


class RemoteVectorEnv(RemoteShell, VectorEnv[Any, Any, Any]):
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
        if not (is_whole(num_envs) and num_envs >= 1):
            raise InvalidValueError(
                f"expected a whole number of at least 1, got {num_envs!r}", "num_envs"
            )
        self._remote = remote = RemoteClient(
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
        with remote.guard:
            if options is not None and "reset_mask" in options:
                raise InvalidValueError(
                    "expected options without it: where an episode has ended, the next step resets "
                    "that environment by itself",
                    'options["reset_mask"]',
                )
            response = remote.reset(self._seeds(seed), options)
            observations = remote.observations.batched_value(remote.first(response))
            infos = self._infos(response.infos)
        self._show()
        return observations, infos

    def _seeds(self, seed: int | Sequence[int | None] | None) -> Sequence[int] | None:
        if seed is None:
            return None
        if isinstance(seed, int | np.integer):
            return [int(seed) + index for index in range(self.num_envs)]
        check_type(
            seed, (Sequence, np.ndarray), "a whole number, or one for each environment", "seed"
        )
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
        with remote.guard:
            try:
                columns = remote.actions.columns_of_batch(actions, self.num_envs, "actions")
            except Fault as fault:
                raise error_from_fault(fault) from None
            step = remote.step(columns)
            result = (
                remote.observations.batched_value(step.observations),
                np.array(step.rewards, np.float64),
                np.array(step.terminated, np.bool_),
                np.array(step.truncated, np.bool_),
                self._infos(step.infos),
            )
        if remote.viewer is not None:
            self._show()
        return result

    def _infos(self, messages: Iterable[Struct]) -> dict[str, Any]:
        told = [dict_of_struct(message) for message in messages]
        try:
            return self._batched([_with_arrays(info) for info in told])
        except ValueError:  # arrays of different shapes stay lists
            return self._batched(told)

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
        with remote.guard:
            return tuple(remote.frame(index) for index in range(self.num_envs))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close_extras(self, **_kwargs: Any) -> None:
        """Have the environments closed; ``close`` calls it once."""
        if self._remote is not None:
            self._remote.close()


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
