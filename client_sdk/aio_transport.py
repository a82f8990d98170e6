"""``AioConnection`` and ``AioStream``: ``PolicyService`` on ``grpc.aio``, as ``transport`` is blocking.

Where a stream has one question at a time, it goes one level deeper than gRPC's public classes: see
``dialogue``. One event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Sized
from typing import Any, TypeVar

import grpc
from grpc._cython import cygrpc  # type: ignore[attr-defined]  # the stubs leave it out

from client_sdk.call_errors import Disconnected, error_of_status, error_of_stream
from client_sdk.config import Address
from client_sdk.endpoint import Endpoint
from client_sdk.errors import PolicyClientError
from client_sdk.transport import SERVICE
from client_sdk.wire import policyserver_pb2 as pb

_T = TypeVar("_T")

_NO_FLAGS = 0
_NEEDED = ("execute_batch", "ExecuteBatchError", "ReceiveMessageOperation", "SendMessageOperation")
_QUESTIONS = all(hasattr(cygrpc, name) for name in _NEEDED)
"""Whether this gRPC has what ``AioStream.ask`` needs."""

_PATIENCE_S = 0.05
"""For the answer to a question, once something else is to be sent."""


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
    """``StreamAct``: bytes out, bytes in. One reader; any number of tasks may send.

    Attributes:
        gave_way: It was ended from this side, and another one is to take its place.
    """

    def __init__(self, call: Any) -> None:
        self.gave_way = False
        self._call = call
        # Of gRPC's Cython layer; None: it has changed inside, and there are no questions.
        self._inner: Any = getattr(call, "_cython_call", None) if _QUESTIONS else None
        self._loop = asyncio.get_running_loop()
        self._outbox: deque[bytes] = deque()
        self._writing = False
        self._begun = False  # gRPC has sent the first message, and takes operations
        self._idle: asyncio.Future[None] | None = None  # what the reader waits for
        self._asking = False
        self._unread: bytes | None = None
        self._patience: asyncio.TimerHandle | None = None
        self._flusher: asyncio.Task[None] | None = None
        call.add_done_callback(self._ended)

    async def send(self, data: bytes) -> None:
        """Send in the order of calls. What goes wrong is told to the reader."""
        self._outbox.append(data)
        if self._asking:
            if self._patience is None:
                self._patience = self._loop.call_later(_PATIENCE_S, self.give_way)
            return
        self.wake()
        await self._flush()

    async def _flush(self) -> None:
        if self._writing:  # gRPC takes one write at a time; whoever writes goes on to the end
            return
        self._writing = True
        try:
            while self._outbox:
                await self._call.write(self._outbox.popleft())
            self._begun = True
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            self._outbox.clear()
        except asyncio.CancelledError:
            self._outbox.clear()
            if _is_cancelled():
                self.give_way()  # gRPC may have cancelled the call with the task
                raise
        finally:
            self._writing = False

    @property
    def may_ask(self) -> bool:
        """Whether nothing is on its way, and the reader idle."""
        return (
            self._idle is not None
            and not self._idle.done()
            and not (self._writing or self._asking)
            and self._begun
        )

    async def ask(self, question: bytes) -> bytes | None:
        """Send, and receive the next answer in the place of the reader, if that ``may_ask``.

        Both are one operation of gRPC's then, and wake one task: less than half of the work. But
        nothing else can be sent meanwhile, and to be cancelled costs the stream.

        Returns:
            None where it has ended: the reader will say why.
        """
        answer = cygrpc.ReceiveMessageOperation(_NO_FLAGS)
        operations = (cygrpc.SendMessageOperation(question, _NO_FLAGS), answer)
        self._asking = True
        try:
            await cygrpc.execute_batch(self._inner, operations, self._loop)
        except cygrpc.ExecuteBatchError:
            return None
        except asyncio.CancelledError:
            self.give_way()
            raise
        finally:
            self._asking = False
            if self._patience is not None:
                self._patience.cancel()
                self._patience = None
            if self._outbox:
                self.wake()
                self._flusher = self._loop.create_task(self._flush())
        message: bytes | None = answer.message()
        return message

    def put_back(self, data: bytes) -> None:
        """Have the reader receive that once more."""
        self._unread = data
        self.wake()

    async def receive(self, expected: Sized) -> bytes:
        """The next answer; idle while none is expected. For the reader.

        Raises:
            Disconnected: The stream has ended.
            PolicyClientError: The server ended it with a refusal.
        """
        if self._inner is not None and not expected and not self._call.done():
            self._idle = self._loop.create_future()
            try:
                await self._idle
            finally:
                self._idle = None
        unread, self._unread = self._unread, None
        if unread is not None:
            return unread
        try:
            data = await self._call.read()
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

    def give_way(self) -> None:
        """End it, so that another one can carry what this one cannot."""
        self.gave_way = True
        self.close()

    def _ended(self, _call: object) -> None:
        self.wake()

    def wake(self) -> None:
        """There is something to read."""
        if self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

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
