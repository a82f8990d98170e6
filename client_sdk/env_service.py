"""The gRPC methods of ``EnvService``: decode, call, encode.

Runs in the server's pool threads; what touches an environment runs in its handle's own. Messages
are parsed here rather than by gRPC, so that garbage gets an answer that says so.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import grpc
from google.protobuf.message import Message

from client_sdk.env_drive import EnvDrive
from client_sdk.env_faults import as_fault, parse
from client_sdk.env_handles import EnvHandle
from client_sdk.env_registry import EnvRegistry
from client_sdk.env_source import EnvSource
from client_sdk.frame_tap import FrameTap
from client_sdk.wire import PROTOCOL_VERSION
from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.faults import ERROR_TRAILER, Fault, Reason
from client_sdk.wire.spaces import space_to_proto
from client_sdk.wire.structs import dict_of_struct, fill_struct_leniently
from client_sdk.wire.tensors import tensor_to_proto

logger = logging.getLogger(__name__)

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["EnvService"].full_name

_DRIVE = f"/{SERVICE_NAME}/Drive"

_WATCH_WAIT_S = 1.0
"""Between two looks whether a watcher that waits for an environment is still there."""

_MessageT = TypeVar("_MessageT", bound=Message)
_ResponseT = TypeVar("_ResponseT", bound=Message)
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
        return _Methods(
            {
                "Make": _unary(pb.MakeRequest, self._make, self._unmake),
                "Reset": _unary(pb.ResetRequest, self._reset),
                "Step": _unary(pb.StepRequest, self._step),
                "Render": _unary(pb.RenderRequest, self._render),
                "StreamFrames": grpc.unary_stream_rpc_method_handler(self._stream_frames),
                "Close": _unary(pb.CloseRequest, self._close),
            },
            self._registry,
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

    def _unmake(self, response: pb.MakeResponse) -> None:
        """Close what was made for a client that has left meanwhile: it will never know the handle."""
        self._registry.close(response.env_handle)

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
            request = parse(pb.StreamFramesRequest, data)
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


class _Methods(grpc.GenericRpcHandler):  # type: ignore[misc, unused-ignore]
    """Finds the handler of a call. That of a Drive is for one stream alone."""

    def __init__(
        self, handlers: dict[str, grpc.RpcMethodHandler[Any, Any]], registry: EnvRegistry
    ) -> None:
        self._handlers = {f"/{SERVICE_NAME}/{name}": each for name, each in handlers.items()}
        self._registry = registry

    def service(self, handler_call_details: Any) -> Any:
        if handler_call_details.method == _DRIVE:
            return EnvDrive(self._registry).handler()
        return self._handlers.get(handler_call_details.method)


def _unary(
    kind: type[_MessageT],
    call: Callable[[_MessageT], _ResponseT],
    unheard: Callable[[_ResponseT], None] | None = None,
) -> grpc.RpcMethodHandler[Any, Any]:
    """How one method is served.

    Args:
        kind: Of its requests.
        call: Answers one.
        unheard: Given an answer that nobody waits for any more.
    """

    def handle(data: bytes, context: _Context) -> bytes:
        try:
            response = call(parse(kind, data))
            if unheard is not None and not context.is_active():
                unheard(response)
            return response.SerializeToString()
        except Exception as error:  # told to the client, and logged
            _abort(context, as_fault(error, f"{kind.__name__} failed"))

    return grpc.unary_unary_rpc_method_handler(handle)


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
