"""``EnvDrive``: one stream of resets and steps, and the environments that it is for.

Requests go from the thread in which gRPC receives them straight to the environments' own, and that
answers: a change of thread costs as much as all else that is done for a step here.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, cast

import grpc

from client_sdk.env_faults import as_fault, parse
from client_sdk.env_handles import EnvHandle
from client_sdk.env_registry import EnvRegistry
from client_sdk.request_line import RequestLine
from client_sdk.wire import HANDLE_HEADER
from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.faults import Fault, Reason

_SENT_AT_ONCE_BYTES = 48 * 1024
"""HTTP/2 lets 64 KiB pass unread: sending so much waits for nobody who reads his answers."""

_UNSETTLED = b""
"""In the place of an answer, none of which is empty: the environments' thread has ended before."""

_Send = Callable[[bytes | None], object]


class EnvDrive:
    """Answers one stream, request by request. Its metadata name the handle, or its first request."""

    def __init__(self, registry: EnvRegistry) -> None:
        self._registry = registry
        self._handle: EnvHandle | None = None
        self._ended = False
        self._send: _Send = _nowhere
        self._line: RequestLine | None = None
        self._sending = threading.Lock()
        # What the pool's thread is to send; None: nothing more comes.
        self._unsent: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

    def handler(self) -> grpc.RpcMethodHandler[Any, Any]:
        """What gRPC is to call for this stream, and for no other."""

        def answer(requests: Iterator[bytes], context: Any, send: _Send | None = None) -> Any:
            return self._answer_all(requests, context, send)

        # Then ``send`` is given, and works in any thread. Where gRPC does not know the attribute
        # any more, or has changed inside, all answers take the way of the large ones.
        answer.experimental_non_blocking = True  # type: ignore[attr-defined]
        return grpc.stream_stream_rpc_method_handler(answer, request_deserializer=self._received)

    # gRPC's receiving thread.

    def _received(self, data: bytes) -> bytes:
        if self._handle is not None and self._line is None:
            self._take(data)
        return data

    def _take(self, data: bytes | None) -> None:
        if data is None:
            self._unsent.put(None)
        elif not cast("EnvHandle", self._handle).post(self._answer, data):
            self._unsent.put(_UNSETTLED)

    # A thread of gRPC's pool.

    def _answer_all(
        self, requests: Iterator[bytes], context: Any, send: _Send | None
    ) -> Iterator[bytes] | None:
        if send is None:
            return self._answers(requests, context)
        self._send = send
        with contextlib.suppress(AttributeError, TypeError):  # gRPC has changed inside
            self._line = RequestLine(requests, self._take)
        try:
            for answer in self._answers(requests, context):
                send(answer)
            with self._sending:  # the end must not overtake the last answer
                send(None)
        finally:
            self._send = _nowhere  # it and gRPC's call would hold each other
            self._line = None
        return None

    def _answers(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        """The answers that the environments' thread does not send itself."""
        if not context.add_callback(self._end):
            return
        if not self._is_told_the_handle(context):
            while True:
                data = next(requests, None)
                if data is None:
                    return
                refusal = self._begin(data)
                if refusal is None:
                    break
                yield refusal
        elif not self._receive(requests):
            return
        handle = cast("EnvHandle", self._handle)
        for answer in iter(self._unsent.get, None):
            if answer is _UNSETTLED:
                handle.settle()
                continue
            yield answer
            # Only now: a client that does not wait for its answers has to wait all the same.
            if not self._receive(requests):
                return

    def _receive(self, requests: Iterator[bytes]) -> bool:
        """Have gRPC hand over the next request; False: there is none."""
        if self._line is not None:
            self._line.ask()
            return True
        return next(requests, None) is not None

    def _is_told_the_handle(self, context: Any) -> bool:
        """Take the handle that the metadata name; one that cannot be had, a request is told of."""
        handle_id = dict(context.invocation_metadata()).get(HANDLE_HEADER)
        if handle_id is None:
            return False
        with contextlib.suppress(Fault):
            self._attach(handle_id)
        return self._handle is not None

    def _attach(self, handle_id: str) -> EnvHandle:
        """From here on its environments live as long as this stream.

        Raises:
            Fault: There is none, or another stream has it.
        """
        handle = self._registry.find(handle_id)
        handle.attach()
        self._handle = handle
        if self._ended:
            self._registry.close(handle.id)
        return handle

    def _begin(self, data: bytes) -> bytes | None:
        """Take the handle that the first request names, and have the request answered.

        Returns:
            An answer that says why not.
        """
        try:
            handle = self._attach(_handle_id(parse(pb.DriveRequest, data)))
        except Exception as error:  # told to the client, and logged
            return _refusal(error)
        handle.post(self._answer, data)
        handle.settle()
        return None

    # Any thread.

    def _end(self) -> None:
        """The stream is over, and its environments with it."""
        self._ended = True
        self._unsent.put(None)
        if self._handle is not None:
            self._registry.close(self._handle.id)

    # The environments' thread.

    def _answer(self, data: bytes) -> None:
        handle, line = cast("EnvHandle", self._handle), self._line
        try:
            answer = handle.alive(_answer_of, handle, data)
        except Exception as error:  # told to the client, and logged
            answer = _refusal(error)
        if line is None or len(answer) > _SENT_AT_ONCE_BYTES:
            self._unsent.put(answer)
        else:
            with self._sending:
                # First, for gRPC takes its time to say that something was sent: the next request
                # may be there by then.
                line.ask()
                self._send(answer)
        handle.show()  # now that nobody waits for it


def _answer_of(handle: EnvHandle, data: bytes) -> bytes:
    hosted, steps = handle.hosted, handle.steps
    action = steps.read_one_request(data)
    if action is not None:
        step = hosted.step_one(action)
        return steps.one_answer(step) or steps.answer(hosted.told(step))
    actions = steps.read_request(data)
    if actions is not None:
        return steps.answer(hosted.step(actions))
    request = parse(pb.DriveRequest, data)
    if _handle_id(request) not in ("", handle.id):
        raise Fault(
            Reason.STEP_OUT_OF_ORDER,
            "expected the handle that this Drive began with: one Drive per handle",
            "env_handle",
        )
    if request.HasField("step"):
        return steps.answer(hosted.step(hosted.actions_in(request.step.actions)))
    response = pb.DriveResponse()
    response.reset.SetInParent()  # else an empty Dict as observation would be no answer
    hosted.reset(request.reset, response.reset)
    return response.SerializeToString()


def _handle_id(request: pb.DriveRequest) -> str:
    if request.HasField("step"):
        return request.step.env_handle
    if request.HasField("reset"):
        return request.reset.env_handle
    raise Fault(Reason.MALFORMED_TENSOR, "expected a reset or a step, got neither", "request")


def _refusal(error: Exception) -> bytes:
    fault = as_fault(error, "a Drive failed")
    return pb.DriveResponse(error=fault.to_detail()).SerializeToString()


def _nowhere(_answer: bytes | None) -> None:
    """Where answers go whose stream is over."""
