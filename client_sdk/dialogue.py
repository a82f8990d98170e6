"""``Dialogue``: a bidirectional rpc in strict alternation, bytes out and bytes in, without threads.

gRPC for Python takes the requests of a stream to the wire in a thread of its own and its answers
through another one, and ``channel.Stream`` has a third, for deadlines and Ctrl-C. For a small
message, waking them costs more than all else. gRPC's blocking unary calls do without: the caller
starts the operations itself, and waits on a completion queue of the call's own. That holds for any
call, but gRPC's public classes do it for no bidirectional one; so this goes one level deeper, to
the calls of its Cython layer. One thread at a time.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Any

import grpc
from grpc._cython import cygrpc  # type: ignore[attr-defined]  # the stubs leave it out

from client_sdk.call_errors import Disconnected, Overdue, error_of_status, error_of_stream
from client_sdk.errors import PolicyClientError

_NO_FLAGS = 0
_CODES = {code.value[0]: code for code in grpc.StatusCode}

_LONG_S = 1e6
"""More than events take is too much for them."""


class Dialogue:
    """One call. Whatever goes wrong with it ends it."""

    def __init__(self, channel: Any, method: str, metadata: Any, shortest_s: float) -> None:
        """Begin the call; does not wait for the server.

        Args:
            channel: Of gRPC's Cython layer.
            method: The path of the rpc.
            metadata: Pairs.
            shortest_s: No deadline is going to be shorter.

        Raises:
            AttributeError, TypeError: This gRPC has changed inside.
            ValueError: The channel is closed.
        """
        opening = (
            cygrpc.SendInitialMetadataOperation(metadata, _NO_FLAGS),
            cygrpc.ReceiveStatusOnClientOperation(_NO_FLAGS),
        )
        welcome = (cygrpc.ReceiveInitialMetadataOperation(_NO_FLAGS),)
        batches = ((opening, None), (welcome, None))
        self._call = channel.segregated_call(
            cygrpc.PropagationConstants.GRPC_PROPAGATE_DEFAULTS,
            method.encode(),
            None,  # no other host
            None,  # no deadline: each answer has one
            metadata,
            None,  # no credentials but the channel's
            batches,
        )
        # Batches of operations whose end gRPC has not told yet. With the last of them it forgets
        # the call, and it must not be asked for more.
        self._unfinished = len(batches)
        self._waiting = self._closed = False
        self._end: PolicyClientError | Disconnected | None = None
        self._patience = _Patience(self._cancel, shortest_s)

    def ask(self, request: bytes, timeout_s: float) -> bytes:
        """Send a request, and wait for its answer. After any other outcome there are no more.

        Raises:
            Overdue: None came so soon.
            Disconnected: The call has ended.
            PolicyClientError: The server ended it with a refusal.
        """
        patience = self._patience
        patience.due = time.monotonic() + timeout_s
        # One batch for both, so that gRPC wakes this thread once.
        exchange = (
            cygrpc.SendMessageOperation(request, _NO_FLAGS),
            cygrpc.ReceiveMessageOperation(_NO_FLAGS),
        )
        if self._call.operate(exchange, None):  # else the call has ended
            self._unfinished += 1
        while self._unfinished:
            answer = self._next()
            if answer is not None and not self._closed:
                patience.due = math.inf
                return answer
        if patience.lost:
            raise Overdue
        raise self._end or Disconnected("the call was given up")

    def _next(self) -> bytes | None:
        """Wait for the end of a batch: the answer, if there is one in it."""
        self._waiting = True
        try:
            if not self._unfinished:  # closed by a signal handler, just before
                return None
            event = self._call.next_event()
            self._unfinished -= 1
        except BaseException:  # Ctrl-C: gRPC has let go of the call, or of what it would wait for
            self._unfinished = 0
            self._cancel()
            raise
        finally:
            self._waiting = False
        answer: bytes | None = None
        for operation in event.batch_operations:
            kind = operation.type()
            if kind == cygrpc.OperationType.receive_message:
                answer = operation.message()
            elif kind == cygrpc.OperationType.receive_status_on_client:
                code = _CODES.get(operation.code(), grpc.StatusCode.UNKNOWN)
                details = operation.details()
                if code is grpc.StatusCode.OK:
                    self._end = Disconnected("the server ended the stream")
                else:
                    error = error_of_status(code, details, operation.trailing_metadata())
                    self._end = error_of_stream(error)
        return answer

    def _cancel(self) -> None:
        """Have the call end soon, from any thread; does nothing where it has."""
        self._call.cancel(grpc.StatusCode.CANCELLED.value[0], "given up by the client")

    def close(self) -> None:
        """Give up the call. A signal handler may do so while its thread waits for an answer."""
        self._closed = True
        self._patience.end()
        if self._unfinished:
            self._cancel()
        while self._unfinished and not self._waiting:
            self._next()


class _Patience:
    """Cancels a call once a deadline has passed: gRPC knows but one for the whole of a call.

    Attributes:
        due: When, in ``time.monotonic``'s seconds.
        lost: Whether it was.
    """

    def __init__(self, cancel: Callable[[], object], pause_s: float) -> None:
        self.due = math.inf
        self.lost = False
        self._cancel = cancel
        self._pause_s = min(pause_s, _LONG_S)
        self._over = threading.Event()
        # None is missed: no deadline is nearer, when it is set, than a pause is long.
        threading.Thread(target=self._watch, name="client_sdk patience", daemon=True).start()

    def end(self) -> None:
        """No more deadlines."""
        self._over.set()

    def _watch(self) -> None:
        left_s = self._pause_s
        while not self._over.wait(left_s):
            left_s = min(self.due - time.monotonic(), self._pause_s)
            if left_s <= 0.0:
                self.lost = True
                self._cancel()
                return
