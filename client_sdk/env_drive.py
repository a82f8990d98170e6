"""``EnvDrive``: one stream of resets and steps, and the environments that it is for.

Requests go from the thread in which gRPC receives them straight to the environments' own, and that
answers: a change of thread costs as much as all else that is done for a step here.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from typing import Any, cast

import grpc

from client_sdk.env_faults import as_fault, parse
from client_sdk.env_handles import EnvHandle
from client_sdk.env_registry import EnvRegistry
from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.faults import Fault, Reason

_SENT_AT_ONCE_BYTES = 48 * 1024
"""HTTP/2 lets 64 KiB pass unread: sending so much waits for nobody who reads his answers."""

_Send = Callable[[bytes | None], object]


class EnvDrive:
    """Answers one stream, one request after the other. The first one names the handle."""

    def __init__(self, registry: EnvRegistry) -> None:
        self._registry = registry
        self._handle: EnvHandle | None = None
        self._ended = False
        self._send: _Send | None = None
        # One item for each request: what is still to be sent of its answer.
        self._answered: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

    def handler(self) -> grpc.RpcMethodHandler[Any, Any]:
        """What gRPC is to call for this stream, and for no other."""

        def answer(requests: Iterator[bytes], context: Any, send: _Send | None = None) -> Any:
            return self._answer_all(requests, context, send)

        # Then ``send`` is given, and works in any thread. Where gRPC does not know the attribute
        # any more, all answers take the way of the large ones.
        answer.experimental_non_blocking = True  # type: ignore[attr-defined]
        return grpc.stream_stream_rpc_method_handler(answer, request_deserializer=self._received)

    # gRPC's receiving thread.

    def _received(self, data: bytes) -> bytes:
        handle = self._handle
        if handle is not None:
            handle.post(self._answer, data)
        return data

    # A thread of gRPC's pool.

    def _answer_all(
        self, requests: Iterator[bytes], context: Any, send: _Send | None
    ) -> Iterator[bytes] | None:
        answers = self._answers(requests, context)
        if send is None:
            return answers
        self._send = send
        try:
            for answer in answers:
                send(answer)
            send(None)
        finally:
            self._send = _nowhere  # it and gRPC's call would hold each other
        return None

    def _answers(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        """The answers that the environments' thread does not send itself."""
        if not context.add_callback(self._end):
            return
        # gRPC receives the next request when it is asked for it here: a client that does not wait
        # for its answers has to wait all the same.
        for data in requests:
            if self._handle is not None:
                self._handle.settle()
            elif (refusal := self._begin(data)) is not None:
                yield refusal
                continue
            answer = self._answered.get()
            if answer is not None:
                yield answer

    def _begin(self, data: bytes) -> bytes | None:
        """Take the handle that the first request names, and have the request answered.

        Returns:
            An answer that says why not.
        """
        try:
            handle = self._registry.find(_handle_id(parse(pb.DriveRequest, data)))
            handle.attach()
        except Exception as error:  # told to the client, and logged
            return _refusal(error)
        self._handle = handle
        if self._ended:
            self._registry.close(handle.id)
        handle.post(self._answer, data)
        handle.settle()
        return None

    # Any thread.

    def _end(self) -> None:
        """The stream is over, and its environments with it."""
        self._ended = True
        self._answered.put(None)
        if self._handle is not None:
            self._registry.close(self._handle.id)

    # The environments' thread.

    def _answer(self, data: bytes) -> None:
        handle, send, unsent = cast("EnvHandle", self._handle), self._send, None
        try:
            try:
                answer = handle.alive(_answer_of, handle, data)
            except Exception as error:  # told to the client, and logged
                answer = _refusal(error)
            if send is None or len(answer) > _SENT_AT_ONCE_BYTES:
                unsent = answer
            else:
                send(answer)
        finally:
            self._answered.put(unsent)
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
