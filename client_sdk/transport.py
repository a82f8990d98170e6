"""Where a server is and how it is spoken to: channels, credentials, statuses as exceptions.

``Endpoint`` says how to connect; ``Connection`` and ``Stream`` are the blocking way to do it (see
``aio_transport`` for the other). No retries here, and no meaning: bytes and messages in and out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import queue
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError

from client_sdk.config import Address, TlsConfig
from client_sdk.errors import (
    ClosedClientError,
    ConcurrentUseError,
    ConnectError,
    ConnectTimeout,
    ForkedClientError,
    IncompatibleProtocolError,
    LimitExceededError,
    PolicyClientError,
    ServerError,
    UnauthenticatedError,
    UnavailableError,
    UnknownSessionError,
    error_from_fault,
)
from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.faults import ERROR_TRAILER, Fault

SERVICE = pb.DESCRIPTOR.services_by_name["PolicyService"].full_name
MAX_REDIRECTS = 3

_forks = 0


def _count_fork() -> None:
    global _forks  # noqa: PLW0603
    _forks += 1


os.register_at_fork(after_in_child=_count_fork)


def fork_count() -> int:
    """How many forks lie between this process and the first one. gRPC survives none of them."""
    return _forks


_DISTRUST = (
    "CERTIFICATE_VERIFY_FAILED",
    "Hostname Verification Check failed",
    "WRONG_VERSION_NUMBER",  # plaintext where TLS was expected
)


class Disconnected(Exception):
    """The connection is gone, or never was: worth trying again. Never leaves the package."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why

    @property
    def is_distrust(self) -> bool:
        """Whether this side refused the other's certificate, or got none: waiting mends neither.

        gRPC says so in words only. Should they change, finding out takes longer; no more than that.
        """
        return any(words in self.why for words in _DISTRUST)


class Overdue(Exception):
    """A deadline has passed. Never leaves the package."""


class Guard:
    """Lets one thread at a time in, and nobody after a fork or the end. Any thread.

    The lock is reentrant, for an interrupt (Ctrl-C) may strike between taking a lock and noting it:
    the same thread can then still go on, and close.

    Attributes:
        closed: Set once; nobody is let in afterwards.
    """

    __slots__ = ("_forks", "_lock", "_what", "closed", "take")

    def __init__(self, what: str) -> None:
        self._what = what
        self._lock = threading.RLock()
        self._forks = _forks
        self.closed = False
        self.take = self._lock.acquire

    @property
    def forked(self) -> bool:
        """Whether this process is a fork of the one that made it."""
        return self._forks != _forks

    def check(self) -> None:
        """Raise if nobody may come in any more.

        Raises:
            ForkedClientError: This is another process.
            ClosedClientError: It is closed.
        """
        if self._forks != _forks:
            raise ForkedClientError(
                f"this {self._what} was made before os.fork(), and its connection belongs to the "
                f"parent process; make a new {self._what} in this one"
            )
        if self.closed:
            raise ClosedClientError(f"this {self._what} is closed")

    def __enter__(self) -> None:
        if self._forks != _forks or self.closed:
            self.check()
        if not self._lock.acquire(blocking=False):
            raise ConcurrentUseError(
                f"another thread is inside this {self._what}, which is not thread-safe: "
                f"give each thread its own {self._what}, or take a lock around it"
            )

    def __exit__(self, *exception: object) -> None:
        self._lock.release()


class Backoff:
    """Delays between attempts: doubling, bounded, and scattered so that clients do not march in step."""

    def __init__(self, first_s: float = 0.1, most_s: float = 2.0) -> None:
        self._next_s = first_s
        self._most_s = max(first_s, most_s)

    def delay_s(self) -> float:
        """The next delay."""
        delay_s = self._next_s
        self._next_s = min(delay_s * 2.0, self._most_s)
        return delay_s * random.uniform(0.5, 1.0)  # noqa: S311 - no secret


class Attempts:
    """When to try to connect again, and when to give up. Times are ``time.monotonic``'s.

    Attributes:
        diagnosis_s: Kept back from the budget for finding out why it did not work.
    """

    def __init__(
        self, start: float, budget_s: float, longest_attempt_s: float, lease_s: float | None
    ) -> None:
        self.diagnosis_s = min(1.5, 0.2 * budget_s)
        self._is_first = lease_s is None
        self._answer: PolicyClientError | None = None  # the latest refusal
        self._start = start
        self._until = start + budget_s - self.diagnosis_s
        self._longest_attempt_s = min(longest_attempt_s, 3600.0)
        # Several attempts must fit into a session's lease.
        self._backoff = Backoff(most_s=1.0 if lease_s is None else min(2.0, lease_s / 6.0))

    def timeout_s(self, now: float) -> float:
        """Of the attempt that starts now."""
        return min(max(self._until - now, 0.05), self._longest_attempt_s)

    def waited_s(self, now: float) -> float:
        """Since the first attempt."""
        return now - self._start

    def delay_s(self, now: float, failure: PolicyClientError | Disconnected) -> float | None:
        """Until the next attempt; None: there is no time left for one, or it would be no better.

        Raises:
            PolicyClientError: ``failure``, where trying again cannot help.
        """
        asked_s: float | None = None
        if isinstance(failure, PolicyClientError):
            self._answer = failure
            asked_s = failure.retry_after_s
            if asked_s is None and not isinstance(failure, UnavailableError):
                raise failure
        # Who was connected is patient: that server is about to be put right.
        if self._is_first and isinstance(failure, Disconnected) and failure.is_distrust:
            return None
        left_s = self._until - now
        if asked_s is not None:
            return asked_s if asked_s < left_s else None
        return min(self._backoff.delay_s(), left_s) if left_s > 0 else None

    def verdict(self, diagnosis: ConnectError) -> PolicyClientError:
        """What to raise in the end: the last attempt is short, and an earlier one may have told."""
        if self._answer is not None and isinstance(diagnosis, ConnectTimeout):
            return self._answer
        return diagnosis


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """A server to connect to, and who we are."""

    address: Address
    tls: TlsConfig | None = None
    token: str | None = dataclasses.field(default=None, repr=False)
    peer: str = "policy server"
    """What is expected there, as messages call it."""

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Sent with every call."""
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()

    @property
    def credentials(self) -> grpc.ChannelCredentials | None:
        """None: plaintext."""
        if self.tls is None:
            return None
        return grpc.ssl_channel_credentials(
            root_certificates=self.tls.read("root_certificates"),
            private_key=self.tls.read("key"),
            certificate_chain=self.tls.read("certificate"),
        )

    def options(self, target: Address) -> list[tuple[str, Any]]:
        """Channel options for this server, or for ``target`` that it named instead of itself."""
        options: list[tuple[str, Any]] = [
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_send_message_length", -1),
            # Half-open connections are noticed within 20 s.
            ("grpc.keepalive_time_ms", 10_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),
            # Retries are ours, and each attempt starts afresh: no memory of the last one.
            ("grpc.enable_retries", 0),
            ("grpc.use_local_subchannel_pool", 1),
        ]
        if target.is_loopback:
            options.append(("grpc.enable_http_proxy", 0))
        if target != self.address and self.tls is not None:
            options.append(("grpc.ssl_target_name_override", self.address.host))
        return options


def method(name: str) -> str:
    """The path of an rpc."""
    return f"/{SERVICE}/{name}"


_LOST = frozenset(
    {
        grpc.StatusCode.OK,  # a stream that the server ended
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
    }
)


def error_of_status(
    code: grpc.StatusCode, details: str | None, trailers: Iterable[Any] | None
) -> PolicyClientError | Disconnected:
    """What a failed call or an ended stream is raised as."""
    for key, value in trailers or ():
        if key == ERROR_TRAILER:
            with contextlib.suppress(DecodeError):
                return error_from_fault(Fault.from_detail(pb.ErrorDetail.FromString(value)))
    text = details or code.name
    if code in _LOST:
        return Disconnected(f"{code.name}: {text}")
    if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
        return UnauthenticatedError(f"the server refuses this client: {text}")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        # gRPC's own words, which name sizes at most.
        return LimitExceededError(f"{text}. What it receives is limited by its max_message_bytes")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return IncompatibleProtocolError(
            f"whatever answers there does not offer this service: {text}"
        )
    return ServerError(f"{code.name}: {text}")


def error_of_stream(
    error: PolicyClientError | Disconnected,
) -> PolicyClientError | Disconnected:
    """Likewise, where the server's "not now" or "who are you" calls for another connection."""
    if isinstance(error, UnavailableError | UnknownSessionError):
        return Disconnected(str(error))
    return error


class Connection:
    """A channel to one server: every rpc of the contract, blocking. Any thread."""

    def __init__(self, endpoint: Endpoint, target: Address | None = None) -> None:
        target = target or endpoint.address
        options, credentials = endpoint.options(target), endpoint.credentials
        self._metadata = endpoint.metadata
        self._channel = (
            grpc.insecure_channel(str(target), options)
            if credentials is None
            else grpc.secure_channel(str(target), credentials, options)
        )

    def open_session(
        self, request: pb.OpenSessionRequest, timeout_s: float
    ) -> pb.OpenSessionResponse:
        """Call ``OpenSession``.

        Raises:
            PolicyClientError: It was refused.
            Disconnected: It did not get there, or back.
        """
        return self._unary("OpenSession", request, pb.OpenSessionResponse.FromString, timeout_s)

    def close_session(
        self, request: pb.CloseSessionRequest, timeout_s: float
    ) -> pb.CloseSessionResponse:
        """Call ``CloseSession``; raises as ``open_session``."""
        return self._unary("CloseSession", request, pb.CloseSessionResponse.FromString, timeout_s)

    def act(self, request: pb.ActRequest, timeout_s: float) -> pb.ActResponse:
        """Call ``Act``; raises as ``open_session``."""
        return self._unary("Act", request, pb.ActResponse.FromString, timeout_s)

    def get_policy(
        self, request: pb.GetPolicyRequest, timeout_s: float
    ) -> Iterator[pb.GetPolicyResponse]:
        """Call ``GetPolicy``: a header, then pieces; raises as ``open_session``, while read.

        Closing the iterator cancels the call.
        """
        parts: Any = None
        try:
            call: Any = self._channel.unary_stream(
                method("GetPolicy"),
                pb.GetPolicyRequest.SerializeToString,
                pb.GetPolicyResponse.FromString,
            )
            parts = call(request, timeout=timeout_s, metadata=self._metadata)
            yield from parts
        except grpc.RpcError as error:
            raise error_of_call(error) from None
        except ValueError as error:  # another thread has closed the channel
            raise Disconnected(str(error)) from None
        finally:
            if parts is not None:
                parts.cancel()

    def upload_episodes(
        self, request: pb.UploadEpisodesRequest, timeout_s: float
    ) -> pb.UploadEpisodesResponse:
        """Call ``UploadEpisodes``; raises as ``open_session``."""
        reader = pb.UploadEpisodesResponse.FromString
        return self._unary("UploadEpisodes", request, reader, timeout_s)

    def stream_act(self) -> Stream:
        """Call ``StreamAct``."""
        # Identity serializers: bytes are made and read by the thread that cares.
        call: Any = self._channel.stream_stream(method("StreamAct"))
        return Stream(lambda requests: call(requests, metadata=self._metadata))

    def close(self) -> None:
        """Close the channel, and whatever runs on it."""
        self._channel.close()

    def _unary(
        self, name: str, request: Any, reader: Callable[[bytes], _T], timeout_s: float
    ) -> _T:
        try:
            call = self._channel.unary_unary(method(name), type(request).SerializeToString, reader)
            return call(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_of_call(error) from None
        except ValueError as error:  # another thread has closed the channel
            raise Disconnected(str(error)) from None


_T = TypeVar("_T")


class Stream:
    """``StreamAct``: bytes out, bytes in, with deadlines. One thread at a time; ``close`` from any.

    gRPC's own blocking reads know one deadline for the whole stream, and one that is interrupted
    (Ctrl-C) cannot be taken up again. So a thread of ours reads, and ``receive`` waits on a queue,
    which bears both.
    """

    def __init__(self, start: Callable[[Any], Any]) -> None:
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._inbox: queue.SimpleQueue[bytes | PolicyClientError | Disconnected] = (
            queue.SimpleQueue()
        )
        self.send = self._outbox.put
        self._call = start(iter(self._outbox.get, None))
        # It must not keep the stream alive, only what it works with.
        threading.Thread(
            target=_read, args=(self._call, self._inbox), name="client_sdk reader", daemon=True
        ).start()

    def receive(self, timeout_s: float) -> bytes:
        """The next answer.

        Raises:
            Overdue: None came so soon; it may still come.
            Disconnected: The stream has ended.
            PolicyClientError: The server ended it with a refusal.
        """
        try:
            item = self._inbox.get(True, 0.0 if timeout_s < 0.0 else min(timeout_s, _LONG_S))
        except queue.Empty:
            raise Overdue from None
        if isinstance(item, bytes):
            return item
        self._inbox.put(item)  # for whoever asks again
        raise item

    def close(self) -> None:
        """Give up the stream; whoever waits on it is told so."""
        self._call.cancel()
        self._outbox.put(None)


_LONG_S = 1e6
"""More than queues take is too much for them."""


def _read(call: Any, inbox: queue.SimpleQueue[bytes | PolicyClientError | Disconnected]) -> None:
    """Put answers into the inbox, and last of all why there are no more."""
    put = inbox.put
    try:
        for data in call:
            put(data)
        put(Disconnected("the server ended the stream"))
    except grpc.RpcError as error:
        put(error_of_stream(error_of_call(error)))
    except Exception as error:  # else whoever waits would wait in vain
        put(Disconnected(f"reading failed: {error!r}"))


def error_of_call(error: Any) -> PolicyClientError | Disconnected:
    """What gRPC's exception says; it is a call as well."""
    return error_of_status(error.code(), error.details(), error.trailing_metadata())
