"""``RemoteClient``: what both remote environments have in common, between values and messages.

One thread at a time.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client_sdk.config import Address, TlsConfig, check_token
from client_sdk.endpoint import Endpoint
from client_sdk.env_driver import EnvDriver
from client_sdk.errors import InvalidValueError, error_from_fault
from client_sdk.guard import Guard
from client_sdk.values import check_type, is_number, is_whole
from client_sdk.viewer import Viewer
from client_sdk.wire import PROTOCOL_VERSION
from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.batches import Columns, SpaceCodec
from client_sdk.wire.faults import Fault
from client_sdk.wire.steps import OneStep, StepMessages, Stepped
from client_sdk.wire.structs import Unsendable, dict_of_struct, fill_struct
from client_sdk.wire.tensors import tensor_from_proto

_INT64 = np.iinfo(np.int64)


class RemoteClient:
    """Where the host is, and values in and out of messages.

    Attributes:
        address: Of the host, as it was given.
        guard: To be held by each reset, step and frame.
        driver: The environments there.
        observations: Of one environment.
        actions: Of one environment.
        n: How many.
        metadata: Of the environment, with the ways to render it here.
        viewer: The window of mode ``"human"``.
    """

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
            if not (is_number(value) and value > 0):
                raise InvalidValueError(
                    f"expected a positive number of seconds, got {value!r}", name
                )
        self.address = address
        where = Address.parse(address)
        check_token(token, where, tls=tls, insecure=insecure)
        check_type(env_id, (str, type(None)), "the id of an environment, or None", "env_id")
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
            Endpoint(
                where, tls, token, peer="host of environments", welcome="make the environment"
            ),
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
        self._steps = self._messages()

    def _messages(self) -> StepMessages:
        return StepMessages(self.driver.handle, self.observations, self.actions, self.n)

    def reset(
        self, seeds: Sequence[int] | None, options: Mapping[str, Any] | None
    ) -> pb.ResetResponse:
        """Begin an episode in each.

        Raises:
            InvalidValueError: Seeds or options that cannot be sent.
            PolicyClientError: As in ``EnvDriver.reset``.
        """
        reset = pb.ResetRequest()
        for seed in seeds or ():
            if not (is_whole(seed) and 0 <= seed <= _INT64.max):
                raise InvalidValueError(
                    f"expected a whole number from 0 to {_INT64.max}, got {seed!r}", "seed"
                )
            reset.seeds.append(int(seed))
        if options is not None:
            try:
                fill_struct(reset.options, options)
            except Unsendable as error:
                raise InvalidValueError(str(error), "options") from None
        return self.driver.reset(reset)

    def step(self, actions: Columns) -> Stepped:
        """One step of each, with actions of the action space.

        Raises:
            PolicyClientError: As in ``EnvDriver.exchange`` and ``read``; or what came is not of the space.
        """
        steps = self._current_steps()
        data = self.driver.exchange(steps.request(actions), "step")
        return steps.read_answer(data) or self._parsed(data)

    def step_one(self, action: Any) -> OneStep:
        """One step of the only one, as Gymnasium tells it.

        Raises:
            PolicyClientError: As in ``step``; or that is no action.
        """
        steps = self._current_steps()
        data = self.driver.exchange(steps.one_request(action) or self._request(action), "step")
        step = steps.read_one_answer(data)
        if step is not None:
            return step
        observations, rewards, terminated, truncated, infos = self._parsed(data)
        return (
            self.observations.value(observations, 0),
            rewards[0],
            terminated[0],
            truncated[0],
            dict_of_struct(infos[0]) if infos else {},
        )

    def _current_steps(self) -> StepMessages:
        steps = self._steps
        if steps.handle != self.driver.handle:  # made again since
            self._steps = steps = self._messages()
        return steps

    def _request(self, action: Any) -> bytes:
        try:
            return self._steps.request(self.actions.columns_of(action, "action"))
        except Fault as fault:
            raise error_from_fault(fault) from None

    def _parsed(self, data: bytes) -> Stepped:
        response = self.driver.read(data, "step").step
        try:
            return self._steps.parsed(response)
        except Fault as fault:
            raise error_from_fault(fault) from None

    def first(self, response: pb.ResetResponse) -> Columns:
        """The observations that a reset gave.

        Raises:
            PolicyClientError: They are not of the space.
        """
        try:
            return self.observations.decode(response.observations, self.n, "observations")
        except Fault as fault:
            raise error_from_fault(fault) from None

    def frame(self, index: int) -> NDArray[np.uint8]:
        """What an environment looks like: [height, width, 3]; raises as ``EnvDriver.render``."""
        try:
            return np.array(tensor_from_proto(self.driver.render(index), "frame"))
        except Fault as fault:
            raise error_from_fault(fault) from None

    def close(self) -> None:
        """Have the environments closed. Idempotent."""
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


def _shown_here(modes: list[Any]) -> list[Any]:
    """Whatever can be drawn can be shown on this side."""
    return sorted({"human", "rgb_array"} if "rgb_array" in modes else [])
