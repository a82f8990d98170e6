"""The gRPC methods of ``EnvService``: decode, call, encode.

Runs in the server's pool threads; what touches an environment runs in its handle's own. Messages
are parsed here rather than by gRPC, so that garbage gets an answer that says so.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from client_sdk.env_handles import EnvHandle
from client_sdk.env_registry import EnvRegistry
from client_sdk.env_source import EnvSource
from client_sdk.frame_tap import FrameTap
from client_sdk.wire import PROTOCOL_VERSION
from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.batches import Columns
from client_sdk.wire.faults import ERROR_TRAILER, Fault, Reason
from client_sdk.wire.spaces import space_to_proto
from client_sdk.wire.structs import dict_of_struct, fill_struct_leniently
from client_sdk.wire.tensors import tensor_to_proto

logger = logging.getLogger(__name__)

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["EnvService"].full_name

_WATCH_WAIT_S = 1.0
"""Between two looks whether a watcher that waits for an environment is still there."""

_MessageT = TypeVar("_MessageT", bound=Message)
_Context = grpc.ServicerContext


class EnvService:
    """Answers those who step hosted environments; one per host."""

    def __init__(
        self, source: EnvSource, registry: EnvRegistry, *, lease_s: float, max_watchers: int
    ) -> None:
        self._source = source
        self._registry = registry
        self._lease_s = lease_s
        self._max_watchers = max_watchers
        self._watchers = threading.BoundedSemaphore(max_watchers)

    def handler(self) -> grpc.GenericRpcHandler:
        """What to register with a gRPC server of threads."""
        return grpc.method_handlers_generic_handler(
            SERVICE_NAME,
            {
                "Make": _unary(pb.MakeRequest, self._make),
                "Reset": _unary(pb.ResetRequest, self._reset),
                "Step": _unary(pb.StepRequest, self._step),
                "Drive": grpc.stream_stream_rpc_method_handler(self._drive),
                "Render": _unary(pb.RenderRequest, self._render),
                "StreamFrames": grpc.unary_stream_rpc_method_handler(self._stream_frames),
                "Close": _unary(pb.CloseRequest, self._close),
            },
        )

    def _make(self, request: pb.MakeRequest) -> pb.MakeResponse:
        _check_protocol(request.protocol_version)
        make = self._source.maker(
            request.env_id,
            dict_of_struct(request.kwargs, whole_numbers=True),
            request.render_mode,
        )
        handle = self._registry.make(make, request.num_envs)
        try:
            response = pb.MakeResponse(
                env_handle=handle.id,
                observation_space=space_to_proto(handle.hosted.observation_space),
                action_space=space_to_proto(handle.hosted.action_space),
                protocol_version=PROTOCOL_VERSION,
            )
            # Of metadata only what JSON knows: the rest is for Python on this side.
            fill_struct_leniently(response.metadata, handle.hosted.metadata)
            response.lease.FromMicroseconds(int(self._lease_s * 1e6))
        except BaseException:
            self._registry.close(handle.id)
            raise
        logger.info(
            "environment %d: made %s%s",
            handle.number,
            request.env_id or self._source.name,
            f", {request.num_envs} in lockstep" if request.num_envs else "",
        )
        return response

    def _reset(self, request: pb.ResetRequest) -> pb.ResetResponse:
        response = pb.ResetResponse()
        handle = self._registry.find(request.env_handle)
        handle.play(lambda hosted: hosted.reset(request, response))
        return response

    def _step(self, request: pb.StepRequest) -> pb.StepResponse:
        response = pb.StepResponse()
        handle = self._registry.find(request.env_handle)
        actions = handle.hosted.actions_in(request.actions)
        handle.play(lambda hosted: handle.steps.fill(response, hosted.step(actions)))
        return response

    def _drive(self, requests: Iterator[bytes], context: _Context) -> Iterator[bytes]:
        drive = _Drive(self._registry)
        if not context.add_callback(drive.end):
            return
        for data in requests:
            yield drive.answer(data)

    def _render(self, request: pb.RenderRequest) -> pb.RenderResponse:
        response = pb.RenderResponse()
        frame = self._registry.find(request.env_handle).render(request.env_index)
        tensor_to_proto(frame, response.frame)
        return response

    def _stream_frames(self, data: bytes, context: _Context) -> Iterator[bytes]:
        # Each holds a thread, and must leave some to those who step.
        if not self._watchers.acquire(blocking=False):
            _abort(
                context,
                Fault(
                    Reason.LIMIT_EXCEEDED,
                    f"{self._max_watchers} clients watch already, as many as max_watchers allows",
                    retry_after_s=1.0,
                ),
            )
        try:
            request = _parse(pb.StreamFramesRequest, data)
            for handle in self._handles_to_watch(request.env_handle, context):
                tap = FrameTap(request.env_index, request.max_frames_per_second)
                if not context.add_callback(tap.end):
                    return
                handle.watch(tap)
                try:
                    for frame in tap.frames():
                        response = pb.StreamFramesResponse()
                        tensor_to_proto(frame, response.frame)
                        yield response.SerializeToString()
                finally:
                    handle.unwatch(tap)
        except Fault as fault:
            _abort(context, fault)
        finally:
            self._watchers.release()

    def _handles_to_watch(self, handle_id: str, context: _Context) -> Iterator[EnvHandle]:
        """That handle; or one after the other, as the host's environments come and go."""
        if handle_id:
            yield self._registry.find(handle_id)
            return
        while context.is_active():
            handle = self._registry.newest(_WATCH_WAIT_S)
            if handle is not None:
                yield handle

    def _close(self, request: pb.CloseRequest) -> pb.CloseResponse:
        self._registry.close(request.env_handle)
        return pb.CloseResponse()


class _Drive:
    """One stream of resets and steps, and the handle that it is for."""

    def __init__(self, registry: EnvRegistry) -> None:
        self._registry = registry
        self._handle: EnvHandle | None = None
        self._ended = False

    def answer(self, data: bytes) -> bytes:
        """The answer to one request; a refusal is one."""
        try:
            handle = self._handle
            if handle is not None and (actions := handle.steps.read_request(data)) is not None:
                return self._step(handle, actions)
            return self._do(_parse(pb.DriveRequest, data))
        except Exception as error:  # told to the client, and logged
            fault = _as_fault(error, "a Drive failed")
            return pb.DriveResponse(error=fault.to_detail()).SerializeToString()

    def _do(self, request: pb.DriveRequest) -> bytes:
        if request.HasField("step"):
            handle = self._handle_of(request.step.env_handle)
            return self._step(handle, handle.hosted.actions_in(request.step.actions))
        if request.HasField("reset"):
            reset, response = request.reset, pb.DriveResponse()
            response.reset.SetInParent()  # else an empty Dict as observation would be no answer
            self._handle_of(reset.env_handle).play(
                lambda hosted: hosted.reset(reset, response.reset), driving=True
            )
            return response.SerializeToString()
        raise Fault(Reason.MALFORMED_TENSOR, "expected a reset or a step, got neither", "request")

    @staticmethod
    def _step(handle: EnvHandle, actions: Columns) -> bytes:
        return handle.play(lambda hosted: handle.steps.answer(hosted.step(actions)), driving=True)

    def _handle_of(self, handle_id: str) -> EnvHandle:
        if self._handle is None:
            handle = self._registry.find(handle_id)
            handle.attach()
            self._handle = handle
            if self._ended:
                self._registry.close(handle.id)
        elif handle_id not in ("", self._handle.id):
            raise Fault(
                Reason.STEP_OUT_OF_ORDER,
                "expected the handle that this Drive began with: one Drive per handle",
                "env_handle",
            )
        return self._handle

    def end(self) -> None:
        """The stream is over, and its environments with it. Any thread."""
        self._ended = True
        if self._handle is not None:
            self._registry.close(self._handle.id)


def _unary(
    kind: type[_MessageT], call: Callable[[_MessageT], Message]
) -> grpc.RpcMethodHandler[Any, Any]:
    def handle(data: bytes, context: _Context) -> bytes:
        try:
            return call(_parse(kind, data)).SerializeToString()
        except Exception as error:  # told to the client, and logged
            _abort(context, _as_fault(error, f"{kind.__name__} failed"))

    return grpc.unary_unary_rpc_method_handler(handle)


def _parse(kind: type[_MessageT], data: bytes) -> _MessageT:
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise Fault(
            Reason.MALFORMED_TENSOR, f"these {len(data)} bytes are no {kind.__name__}: {error}"
        ) from error


def _as_fault(error: Exception, what: str) -> Fault:
    if isinstance(error, Fault):
        return error
    incident_id = secrets.token_hex(4)
    logger.error("incident %s: %s", incident_id, what, exc_info=error)
    return Fault(Reason.INTERNAL, f"internal error; the host's log knows it as {incident_id}")


def _abort(context: _Context, fault: Fault) -> NoReturn:
    context.set_trailing_metadata(((ERROR_TRAILER, fault.to_detail().SerializeToString()),))
    context.abort(fault.status, str(fault))
    raise fault  # unreachable: abort raises


def _check_protocol(version: str) -> None:
    ours, theirs = PROTOCOL_VERSION.partition(".")[0], version.partition(".")[0]
    if theirs != ours:
        raise Fault(
            Reason.INCOMPATIBLE_PROTOCOL,
            f"this host speaks protocol {PROTOCOL_VERSION}, the client {version or 'none'!r}; "
            "their major numbers must be the same. Update the older side",
            "protocol_version",
        )
