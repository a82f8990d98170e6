"""The floor: a gRPC stream that answers each message with itself, and clients that ask it.

The server is ``grpc.aio`` with the options of the policy server, and identity serializers. The
clients are gRPC's, blocking and for asyncio, as its documentation shows them; and the same without
what ``PolicyClient`` and ``AsyncPolicyClient`` spare themselves of it. The first line of the server's
output is its port.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from client_sdk.aio_transport import AioStream
from client_sdk.config import Address
from client_sdk.dialogue import Dialogue
from client_sdk.endpoint import Endpoint
from policy_server.config import PolicyServerConfig
from policy_server.server import _server_options

_METHOD = "/benchmarks.Echo/Stream"


class EchoProcess(contextlib.AbstractContextManager["EchoProcess"]):
    """The echo server in a process of its own."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.echo"], stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self.address = f"127.0.0.1:{self._process.stdout.readline().strip()}"

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.wait(10)


def blocking(address: str, size_bytes: int, messages: int) -> float:
    """Messages per second over one blocking stream, as gRPC's own classes offer it."""
    outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    with _channel(address) as channel:
        answers: Any = channel.stream_stream(_METHOD)(iter(outbox.get, None))
        try:
            return _rate(outbox.put, lambda: next(answers), size_bytes, messages)
        finally:
            outbox.put(None)
            answers.cancel()


def blocking_as_we_do(address: str, size_bytes: int, messages: int) -> float:
    """Messages per second over one stream of ``PolicyClient``'s: its ``Dialogue``."""
    with _channel(address) as channel:
        inner: Any = channel
        dialogue = Dialogue(inner._channel, _METHOD, ())
        try:
            return _rate(dialogue.send, lambda: dialogue.receive(10.0), size_bytes, messages)
        finally:
            dialogue.close()


def _channel(address: str) -> grpc.Channel:
    endpoint = Endpoint(Address.parse(address))
    return grpc.insecure_channel(address, endpoint.options(endpoint.address))


def _rate(
    send: Callable[[bytes], object], receive: Callable[[], object], size_bytes: int, messages: int
) -> float:
    data = b"x" * size_bytes
    start = 0.0
    for number in range(messages + 50):
        if number == 50:
            start = time.perf_counter()
        send(data)
        receive()
    return messages / (time.perf_counter() - start)


async def streams(address: str, size_bytes: int, messages: int, count: int) -> float:
    """Messages per second over ``count`` asyncio streams at once, as gRPC's own classes offer them."""

    async def echo(call: Any, ready: Callable[[], Awaitable[object]]) -> None:
        data = b"x" * size_bytes
        for _ in range(20):
            await call.write(data)
            await call.read()
        await ready()
        for _ in range(messages):
            await call.write(data)
            await call.read()

    return await _streams_rate(echo, address, messages, count)


async def streams_as_we_do(address: str, size_bytes: int, messages: int, count: int) -> float:
    """Messages per second over ``count`` streams of ``AsyncPolicyClient``'s: its ``AioStream``."""

    async def echo(call: Any, ready: Callable[[], Awaitable[object]]) -> None:
        data = b"x" * size_bytes
        stream = AioStream(call)
        await stream.send(data)
        await stream.receive([data])
        reader = asyncio.create_task(stream.receive([]))
        await asyncio.sleep(0)  # now it is idle, as the stream expects
        for _ in range(20):
            await stream.ask(data)
        await ready()
        for _ in range(messages):
            await stream.ask(data)
        reader.cancel()

    return await _streams_rate(echo, address, messages, count)


async def _streams_rate(
    echo: Callable[[Any, Callable[[], Awaitable[object]]], Awaitable[None]],
    address: str,
    messages: int,
    count: int,
) -> float:
    endpoint = Endpoint(Address.parse(address))
    ready = asyncio.Barrier(count + 1)

    async def one() -> None:
        async with grpc.aio.insecure_channel(
            address, endpoint.options(endpoint.address)
        ) as channel:
            call = channel.stream_stream(_METHOD)()
            await echo(call, ready.wait)
            call.cancel()

    tasks = [asyncio.create_task(one()) for _ in range(count)]
    await ready.wait()
    start = time.perf_counter()
    await asyncio.gather(*tasks)
    return count * messages / (time.perf_counter() - start)


class _Handler(grpc.GenericRpcHandler):
    def service(self, details: Any) -> Any:
        async def echo(_requests: Any, context: Any) -> None:
            while (data := await context.read()) is not grpc.aio.EOF:
                await context.write(data)

        return grpc.stream_stream_rpc_method_handler(echo) if details.method == _METHOD else None


async def _serve() -> None:
    server = grpc.aio.server(options=_server_options(PolicyServerConfig()))
    server.add_generic_rpc_handlers((_Handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(_serve())
