"""``Lockstep``: an answer and the request that follows it, as one operation of gRPC's.

gRPC for asyncio reads a stream and writes it in operations of their own, and tells the end of each to
a future, whose task wakes in a later iteration of the loop. Where a client says nothing more before it
has its answer, both can be one operation, whose end calls back at once; that costs much less. gRPC's
core takes them together, but its public classes offer no way to say so; so this goes one level deeper,
as ``client_sdk.dialogue`` does. Loop thread only.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterator
from typing import Any

from grpc._cython import cygrpc  # type: ignore[attr-defined]  # the stubs leave it out

from client_sdk.traffic import Traffic
from policy_server.calls import Context

_NO_FLAGS = 0
_NEEDED = (
    "execute_batch",
    "ExecuteBatchError",
    "ReceiveMessageOperation",
    "RPCState",
    "SendMessageOperation",
)


class Lockstep:
    """One stream whose client waits for each answer; ``possible`` once an answer was written."""

    def __init__(self, context: Context, traffic: Traffic) -> None:
        self._traffic = traffic
        self._loop = asyncio.get_running_loop()
        self._call = _call_of(context)
        self._told = False  # in this iteration of the loop
        self.possible = self._call is not None

    def answer(self, data: bytes, then: Callable[[bytes | None], object]) -> None:
        """Write the answer, and read the next request; until then nothing else can be written.

        Args:
            data: The answer.
            then: Called with the request; with None where there is none, as the context will tell.
                Must not raise.
        """
        self._traffic.sent(data)

        def ended(request: bytes | None) -> None:
            if request is not None:
                self._traffic.received(request)
            then(request)

        _Turn(self, ended).begin(self._call, data)

    def tell(self, callback: Callable[..., object], *arguments: object) -> None:
        """Have the end of an operation noted, at once; but only once in an iteration of the loop.

        gRPC tells all ends that have come, one after the other. Where noting one takes as long as the
        next one needs to come, there would be no end to it, and nothing else would run.
        """
        # A loop that was the first to speak gRPC may be told of the ends of others.
        if asyncio.get_running_loop() is not self._loop:
            self._loop.call_soon_threadsafe(callback, *arguments)
        elif self._told:
            self._loop.call_soon(callback, *arguments)
        else:
            self._told = True
            callback(*arguments)
            self._loop.call_soon(self._renew)  # last: the answer is on its way by now

    def _renew(self) -> None:
        self._told = False


class _Turn:
    """One operation that writes and reads. gRPC takes it for its loop, and for its future.

    gRPC's is a coroutine; a task that drives it, and a future that wakes the task, would cost more
    than the operation itself.
    """

    __slots__ = ("_batch", "_ended", "_request", "call_soon_threadsafe")

    def __init__(self, lockstep: Lockstep, ended: Callable[[bytes | None], object]) -> None:
        self.call_soon_threadsafe = lockstep.tell  # what gRPC asks of a loop, with create_future
        self._ended = ended

    def begin(self, call: Any, data: bytes) -> None:
        self._request = cygrpc.ReceiveMessageOperation(_NO_FLAGS)
        operations = (cygrpc.SendMessageOperation(data, _NO_FLAGS), self._request)
        self._batch = cygrpc.execute_batch(call, operations, self)
        self._go_on()

    def _go_on(self) -> None:
        request: bytes | None = None
        try:
            self._batch.send(None)
            return  # it waits for what it takes for a future
        except StopIteration:
            request = self._request.message()
        except cygrpc.ExecuteBatchError:  # the client is gone
            pass
        self._ended(request)

    def create_future(self) -> _Turn:
        return self

    # What it asks of a future.

    def __await__(self) -> Iterator[None]:
        yield

    def cancelled(self) -> bool:
        return False

    def set_result(self, _: object) -> None:
        self._go_on()

    def set_exception(self, _: BaseException) -> None:
        self._batch.close()
        self._ended(None)


def _call_of(context: Context) -> Any:
    """What gRPC's core knows the call by, which the context keeps to itself; None: not any more."""
    if not all(hasattr(cygrpc, name) for name in _NEEDED):
        return None
    calls = [each for each in gc.get_referents(context) if isinstance(each, cygrpc.RPCState)]
    return calls[0] if len(calls) == 1 else None
