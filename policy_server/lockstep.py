"""``Lockstep``: an answer and the request that follows it, as one operation of gRPC's.

gRPC for asyncio reads a stream and writes it in operations of their own, and for the end of each a
thread of gRPC's wakes the loop. Where a client says nothing more before it has its answer, both can
be one, which saves half of what gRPC costs here. gRPC's core takes them together, but its public
classes offer no way to say so; so this goes one level deeper, as ``client_sdk.dialogue`` does. Loop
thread only.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
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
        self.possible = self._call is not None

    def answer(self, data: bytes, then: Callable[[bytes | None], object]) -> None:
        """Write the answer, and read the next request; until then nothing else can be written.

        Args:
            data: The answer.
            then: Called with the request; with None where there is none, as the context will tell.
        """
        request = cygrpc.ReceiveMessageOperation(_NO_FLAGS)
        operations = (cygrpc.SendMessageOperation(data, _NO_FLAGS), request)
        self._traffic.sent(data)
        # A coroutine of gRPC's, driven by hand: a task would cost more than it does.
        batch = cygrpc.execute_batch(self._call, operations, self._loop)

        def go_on(_: object = None) -> None:
            message: bytes | None = None
            try:
                waits_for: asyncio.Future[object] = batch.send(None)
            except StopIteration:
                message = request.message()
            except cygrpc.ExecuteBatchError:  # the client is gone
                pass
            else:
                waits_for.add_done_callback(go_on)
                return
            if message is not None:
                self._traffic.received(message)
            then(message)

        go_on()


def _call_of(context: Context) -> Any:
    """What gRPC's core knows the call by, which the context keeps to itself; None: not any more."""
    if not all(hasattr(cygrpc, name) for name in _NEEDED):
        return None
    calls = [each for each in gc.get_referents(context) if isinstance(each, cygrpc.RPCState)]
    return calls[0] if len(calls) == 1 else None
