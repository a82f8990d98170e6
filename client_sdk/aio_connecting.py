"""How the asyncio client finds its server: what ``connecting`` is to the blocking one. Loop only."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from client_sdk.aio_transport import AioConnection
from client_sdk.attempts import MAX_REDIRECTS, Attempts
from client_sdk.call_errors import Disconnected
from client_sdk.config import Address
from client_sdk.connecting import report, verdict
from client_sdk.endpoint import Endpoint
from client_sdk.errors import ConnectError, PolicyClientError
from client_sdk.wire import policyserver_pb2 as pb


async def open_session(
    endpoint: Endpoint, hello: pb.OpenSessionRequest, timeout_s: float
) -> tuple[AioConnection, pb.OpenSessionResponse]:
    """See ``connecting.open_session``."""
    target = endpoint.address
    for _ in range(MAX_REDIRECTS + 1):
        connection = AioConnection(endpoint, target)
        try:
            response = await connection.open_session(hello, timeout_s)
        except BaseException:
            await connection.close()
            raise
        if not response.redirect_address:
            return connection, response
        await connection.close()
        target = Address.parse(response.redirect_address)
    raise ConnectError(f"{endpoint.address} sends us on more than {MAX_REDIRECTS} times")


async def keep_trying(
    endpoint: Endpoint, attempts: Attempts, attempt: Callable[[float], Awaitable[None]]
) -> None:
    """See ``connecting.keep_trying``; cancelling the task ends it all."""
    while True:
        try:
            await attempt(attempts.timeout_s(time.monotonic()))
            return
        except (Disconnected, PolicyClientError) as error:
            failure = error
        now = time.monotonic()
        delay_s = attempts.delay_s(now, failure)
        if delay_s is None:
            raise await asyncio.to_thread(verdict, endpoint, attempts, failure, now)
        await asyncio.to_thread(report, endpoint, attempts, failure, now)
        await asyncio.sleep(delay_s)
