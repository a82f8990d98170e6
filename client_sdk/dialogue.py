"""``Dialogue``: a bidirectional rpc whose caller reads its answers itself: bytes out and bytes in.

gRPC for Python takes the requests of a stream to the wire in a thread of its own and its answers
through another one, and ``channel.Stream`` has a third, for deadlines and Ctrl-C. For a small
message, waking them costs more than all else. gRPC's blocking unary calls do without: the caller
starts the operations itself, and waits on a completion queue of the call's own. That holds for any
call, but gRPC's public classes do it for no bidirectional one; so this goes one level deeper, to
the calls of its Cython layer. One thread at a time.
"""

from __future__ import annotations

import contextlib
import math
import queue
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
    """One call. Whatever goes wrong with it ends it.

    Attributes:
        busy: A call of ``receive`` or ``flush`` is under way; a signal handler had better not wait.

    ::

        answer = dialogue.ask(request, timeout_s)

        dialogue.send(request)      # goes with the next ``receive``, which saves a wake-up,
        dialogue.flush(timeout_s)   # or now, where nobody waits for its answer
        answer = dialogue.receive(timeout_s)
    """

    def __init__(self, channel: Any, method: str, metadata: Any) -> None:
        """Begin the call; does not wait for the server.

        Args:
            channel: Of gRPC's Cython layer.
            method: The path of the rpc.
            metadata: Pairs.

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
        self._unsent: bytes | None = None
        self._sending = False  # gRPC takes one message at a time
        self._closed = False
        self._end: PolicyClientError | Disconnected | None = None
        self._patience = _Patience(self._cancel)
        self.busy = False

    def ask(self, request: bytes, timeout_s: float) -> bytes:
        """Send a request, and wait for the next answer; raises as ``receive``."""
        self.send(request)
        return self.receive(timeout_s)

    def send(self, request: bytes) -> None:
        """Send a request together with the next ``receive``; with ``flush``, without one."""
        if self._unsent is not None:
            self.flush()
        self._unsent = request

    def flush(self, timeout_s: float = _LONG_S) -> None:
        """Send what is not sent yet. What goes wrong is told to ``receive``.

        Args:
            timeout_s: So long the server may leave unread what was sent before.
        """
        self.busy = True
        try:
            self._patience.begin(timeout_s)
            self._operate()
            self._patience.end()
        finally:
            self.busy = False

    def receive(self, timeout_s: float) -> bytes:
        """The next answer. After any other outcome there are no more.

        Raises:
            Overdue: None came so soon.
            Disconnected: The call has ended.
            PolicyClientError: The server ended it with a refusal.
        """
        patience = self._patience
        self.busy = True
        try:
            patience.begin(timeout_s)
            # In one batch with what is to be sent, so that gRPC wakes this thread once.
            self._operate(cygrpc.ReceiveMessageOperation(_NO_FLAGS))
            while self._unfinished:
                answer = self._next()
                if answer is not None and not self._closed:
                    patience.end()
                    return answer
        finally:
            self.busy = False
        if patience.lost:
            raise Overdue
        raise self._end or Disconnected("the call was given up")

    def _operate(self, *operations: Any) -> None:
        """Begin a batch of those, and of what is not sent yet."""
        if self._unsent is not None:
            while self._sending and self._unfinished:
                self._next()
            operations = (cygrpc.SendMessageOperation(self._unsent, _NO_FLAGS), *operations)
            self._unsent, self._sending = None, True
        if not operations or not self._unfinished:
            return
        try:
            if self._call.operate(operations, None):  # else the call has ended
                self._unfinished += 1
        except BaseException:  # Ctrl-C: nobody knows whether it has begun
            self._break_off()
            raise

    def _next(self) -> bytes | None:
        """Wait for the end of a batch: the answer, if there is one in it."""
        try:
            event = self._call.next_event()
            self._unfinished -= 1
        except BaseException:  # Ctrl-C: gRPC has let go of the call, or of what it would wait for
            self._break_off()
            raise
        answer: bytes | None = None
        for operation in event.batch_operations:
            kind = operation.type()
            if kind == cygrpc.OperationType.receive_message:
                answer = operation.message()
            elif kind == cygrpc.OperationType.send_message:
                self._sending = False
            elif kind == cygrpc.OperationType.receive_status_on_client:
                code = _CODES.get(operation.code(), grpc.StatusCode.UNKNOWN)
                details = operation.details()
                if code is grpc.StatusCode.OK:
                    self._end = Disconnected("the server ended the stream")
                else:
                    error = error_of_status(code, details, operation.trailing_metadata())
                    self._end = error_of_stream(error)
        return answer

    def _break_off(self) -> None:
        """Ask gRPC for no more ends of batches: which are still to come is not known."""
        self._unfinished = 0
        self._cancel()

    def _cancel(self) -> None:
        """Have the call end soon, from any thread; does nothing where it has."""
        self._call.cancel(grpc.StatusCode.CANCELLED.value[0], "given up by the client")

    def give_up(self) -> None:
        """Have whoever waits for an answer be told that there is none. Any thread."""
        self._closed = True
        self._cancel()

    def close(self) -> None:
        """Give up the call. A signal handler may do so while its thread waits for an answer."""
        self._closed = True
        self._patience.stop()
        if self._unfinished:
            self._cancel()
        while self._unfinished and not self.busy:
            self._next()


class _Patience:
    """Cancels a call once a deadline has passed: gRPC knows but one for the whole of a call.

    Attributes:
        lost: Whether one has.
    """

    def __init__(self, cancel: Callable[[], object]) -> None:
        self.lost = False
        self._cancel = cancel
        self._due = math.inf  # in ``time.monotonic``'s seconds
        self._looks_at = math.inf  # when the watching thread will look next
        self._stopped = False
        # ... or at once. No Event: an interrupt within its lock would leave that locked.
        self._look: queue.SimpleQueue[None] = queue.SimpleQueue()
        threading.Thread(target=self._watch, name="client_sdk patience", daemon=True).start()

    def begin(self, timeout_s: float) -> None:
        """From now on so long."""
        self._due = due = time.monotonic() + timeout_s
        if due < self._looks_at:  # else it will find out in time
            self._look.put(None)

    def end(self) -> None:
        """For ever, until it begins again."""
        self._due = math.inf

    def stop(self) -> None:
        """No more deadlines."""
        self._stopped = True
        self._look.put(None)

    def _watch(self) -> None:
        while not self._stopped:
            self._looks_at = looks_at = self._due
            if self._due < looks_at:  # changed just now
                continue
            left_s = looks_at - time.monotonic()
            if left_s <= 0.0:
                self.lost = True
                self._cancel()
                return
            with contextlib.suppress(queue.Empty):
                self._look.get(timeout=min(left_s, _LONG_S))
