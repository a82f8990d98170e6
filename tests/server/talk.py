"""Clients that speak the contract and nothing else, and what tests want to know of an answer."""

from __future__ import annotations

import contextlib
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire import policyserver_pb2_grpc as pb_grpc
from client_sdk.wire.faults import ERROR_TRAILER, Fault, Reason
from client_sdk.wire.tensors import tensor_from_proto, tensor_to_proto

Health = health_pb2.HealthCheckResponse

RUNNING = pb.STEP_STATUS_RUNNING
TERMINATED = pb.STEP_STATUS_TERMINATED
TRUNCATED = pb.STEP_STATUS_TRUNCATED
ABANDONED = pb.STEP_STATUS_ABANDONED

CALL_TIMEOUT_S = 20.0
ROOT = Path(__file__).parents[2]


def batch(values: Any) -> pb.Batch:
    """Columns as a message: an array for a leaf space, a mapping of arrays otherwise."""
    leaves = values if isinstance(values, Mapping) else {"": values}
    message = pb.Batch()
    for path, value in leaves.items():
        if isinstance(value, pb.Tensor):
            message.leaves[path].CopyFrom(value)
        else:
            tensor_to_proto(np.asarray(value), message.leaves[path])
    return message


def seen(*values: float) -> np.ndarray:
    """Observations ``[N, 4]`` of the default space, one for each value."""
    return np.repeat(np.array(values, np.float32)[:, None], 4, axis=1)


def rows(
    episodes: Sequence[int],
    steps: Sequence[int],
    observations: Any = None,
    *,
    logged: Any = None,
    **columns: Any,
) -> pb.StepRows:
    """One group; ``columns`` are further fields of ``StepRows``."""
    group = pb.StepRows(episodes=episodes, steps=steps, **columns)
    if observations is not None:
        group.observations.CopyFrom(batch(observations))
    if logged is not None:
        group.logged_actions.CopyFrom(batch(logged))
    return group


def actions_of(group: pb.ActionRows) -> list[Any]:
    """The actions of a leaf space, as Python values."""
    return tensor_from_proto(group.actions.leaves[""]).tolist()


def faults_of(group: pb.ActionRows) -> dict[int, Fault]:
    """By row."""
    return {fault.index: Fault.from_detail(fault.error) for fault in group.faults}


def fault_in(error: grpc.RpcError) -> Fault:
    """The ErrorDetail in the trailer of a failed call."""
    trailers = dict(error.trailing_metadata() or ())  # type: ignore[attr-defined]
    return Fault.from_detail(pb.ErrorDetail.FromString(trailers[ERROR_TRAILER]))


def check_fault(fault: Fault, reason: Reason, field: str, *says: str) -> None:
    """That fault, at that place, in words that include these."""
    assert fault.reason is reason, fault
    assert fault.field == field
    for words in says:
        assert words in fault.message, fault.message


@contextlib.contextmanager
def refused(
    code: grpc.StatusCode, reason: Reason, field: str = "", *says: str
) -> Iterator[list[Fault]]:
    """The call inside fails in exactly this way; its fault is put into the list."""
    found: list[Fault] = []
    with pytest.raises(grpc.RpcError) as caught:
        yield found
    assert caught.value.code() is code, caught.value
    found.append(fault_in(caught.value))
    check_fault(found[0], reason, field, *says)


def eventually(condition: Callable[[], object], within_s: float = 5.0) -> None:
    """Wait for what another thread brings about, and fails if it does not."""
    tick = threading.Event()
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        tick.wait(0.003)


class Talker:
    """One client process: a channel, a stub, and a session unless told otherwise."""

    def __init__(
        self,
        address: str,
        *,
        token: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        options: Sequence[tuple[str, Any]] = (),
        connect: bool = True,
        **opening: Any,
    ) -> None:
        options = [("grpc.use_local_subchannel_pool", 1), *options]
        self.channel = (
            grpc.insecure_channel(address, options)
            if credentials is None
            else grpc.secure_channel(address, credentials, options)
        )
        self.metadata = () if token is None else (("authorization", f"Bearer {token}"),)
        self.stub = pb_grpc.PolicyServiceStub(self.channel)
        self.session_id = ""
        self._streams: list[Stream] = []
        if connect:
            self.session_id = self.open(**opening).session_id

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in self._streams:
            stream.close()
        self.channel.close()

    def open(self, **fields: Any) -> pb.OpenSessionResponse:
        """OpenSession, with sensible fields where none are given."""
        defaults = {
            "client_name": "tester",
            "protocol_version": "1.0",
            "inference_mode": pb.INFERENCE_MODE_REMOTE,
        }
        return self.stub.OpenSession(
            pb.OpenSessionRequest(**{**defaults, **fields}),
            timeout=CALL_TIMEOUT_S,
            metadata=self.metadata,
        )

    def close_session(self) -> None:
        self.stub.CloseSession(
            pb.CloseSessionRequest(session_id=self.session_id), timeout=CALL_TIMEOUT_S
        )

    def request(self, *groups: pb.StepRows, **fields: Any) -> pb.ActRequest:
        """An ActRequest of this session."""
        return pb.ActRequest(**{"session_id": self.session_id, "groups": groups, **fields})

    def act(
        self, *groups: pb.StepRows, timeout: float = CALL_TIMEOUT_S, **fields: Any
    ) -> pb.ActResponse:
        """Act, waiting for the answer."""
        request = self.request(*groups, **fields)
        return self.stub.Act(request, timeout=timeout, metadata=self.metadata)

    def begin(
        self, *groups: pb.StepRows, timeout: float = CALL_TIMEOUT_S, **fields: Any
    ) -> grpc.Future:
        """Act, not waiting."""
        return self.stub.Act.future(self.request(*groups, **fields), timeout=timeout)

    def step(
        self,
        episode: int,
        step: int,
        value: float = 0.0,
        reward: float = 0.0,
        status: int = RUNNING,
        **fields: Any,
    ) -> Any:
        """One row. Its action, or None where none is due; a fault of the row is raised."""
        group = rows([episode], [step], seen(value), rewards=[reward], statuses=[status])
        answer = self.act(group, **fields).groups[0]
        if answer.faults:
            raise faults_of(answer)[0]
        return actions_of(answer)[0] if answer.HasField("actions") else None

    def play(
        self, episode: int, steps: int, *, end: int = TERMINATED, start_value: float = 0.0
    ) -> None:
        """A whole episode of that many steps, each worth 1, its values counting up."""
        for step in range(steps):
            self.step(episode, step, start_value + step, 1.0 if step else 0.0)
        self.step(episode, steps, start_value + steps, 1.0, end)

    def stream(self, timeout: float = CALL_TIMEOUT_S) -> Stream:
        """An open StreamAct."""
        stream = Stream(self, timeout)
        self._streams.append(stream)
        return stream


class Stream:
    """One StreamAct call; requests are numbered from 1."""

    def __init__(self, talker: Talker, timeout: float) -> None:
        self._talker = talker
        self._requests: queue.SimpleQueue[pb.StreamActRequest | None] = queue.SimpleQueue()
        self._sent = 0
        self.call = talker.stub.StreamAct(
            iter(self._requests.get, None), timeout=timeout, metadata=talker.metadata
        )

    def send(self, *groups: pb.StepRows, number: int | None = None, **fields: Any) -> int:
        """Put a request on its way; returns its number."""
        self._sent += 1
        number = self._sent if number is None else number
        act = self._talker.request(*groups, **fields)
        self._requests.put(pb.StreamActRequest(request=number, act=act))
        return number

    def receive(self) -> pb.StreamActResponse:
        """The next answer."""
        return next(self.call)

    def ask(self, *groups: pb.StepRows, **fields: Any) -> pb.StreamActResponse:
        """Send, and receive the answer."""
        number = self.send(*groups, **fields)
        answer = self.receive()
        assert answer.request == number
        return answer

    def half_close(self) -> None:
        """Nothing more will be sent."""
        self._requests.put(None)

    def close(self) -> None:
        """Cancel it."""
        self.call.cancel()
        self._requests.put(None)


def refuse_row(talker: Talker, *step, **fields) -> Fault:
    """The fault of one row."""
    with pytest.raises(Fault) as caught:
        talker.step(*step, **fields)
    return caught.value


def waiting(server: Any) -> float:
    """Requests that wait for their answer."""
    return server.server.stats()["requests_waiting"]


def health(talker: Talker, service: str = "") -> int:
    """What a load balancer is told."""
    stub = health_pb2_grpc.HealthStub(talker.channel)
    return stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5).status


def program(code: str, *arguments: object) -> subprocess.Popen[bytes]:
    """A process that runs that code, which may import from here; its output is a pipe."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
