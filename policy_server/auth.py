"""Who may call: a bearer token, compared in constant time and never logged."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from client_sdk.credentials import token_fault
from policy_server.calls import abort

_OPEN_SERVICES = ("/grpc.health.v1.Health/",)
"""What load balancers ask without a token."""


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls that do not carry ``authorization: Bearer TOKEN``."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]
        ],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Let a call through to its handler, or to one that refuses it."""
        handler = await continuation(details)
        if details.method.startswith(_OPEN_SERVICES):
            return handler
        given = dict(details.invocation_metadata).get("authorization", b"")
        if isinstance(given, str):
            given = given.encode()
        if hmac.compare_digest(given, self._expected):
            return handler
        return _refusal(handler, present=bool(given))


def _refusal(handler: Any, *, present: bool) -> grpc.RpcMethodHandler[Any, Any]:
    fault = token_fault("server", present=present)

    async def refuse_unary(_request: bytes, context: Any) -> Any:
        await abort(context, fault)

    async def refuse_stream(_requests: Any, context: Any) -> None:
        await abort(context, fault)

    if handler is not None and handler.request_streaming:
        return grpc.stream_stream_rpc_method_handler(refuse_stream)
    return grpc.unary_unary_rpc_method_handler(refuse_unary)
