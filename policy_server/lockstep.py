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
        self._context = context
        self._traffic = traffic
        self._loop = asyncio.get_running_loop()
        self._call = _call_of(context)
        self.possible = self._call is not None

    async def answer(self, data: bytes) -> bytes:
        """Write the answer, and read the next request; ``grpc.aio.EOF``: there are no more.

        While this waits, nothing else can be written.
        """
        request = cygrpc.ReceiveMessageOperation(_NO_FLAGS)
        operations = (cygrpc.SendMessageOperation(data, _NO_FLAGS), request)
        self._traffic.sent(data)
        try:
            await cygrpc.execute_batch(self._call, operations, self._loop)
        except cygrpc.ExecuteBatchError:  # the client is gone, as the context will tell
            return await self._context.read()
        message: bytes | None = request.message()
        if message is None:
            return await self._context.read()
        self._traffic.received(message)
        return message


def _call_of(context: Context) -> Any:
    """What gRPC's core knows the call by, which the context keeps to itself; None: not any more."""
    if not all(hasattr(cygrpc, name) for name in _NEEDED):
        return None
    calls = [each for each in gc.get_referents(context) if isinstance(each, cygrpc.RPCState)]
    return calls[0] if len(calls) == 1 else None
