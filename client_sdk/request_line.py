"""``RequestLine``: the requests of one stream, received when somebody asks for the next one.

gRPC's iterator of requests wants a thread that waits in it, and wakes that with every message and
every answer. Here gRPC's own thread hands a request over, and nobody waits. This stands on gRPC's
Python classes below the public ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from grpc import _server as inside
from grpc._cython import cygrpc  # type: ignore[attr-defined]  # the stubs leave it out

_NO_FLAGS = 0


class RequestLine:
    """One stream, from the first ``ask`` on."""

    def __init__(self, requests: Any, take: Callable[[bytes | None], object]) -> None:
        """Take gRPC's iterator's place; nobody is to go on with that then.

        Args:
            requests: gRPC's iterator of them.
            take: Called with each, and with None once there are no more, in gRPC's thread. Must not
                raise or block.

        Raises:
            AttributeError, TypeError: This gRPC has changed inside.
        """
        state, call = requests._state, requests._call
        receive = inside._receive_message(state, call, requests._request_deserializer)

        def received(event: Any) -> Any:
            told = receive(event)
            state.request = None  # the iterator's: it may be large
            # Only now that gRPC has written down that nothing is being received: whoever takes it
            # may ask for the next one before this returns.
            take(event.batch_operations[0].message())
            return told

        self._state, self._condition, self._due = state, state.condition, state.due
        self._start, self._received = call.start_server_batch, received
        self._token, self._is_active = inside._RECEIVE_MESSAGE_TOKEN, inside._is_rpc_state_active

    def ask(self) -> None:
        """Have gRPC receive the next one, once the last one is there. Any thread; never waits."""
        with self._condition:
            if self._is_active(self._state):
                self._start((cygrpc.ReceiveMessageOperation(_NO_FLAGS),), self._received)
                self._due.add(self._token)
