"""``AioConnection`` and ``AioStream``: ``PolicyService`` on ``grpc.aio``, as ``transport`` is blocking.

One event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import grpc

from client_sdk.call_errors import Disconnected, error_of_status, error_of_stream
from client_sdk.config import Address
from client_sdk.endpoint import Endpoint
from client_sdk.errors import PolicyClientError
from client_sdk.transport import SERVICE
from client_sdk.wire import policyserver_pb2 as pb

_T = TypeVar("_T")


class AioConnection:
    """A channel to one server: every rpc of the contract. One event loop."""

    def __init__(self, endpoint: Endpoint, target: Address | None = None) -> None:
        target = target or endpoint.address
        options, credentials = endpoint.options(target), endpoint.credentials
        self._metadata = endpoint.metadata or None
        self._channel = (
            grpc.aio.insecure_channel(str(target), options)
            if credentials is None
            else grpc.aio.secure_channel(str(target), credentials, options)
        )

    async def open_session(
        self, request: pb.OpenSessionRequest, timeout_s: float
    ) -> pb.OpenSessionResponse:
        """Call ``OpenSession``.

        Raises:
            PolicyClientError: It was refused.
            Disconnected: It did not get there, or back.
        """
        return await self._unary("OpenSession", request, pb.OpenSessionResponse, timeout_s)

    async def close_session(
        self, request: pb.CloseSessionRequest, timeout_s: float
    ) -> pb.CloseSessionResponse:
        """Call ``CloseSession``; raises as ``open_session``."""
        return await self._unary("CloseSession", request, pb.CloseSessionResponse, timeout_s)

    async def act(self, request: pb.ActRequest, timeout_s: float) -> pb.ActResponse:
        """Call ``Act``; raises as ``open_session``."""
        return await self._unary("Act", request, pb.ActResponse, timeout_s)

    async def get_policy(
        self, request: pb.GetPolicyRequest, timeout_s: float
    ) -> AsyncIterator[pb.GetPolicyResponse]:
        """Call ``GetPolicy``: a header, then pieces; raises as ``open_session``, while read."""
        call: Any = self._channel.unary_stream(
            _path("GetPolicy"),
            pb.GetPolicyRequest.SerializeToString,
            pb.GetPolicyResponse.FromString,
        )
        parts = call(request, timeout=timeout_s, metadata=self._metadata)
        try:
            async for part in parts:
                yield part
        except grpc.aio.AioRpcError as error:
            raise _error_of_call(error) from None
        finally:
            parts.cancel()

    async def upload_episodes(
        self, request: pb.UploadEpisodesRequest, timeout_s: float
    ) -> pb.UploadEpisodesResponse:
        """Call ``UploadEpisodes``; raises as ``open_session``."""
        return await self._unary("UploadEpisodes", request, pb.UploadEpisodesResponse, timeout_s)

    def stream_act(self) -> AioStream:
        """Call ``StreamAct``."""
        call: Any = self._channel.stream_stream(_path("StreamAct"))
        return AioStream(call(metadata=self._metadata))

    async def close(self) -> None:
        """Close the channel, and whatever runs on it."""
        await self._channel.close()

    async def _unary(self, name: str, request: Any, answer: type[_T], timeout_s: float) -> _T:
        reader: Callable[[bytes], _T] = answer.FromString  # type: ignore[attr-defined]
        call: Any = self._channel.unary_unary(_path(name), type(request).SerializeToString, reader)
        try:
            response: _T = await call(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise _error_of_call(error) from None
        except asyncio.CancelledError:
            if _is_cancelled():
                raise
            raise Disconnected("the connection was given up") from None
        return response


class AioStream:
    """``StreamAct``: bytes out, bytes in. One reader; any number of tasks may send."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._outbox: deque[bytes] = deque()
        self._writing = False

    async def send(self, data: bytes) -> None:
        """Send in the order of calls. What goes wrong is told to the reader."""
        if self._writing:  # gRPC takes one write at a time; whoever writes goes on to the end
            self._outbox.append(data)
            return
        self._writing = True
        try:
            await self._call.write(data)
            while self._outbox:
                await self._call.write(self._outbox.popleft())
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            self._outbox.clear()
        except asyncio.CancelledError:
            self._outbox.clear()
            if _is_cancelled():
                raise
        finally:
            self._writing = False

    async def receive(self) -> bytes:
        """The next answer.

        Raises:
            Disconnected: The stream has ended.
            PolicyClientError: The server ended it with a refusal.
        """
        call = self._call
        try:
            data = await call.read()
        except grpc.aio.AioRpcError as error:
            raise error_of_stream(_error_of_call(error)) from None
        except asyncio.CancelledError:
            if _is_cancelled():
                raise
            raise Disconnected("the stream was cancelled") from None
        if data is grpc.aio.EOF:
            raise Disconnected("the server ended the stream")
        message: bytes = data
        return message

    def close(self) -> None:
        """Give up the stream."""
        with contextlib.suppress(asyncio.InvalidStateError):
            self._call.cancel()


def _path(name: str) -> str:
    return f"/{SERVICE}/{name}"


def _is_cancelled() -> bool:
    """Whether it is this task that is cancelled, and not the call: gRPC raises the same for both."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _error_of_call(error: grpc.aio.AioRpcError) -> PolicyClientError | Disconnected:
    return error_of_status(error.code(), error.details(), error.trailing_metadata())
