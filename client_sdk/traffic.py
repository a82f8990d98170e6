"""How many messages were received and sent, and how large they were.

Counted where gRPC hands them over: whole messages of protobuf, without HTTP/2's frames. One thread
counts; any may ask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc

Codec = Callable[[Any], Any] | None
"""Of gRPC: turns bytes into a message or the reverse; None leaves them as they are."""


class Traffic:
    """Counters of one end: a server, or a connection to one. A server counts whole services.

    ::

        server.add_generic_rpc_handlers((traffic.counting(service.handler()),))

    Attributes:
        messages_received: Since the start; and so are the others.
        bytes_received: By this end.
        messages_sent: By this end.
        bytes_sent: By this end.
    """

    def __init__(self) -> None:
        # No lock: it would be taken twice for every message.
        self.messages_received = self.bytes_received = 0
        self.messages_sent = self.bytes_sent = 0

    def counting(self, handlers: grpc.GenericRpcHandler) -> grpc.GenericRpcHandler:
        """The same handlers, every message of theirs counted."""
        return _Counting(self, handlers)

    def received(self, data: bytes) -> None:
        """Count a message that came."""
        self.messages_received += 1
        self.bytes_received += len(data)

    def sent(self, data: bytes) -> None:
        """Count a message that goes."""
        self.messages_sent += 1
        self.bytes_sent += len(data)

    def snapshot(self) -> dict[str, int]:
        """Since the start: messages and bytes, by direction as this end sees it. Any thread."""
        return dict(vars(self))

    def reading(self, deserialize: Codec) -> Codec:
        """That deserializer, which counts."""

        def read(data: bytes) -> Any:
            self.received(data)
            return data if deserialize is None else deserialize(data)

        return read

    def writing(self, serialize: Codec) -> Codec:
        """That serializer, which counts."""

        def write(message: Any) -> Any:
            data = message if serialize is None else serialize(message)
            self.sent(data)
            return data

        return write


class _Counting(grpc.GenericRpcHandler):  # type: ignore[misc, unused-ignore]
    def __init__(self, traffic: Traffic, handlers: grpc.GenericRpcHandler) -> None:
        self._traffic = traffic
        self._handlers = handlers

    def service(self, handler_call_details: Any) -> Any:
        handler: Any = self._handlers.service(handler_call_details)
        if handler is None:
            return None
        # gRPC's handlers are named tuples.
        return handler._replace(
            request_deserializer=self._traffic.reading(handler.request_deserializer),
            response_serializer=self._traffic.writing(handler.response_serializer),
        )
