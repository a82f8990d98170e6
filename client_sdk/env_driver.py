"""``EnvDriver``: environments on a host, made, driven over one stream, and made again after a loss.

What ``RemoteEnv`` and ``RemoteVectorEnv`` have in common; it knows messages, not values. One thread
at a time.
"""

from __future__ import annotations

import contextlib
import logging
import time
from typing import Any

import gymnasium as gym
from google.protobuf.message import DecodeError

from client_sdk.attempts import Attempts
from client_sdk.call_errors import Disconnected, Overdue
from client_sdk.channel import Stream
from client_sdk.connecting import report, verdict
from client_sdk.dialogue import Dialogue
from client_sdk.endpoint import Endpoint
from client_sdk.env_connection import EnvConnection
from client_sdk.errors import (
    EnvironmentFailedError,
    EnvironmentLostError,
    LimitExceededError,
    PolicyClientError,
    ServerError,
    SpaceMismatchError,
    UnavailableError,
    UnknownEnvironmentError,
    error_from_fault,
)
from client_sdk.traffic import Traffic
from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.faults import Fault
from client_sdk.wire.spaces import diff, space_from_proto
from client_sdk.wire.structs import dict_of_struct

logger = logging.getLogger(__name__)

_CLOSE_TIMEOUT_S = 2.0
_FAILED = "the environment failed, and the host has closed it"
_CURE = "The episode is lost; reset() begins the next one"


class EnvDriver:
    """One handle on a host, and the next one after it.

    Attributes:
        observation_space: Of one environment, as the host told it.
        action_space: Of one environment.
        metadata: Of the environment.
        handle: What requests name; another one once they have been made again.
        traffic: Resets and steps, and their answers, of all handles so far.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        make: pb.MakeRequest,
        *,
        connect_timeout_s: float,
        step_timeout_s: float,
    ) -> None:
        """Connect, and have the environments made.

        Raises:
            ConnectError: No host answered in time; the class says how.
            PolicyClientError: The host refuses.
        """
        self._endpoint = endpoint
        self._make = make
        self._connect_timeout_s = connect_timeout_s
        self._step_timeout_s = step_timeout_s
        self._connection: EnvConnection | None = None
        self._drive: Dialogue | Stream | None = None
        self._lost = ""
        self._spaces: tuple[pb.Space, pb.Space] | None = None
        self.handle = ""
        self.traffic = Traffic()
        self._connect()

    # -- the connection

    @property
    def connected(self) -> bool:
        """Whether there is a stream to the environments, as far as this side knows."""
        return self._drive is not None

    def _connect(self) -> None:
        attempts = Attempts(
            time.monotonic(), self._connect_timeout_s, self._connect_timeout_s, None
        )
        while True:
            failure: Disconnected | PolicyClientError
            try:
                self._open(attempts.timeout_s(time.monotonic()))
                return
            except LimitExceededError:  # whoever has them may keep them
                raise
            except (Disconnected, PolicyClientError) as error:
                failure = error
            now = time.monotonic()
            delay_s = attempts.delay_s(now, failure)
            if delay_s is None:
                raise verdict(self._endpoint, attempts, failure, now)
            report(self._endpoint, attempts, failure, now)
            time.sleep(delay_s)

    def _open(self, timeout_s: float) -> None:
        """One attempt."""
        connection = EnvConnection(self._endpoint)
        try:
            made = connection.make(self._make, timeout_s)
            try:
                self._adopt(made)
            except PolicyClientError:
                self._close(connection, made.env_handle)  # else the host keeps it for a lease
                raise
            self._drive = connection.drive(self.handle)
        except BaseException:
            connection.disconnect()
            raise
        self._connection = connection
        self._lost = ""

    def _adopt(self, made: pb.MakeResponse) -> None:
        try:
            if self._spaces is None:
                self.observation_space: gym.Space[Any] = space_from_proto(made.observation_space)
                self.action_space: gym.Space[Any] = space_from_proto(made.action_space)
                self.metadata = dict_of_struct(made.metadata, whole_numbers=True)
                self._spaces = (made.observation_space, made.action_space)
            names = ("observation_space", "action_space")
            spaces = (made.observation_space, made.action_space)
            for name, before, now in zip(names, self._spaces, spaces, strict=True):
                difference = diff(before, now)
                if difference is not None:
                    raise SpaceMismatchError(
                        f"the host at {self._endpoint.address} has restarted with another "
                        f"environment: {difference}. Make another RemoteEnv",
                        name,
                    )
        except Fault as fault:
            raise error_from_fault(fault) from None
        self.handle = made.env_handle

    def _drop(self, lost: str) -> None:
        """Give up the handle; the host closes it when its stream ends."""
        self._lost = lost
        drive, self._drive = self._drive, None
        connection, self._connection = self._connection, None
        if drive is not None:
            drive.close()
        if connection is not None:
            connection.disconnect()

    # -- the environments

    def reset(self, request: pb.ResetRequest) -> pb.ResetResponse:
        """Begin an episode in each; made again first, where the last ones are gone.

        Raises:
            EnvironmentFailedError: An environment raised.
            PolicyClientError: The host refuses, or cannot be reached any more.
        """
        if self._drive is not None:
            try:
                return self._reset(request)
            except (EnvironmentLostError, UnknownEnvironmentError) as error:
                # Nothing is lost between two episodes.
                logger.info("%s; making the environment again", error)
        self._connect()
        return self._reset(request)

    def _reset(self, request: pb.ResetRequest) -> pb.ResetResponse:
        request.env_handle = self.handle
        data = self.exchange(pb.DriveRequest(reset=request).SerializeToString(), "reset")
        return self.read(data, "reset").reset

    def exchange(self, request: bytes, kind: str) -> bytes:
        """Send a request, and wait for its answer.

        Args:
            request: A serialized ``DriveRequest`` that names the handle.
            kind: What it is: "reset" or "step".

        Returns:
            What came back; ``read`` knows what it says.

        Raises:
            EnvironmentLostError: The connection or the host is gone, and the episode with it.
        """
        drive = self._drive
        if drive is None:
            raise EnvironmentLostError(f"{self._lost}. {_CURE}")
        try:
            self.traffic.sent(request)
            data = drive.ask(request, self._step_timeout_s)
            self.traffic.received(data)
            return data
        except Overdue:
            why = (
                f"the environment at {self._endpoint.address} did not answer a {kind} within "
                f"step_timeout={self._step_timeout_s:g} s"
            )
            self._drop(why)
            raise EnvironmentLostError(f"{why}. {_CURE}") from None
        except Disconnected as error:
            why = f"the connection to the host at {self._endpoint.address} is lost ({error.why})"
            self._drop(why)
            raise EnvironmentLostError(f"{why}. {_CURE}") from None
        except BaseException as error:  # Ctrl-C above all: the answer is still to come
            self._drop(f"the last call was given up ({type(error).__name__})")
            raise

    def read(self, data: bytes, kind: str) -> pb.DriveResponse:
        """The answer of that kind in what came back.

        Raises:
            EnvironmentLostError: The host is stopping.
            EnvironmentFailedError: An environment raised, and has been closed.
            PolicyClientError: The host refuses, and nothing has happened; or that is no answer.
        """
        try:
            response = pb.DriveResponse.FromString(data)
        except DecodeError as error:
            self._drop(f"the host at {self._endpoint.address} sent what is no answer")
            raise ServerError(f"{self._lost}: {error}") from None
        outcome = response.WhichOneof("outcome")
        if outcome == kind:
            return response
        if outcome == "error":
            refusal = error_from_fault(Fault.from_detail(response.error))
            if isinstance(refusal, EnvironmentFailedError | UnknownEnvironmentError):
                self._drop(_FAILED)
            if isinstance(refusal, UnavailableError):
                self._drop(f"the host at {self._endpoint.address} is stopping")
                raise EnvironmentLostError(f"{self._lost}. {_CURE}")
            raise refusal
        self._drop(f"the host at {self._endpoint.address} answered a {kind} with {outcome}")
        raise ServerError(self._lost)

    def render(self, index: int) -> pb.Tensor:
        """What an environment looks like.

        Raises:
            EnvironmentLostError: The connection or the host is gone.
            PolicyClientError: The host refuses.
        """
        if self._connection is None:
            raise EnvironmentLostError(f"{self._lost}. {_CURE}")
        request = pb.RenderRequest(env_handle=self.handle, env_index=index)
        try:
            return self._connection.render(request, self._step_timeout_s).frame
        except Disconnected as error:
            raise EnvironmentLostError(f"no frame came: {error.why}") from None
        except (EnvironmentFailedError, UnknownEnvironmentError):
            self._drop(_FAILED)
            raise

    def close(self) -> None:
        """Have the environments closed, and disconnect. Blocks for seconds at most."""
        if self._connection is not None:
            self._close(self._connection, self.handle)
        self.abort()

    @staticmethod
    def _close(connection: EnvConnection, handle: str) -> None:
        with contextlib.suppress(Disconnected, PolicyClientError):
            connection.close(pb.CloseRequest(env_handle=handle), _CLOSE_TIMEOUT_S)

    def abort(self) -> None:
        """Disconnect; the host closes the environments."""
        self._drop("the environment is closed")
