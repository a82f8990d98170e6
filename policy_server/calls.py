"""What all gRPC methods have in common: bytes to a message, and what is raised to a status.

Loop thread only. Messages are parsed here rather than by gRPC, so that garbage gets an answer that
says so.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, NoReturn, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from client_sdk.wire.faults import ERROR_TRAILER, Fault, Reason
from policy_server.faults import as_fault

Context = grpc.aio.ServicerContext[bytes, bytes]
_MessageT = TypeVar("_MessageT", bound=Message)


def parse(kind: type[_MessageT], data: bytes) -> _MessageT:
    """The message that a client sent.

    Raises:
        Fault: MALFORMED_TENSOR; it is none.
    """
    try:
        return kind.FromString(data)
    except DecodeError:
        raise Fault(
            Reason.MALFORMED_TENSOR, f"not a {kind.__name__}: {len(data)} bytes do not parse"
        ) from None


def unary(method: Callable[[bytes], Awaitable[Message]]) -> grpc.RpcMethodHandler[Any, Any]:
    """A handler that turns what ``method`` raises into a status."""

    async def handle(data: bytes, context: Context) -> bytes:
        try:
            return (await method(data)).SerializeToString()
        except Exception as error:  # one place where every exception becomes a status
            await abort(context, as_fault(error, f"{method.__name__} failed"))

    return grpc.unary_unary_rpc_method_handler(handle)


async def abort(context: grpc.aio.ServicerContext[Any, Any], fault: Fault) -> NoReturn:
    """End a call with a fault: the status, its message, and an ErrorDetail in the trailer."""
    await context.abort(
        fault.status,
        str(fault),
        trailing_metadata=((ERROR_TRAILER, fault.to_detail().SerializeToString()),),
    )
