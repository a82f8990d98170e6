"""``Channel`` and ``Stream``: gRPC to one server, blocking, for whichever service of the contract.

Bytes and messages in and out; no retries, and no meaning. Any thread may call; a stream is for one
thread at a time.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import grpc

from client_sdk.call_errors import Disconnected, Overdue, error_of_call, error_of_stream
from client_sdk.config import Address
from client_sdk.dialogue import Dialogue
from client_sdk.endpoint import Endpoint
from client_sdk.errors import PolicyClientError

_T = TypeVar("_T")
Metadata = tuple[tuple[str, str], ...]

_LONG_S = 1e6
"""More than queues take is too much for them."""


class Channel:
    """A channel to one server, and the calls of one service over it. Any thread.

    Args:
        endpoint: The server.
        service: Its full name.
        target: Where the server has sent us on to; None: it has not.
    """

    def __init__(self, endpoint: Endpoint, service: str, target: Address | None = None) -> None:
        target = target or endpoint.address
        options, credentials = endpoint.options(target), endpoint.credentials
        self._service = service
        self._metadata = endpoint.metadata
        self._channel = (
            grpc.insecure_channel(str(target), options)
            if credentials is None
            else grpc.secure_channel(str(target), credentials, options)
        )

    def unary(self, name: str, request: Any, answer: type[_T], timeout_s: float) -> _T:
        """Call a unary rpc.

        Args:
            name: Of the rpc.
            request: Its message.
            answer: The class of its answer.
            timeout_s: Give up after this long.

        Raises:
            PolicyClientError: It was refused.
            Disconnected: It did not get there, or back.
        """
        reader: Callable[[bytes], _T] = answer.FromString  # type: ignore[attr-defined]
        try:
            call = self._channel.unary_unary(
                self._path(name), type(request).SerializeToString, reader
            )
            return call(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_of_call(error) from None
        except ValueError as error:  # another thread has closed the channel
            raise Disconnected(str(error)) from None

    def parts(
        self, name: str, request: Any, answer: type[_T], timeout_s: float | None
    ) -> Iterator[_T]:
        """Call an rpc that answers in many parts; as ``unary``, but raises while read.

        Closing the iterator cancels the call.
        """
        parts: Any = None
        reader: Callable[[bytes], _T] = answer.FromString  # type: ignore[attr-defined]
        try:
            call: Any = self._channel.unary_stream(
                self._path(name), type(request).SerializeToString, reader
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

    def stream(self, name: str, metadata: Metadata = ()) -> Stream:
        """Call a bidirectional rpc, with these metadata besides."""
        # Identity serializers: bytes are made and read by the thread that cares.
        call: Any = self._channel.stream_stream(self._path(name))
        all_of_it = self._metadata + metadata
        return Stream(lambda requests: call(requests, metadata=all_of_it))

    def dialogue(self, name: str, metadata: Metadata = ()) -> Dialogue | Stream:
        """Call a bidirectional rpc whose answers the asking thread reads itself, if it can.

        Args:
            name: Of the rpc.
            metadata: Besides those of every call.
        """
        if not _forks_survive():
            inside: Any = self._channel
            with contextlib.suppress(AttributeError, TypeError):  # gRPC has changed inside
                all_of_it = self._metadata + metadata
                return Dialogue(inside._channel, self._path(name), all_of_it)
        return self.stream(name, metadata)

    def close(self) -> None:
        """Close the channel, and whatever runs on it."""
        self._channel.close()

    def _path(self, name: str) -> str:
        return f"/{self._service}/{name}"


class Stream:
    """A bidirectional rpc: bytes out, bytes in, with deadlines. One thread at a time; ``close`` from any.

    gRPC's own blocking reads know one deadline for the whole stream, and one that is interrupted
    (Ctrl-C) cannot be taken up again. So a thread of ours reads, and ``receive`` waits on a queue,
    which bears both.
    """

    busy = False
    """As ``Dialogue.busy``: here whoever comes may wait."""

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

    def ask(self, request: bytes, timeout_s: float) -> bytes:
        """Send, and receive: as ``Dialogue.ask``."""
        self.send(request)
        return self.receive(timeout_s)

    def flush(self, timeout_s: float) -> None:
        """Nothing to do: as ``Dialogue.flush``."""

    def give_up(self) -> None:
        """As ``close``: see ``Dialogue.give_up``."""
        self.close()

    def close(self) -> None:
        """Give up the stream; whoever waits on it is told so."""
        self._call.cancel()
        self._outbox.put(None)


def _forks_survive() -> bool:
    """Whether gRPC is told to: then it waits in a child for the calls that nobody reads there."""
    return os.environ.get("GRPC_ENABLE_FORK_SUPPORT", "").lower() in {"1", "true", "yes"}


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
