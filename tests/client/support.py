"""Both clients under one face, and servers and networks that do what a test wants."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import queue
import select
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any, Self

import grpc
import gymnasium as gym
import numpy as np

from client_sdk import (
    AsyncEpisode,
    AsyncEpisodeBatch,
    AsyncPolicyClient,
    PolicyClient,
    Timeouts,
)
from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.batches import SpaceCodec
from client_sdk.wire.faults import ERROR_TRAILER, Fault
from client_sdk.wire.spaces import space_to_proto
from tests.servers import CARTPOLE_ACTIONS, CARTPOLE_OBSERVATIONS

KINDS = ["sync", "aio"]
LOCAL_KINDS = ["local", "aio-local"]
PATIENCE_S = 20.0
QUICK = Timeouts(connect_s=3.0, action_s=10.0, reconnect_s=10.0, close_s=2.0)


def seen(value: float) -> np.ndarray:
    """One observation of the default space."""
    return np.full(4, value, np.float32)


def all_seen(*values: float) -> np.ndarray:
    """One observation for each value: [N, 4]."""
    return np.repeat(np.array(values, np.float32)[:, None], 4, axis=1)


# -- both clients ----------------------------------------------------------------------------------


class Blocking:
    """An object of the asyncio client, used from a thread that is not its loop's."""

    def __init__(self, loop: asyncio.AbstractEventLoop, target: Any) -> None:
        self._loop = loop
        self._target = target

    def run(self, call: Callable[[], Any]) -> Any:
        async def there() -> Any:
            result = call()
            return await result if inspect.isawaitable(result) else result

        result = asyncio.run_coroutine_threadsafe(there(), self._loop).result(PATIENCE_S)
        wrapped = isinstance(result, AsyncEpisode | AsyncEpisodeBatch)
        return Blocking(self._loop, result) if wrapped else result

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._target, name)
        if not callable(value):
            return value
        return lambda *args, **kwargs: self.run(lambda: value(*args, **kwargs))

    def __enter__(self) -> Self:
        self.run(self._target.__aenter__)
        return self

    def __exit__(self, *exception: object) -> None:
        self.run(lambda: self._target.__aexit__(*exception))


@contextlib.contextmanager
def event_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """A loop that runs in a thread of its own, and ends as ``asyncio.run`` ends one."""
    loops: queue.Queue[asyncio.AbstractEventLoop] = queue.Queue()
    done = asyncio.Event()

    async def until_done() -> None:
        loops.put(asyncio.get_running_loop())
        await done.wait()

    thread = threading.Thread(target=lambda: asyncio.run(until_done()), daemon=True)
    thread.start()
    loop = loops.get(timeout=PATIENCE_S)
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(done.set)
        thread.join(PATIENCE_S)


@contextlib.contextmanager
def connected(kind: str, address: str, **settings: Any) -> Iterator[Any]:
    """A client of that kind, with the blocking one's face."""
    mode = "local" if kind in LOCAL_KINDS else "remote"
    settings = {"timeouts": QUICK, "inference_mode": mode, **settings}
    if kind in ("sync", "local"):
        with PolicyClient(address, **settings) as client:
            yield client
        return
    with event_loop() as loop:

        async def make() -> AsyncPolicyClient:
            return AsyncPolicyClient(address, **settings)

        client = asyncio.run_coroutine_threadsafe(make(), loop).result(PATIENCE_S)
        with Blocking(loop, client) as blocking:
            yield blocking


def connect_once(kind: str, address: str, **settings: Any) -> None:
    """Connect, and close again."""
    with connected(kind, address, **settings):
        pass


# -- servers that follow a script ------------------------------------------------------------------


class ScriptedServer:
    """Says what a test wants said, and remembers what it was told.

    Attributes:
        hellos: Every OpenSessionRequest.
        asked: Every StreamActRequest with rows, in the order of arrival.
        goodbyes: Every CloseSessionRequest.
        on_open: Makes the answer to a hello, or raises a Fault.
        on_act: Makes the answer to a request, or a list of them; None: stays silent; or raises a
            Fault.
    """

    def __init__(
        self,
        observation_space: gym.Space[Any] = CARTPOLE_OBSERVATIONS,
        action_space: gym.Space[Any] = CARTPOLE_ACTIONS,
    ) -> None:
        self.hellos: list[pb.OpenSessionRequest] = []
        self.asked: queue.Queue[pb.StreamActRequest] = queue.Queue()
        self.goodbyes: list[pb.CloseSessionRequest] = []
        self.metadata: list[dict[str, Any]] = []
        self.observation_space = observation_space
        self.action_space = action_space
        self.on_open: Callable[[pb.OpenSessionRequest], pb.OpenSessionResponse] = self.welcome
        self.on_act: Callable[[pb.StreamActRequest], Any] = self.answer
        self._server = grpc.server(futures.ThreadPoolExecutor(16))
        self._server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(
                    "policyserver.v1.PolicyService",
                    {
                        "OpenSession": grpc.unary_unary_rpc_method_handler(
                            self._open,
                            pb.OpenSessionRequest.FromString,
                            pb.OpenSessionResponse.SerializeToString,
                        ),
                        "CloseSession": grpc.unary_unary_rpc_method_handler(
                            self._close,
                            pb.CloseSessionRequest.FromString,
                            pb.CloseSessionResponse.SerializeToString,
                        ),
                        "StreamAct": grpc.stream_stream_rpc_method_handler(
                            self._stream, pb.StreamActRequest.FromString
                        ),
                    },
                ),
            )
        )
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.stop(0).wait(PATIENCE_S)

    def welcome(self, hello: pb.OpenSessionRequest) -> pb.OpenSessionResponse:
        response = pb.OpenSessionResponse(
            session_id=hello.session_id or "secret-1", protocol_version="1.7", policy_version=3
        )
        response.agents[""].observation_space.CopyFrom(space_to_proto(self.observation_space))
        response.agents[""].action_space.CopyFrom(space_to_proto(self.action_space))
        response.lease.FromSeconds(30)
        return response

    def answer(self, request: pb.StreamActRequest) -> pb.StreamActResponse:
        response = pb.StreamActResponse(request=request.request)
        codec = SpaceCodec(self.action_space)
        for rows in request.act.groups:
            group = response.act.groups.add(policy_version=4)
            codec.encode(codec.zeros(len(rows.episodes)), group.actions)
        return response

    def next_asked(self) -> pb.StreamActRequest:
        return self.asked.get(timeout=PATIENCE_S)

    def _open(self, hello: pb.OpenSessionRequest, context: Any) -> pb.OpenSessionResponse:
        self.hellos.append(hello)
        self.metadata.append(dict(context.invocation_metadata()))
        try:
            return self.on_open(hello)
        except Fault as fault:
            detail = fault.to_detail().SerializeToString()
            context.set_trailing_metadata(((ERROR_TRAILER, detail),))
            context.abort(fault.status, str(fault))

    def _close(self, goodbye: pb.CloseSessionRequest, _: Any) -> pb.CloseSessionResponse:
        self.goodbyes.append(goodbye)
        return pb.CloseSessionResponse()

    def _stream(self, requests: Iterator[pb.StreamActRequest], _: Any) -> Iterator[bytes]:
        for request in requests:
            if not request.act.groups:  # it only says whose stream this is
                continue
            self.asked.put(request)
            try:
                response = self.on_act(request)
            except Fault as fault:
                response = pb.StreamActResponse(request=request.request, error=fault.to_detail())
            for each in response if isinstance(response, list) else [response]:
                if isinstance(each, bytes):
                    yield each
                elif each is not None:
                    yield each.SerializeToString()


def with_faults(response: pb.StreamActResponse, faults: dict[int, Fault]) -> pb.StreamActResponse:
    """That answer, with some rows of its group refused."""
    for row, fault in faults.items():
        response.act.groups[0].faults.add(index=row, error=fault.to_detail())
    return response


# -- networks that fail ----------------------------------------------------------------------------


class Relay:
    """A TCP relay to a server, to be cut, closed and opened again."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self.target = (host, int(port))
        self.open = True
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._pairs: list[socket.socket] = []
        self._silent: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.open = False
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        self._accepting.join(PATIENCE_S)

    def cut(self) -> None:
        """Break the connections there are."""
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for end in pairs:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def silence(self) -> None:
        """From now on nothing gets through the connections there are, which stay open."""
        with self._lock:
            self._silent.update(self._pairs)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if not self.open:
                near.close()
                continue
            try:
                far = socket.create_connection(self.target, timeout=PATIENCE_S)
            except OSError:
                near.close()
                continue
            with self._lock:
                self._pairs += [near, far]
            threading.Thread(target=self._pump, args=(near, far), daemon=True).start()

    def _pump(self, near: socket.socket, far: socket.socket) -> None:
        other = {near: far, far: near}
        with near, far, contextlib.suppress(OSError):
            while True:
                for ready in select.select([near, far], [], [])[0]:
                    data = ready.recv(65536)
                    if not data:
                        return
                    if ready not in self._silent:
                        other[ready].sendall(data)
