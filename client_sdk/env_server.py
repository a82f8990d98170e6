"""``EnvServer``: Gymnasium environments behind a port, for a trainer that steps them from elsewhere.

Started and stopped by one thread. gRPC's threads answer, each environment has a thread of its own,
and one more looks after leases.
"""

from __future__ import annotations

import dataclasses
import hmac
import logging
import threading
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from typing import Any, Self

import grpc

from client_sdk.config import ServerTls, is_loopback, is_token
from client_sdk.credentials import token_fault
from client_sdk.env_registry import EnvRegistry
from client_sdk.env_service import SERVICE_NAME, EnvService
from client_sdk.env_source import EnvFunction, EnvSource
from client_sdk.listening import (
    bind,
    remove_if_ours,
    server_options,
    write_atomically,
)
from client_sdk.values import check_type, is_number, is_whole
from client_sdk.wire.faults import ERROR_TRAILER

logger = logging.getLogger(__name__)

_OPEN_SERVICES = ("/grpc.health.v1.Health/",)
"""What load balancers ask without a token."""

_SPARE_THREADS = 16
"""For calls that are no Drive: one environment each at most, and they are short."""


@dataclasses.dataclass(frozen=True)
class EnvServerConfig:
    """Where a host of environments listens, and what it admits.

    Raises:
        ValueError: A value is out of range; the message names the field.
    """

    host: str = "127.0.0.1"
    """Interface to listen on. Anything but loopback needs ``tls`` and ``token``, or ``insecure``."""
    port: int = 9901
    """TCP port; 0 takes a free one."""
    address_file: str | None = None
    """The bound HOST:PORT is written here, atomically, once the host answers."""
    token: str | None = dataclasses.field(default=None, repr=False)
    """Bearer token that every call must carry; None: none is asked for."""
    tls: ServerTls | None = None
    """Certificates; None: plaintext."""
    insecure: bool = False
    """Listen beyond loopback without TLS and token all the same."""
    any_env: bool = False
    """Clients may ask for every environment that is registered on the host, not only for its own."""
    max_envs: int = 256
    """Environments that are open at once, those of vector environments counted one by one."""
    max_watchers: int = 16
    """Clients that watch frames at once."""
    lease_s: float = 60.0
    """Environments of which nothing was heard for this long are closed; a stream that is open
    counts as heard."""
    max_message_bytes: int = 64 * 1024 * 1024
    """One request. Answers are as large as observations are."""
    keepalive_s: float = 10.0
    """A silent connection is probed this often, and given up after as long again without answer."""

    def __post_init__(self) -> None:
        given: dict[str, Any] = vars(self)  # whatever their annotations say

        def check(condition: bool, field: str, expected: str) -> None:
            if not condition:
                value = given[field]
                got = type(value).__name__ if field in ("token", "tls") else repr(value)
                raise ValueError(f"EnvServerConfig.{field}: expected {expected}, got {got}")

        def check_count(field: str, low: int, high: int) -> None:
            value = given[field]
            check(
                is_whole(value) and low <= value <= high, field, f"a whole number, {low} to {high}"
            )

        check(isinstance(given["host"], str) and self.host != "", "host", "a host name or address")
        check_count("port", 0, 65535)
        check_count("max_envs", 1, 2**20)
        check_count("max_watchers", 1, 4096)
        check_count("max_message_bytes", 1, 2**31 - 1)
        for field in ("lease_s", "keepalive_s"):
            value = given[field]
            number = is_number(value) and 1e-3 <= value <= 1e6
            check(number, field, "a number of seconds, 0.001 to 1e6")
        for field in ("insecure", "any_env"):
            check(isinstance(given[field], bool), field, "True or False")
        file, tls, token = given["address_file"], given["tls"], given["token"]
        check(file is None or isinstance(file, str | PathLike), "address_file", "a path or None")
        check(tls is None or isinstance(tls, ServerTls), "tls", "a ServerTls or None")
        check(token is None or is_token(token), "token", "visible ASCII characters, or None")
        if not (is_loopback(self.host) or self.insecure or (self.tls and self.token)):
            raise ValueError(
                f"EnvServerConfig.host: listening on {self.host!r} without TLS and a token lets "
                "anyone on that network run your simulator. Set tls= and token=, or insecure=True "
                "(--insecure) if the network itself is trusted."
            )


class EnvServer:
    """Hosts Gymnasium environments.

    ::

        with EnvServer("CartPole-v1", EnvServerConfig(port=9901)) as server:
            print(server.address)
            server.wait()

    Thread-safe where marked; ``start`` and ``stop`` are for the thread that created it. Not usable
    after a fork.
    """

    def __init__(
        self,
        env: str | EnvFunction,
        config: EnvServerConfig | None = None,
        *,
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Prepare; nothing listens until ``start``.

        Args:
            env: What clients get who ask for nothing else: a Gymnasium id, ``module:function``, or
                a function that returns an environment.
            config: Where to listen, what to admit.
            kwargs: Keyword arguments of ``env``; a client's come on top.

        Raises:
            InvalidValueError: An argument is of another type.
            gymnasium.error.Error: No such id.
            ModuleNotFoundError: No such module.
        """
        if not callable(env):
            check_type(env, str, "the id of an environment, or a function that makes one", "env")
        check_type(config, (EnvServerConfig, type(None)), "an EnvServerConfig or None", "config")
        check_type(kwargs, (Mapping, type(None)), "a dict or None", "kwargs")
        self._config = config or EnvServerConfig()
        self._source = EnvSource(env, kwargs or {}, any_env=self._config.any_env)
        self._registry = EnvRegistry(max_envs=self._config.max_envs, lease_s=self._config.lease_s)
        self._server: grpc.Server | None = None
        self._stopping = threading.Event()
        self._shut = threading.Event()
        self._sweeper: threading.Thread | None = None
        self._address = ""

    def start(self) -> str:
        """Listen and answer; once, also where it has been stopped.

        Returns:
            The bound address, HOST:PORT.

        Raises:
            RuntimeError: It was started before.
            ServerStartError: The port is in use, or the certificates are no good.
        """
        if self._address:
            raise RuntimeError("this EnvServer was started before: make another")
        config = self._config
        # A Drive holds a thread for as long as it lives, and has an environment at least.
        threads = config.max_envs + config.max_watchers + _SPARE_THREADS
        server = grpc.server(
            ThreadPoolExecutor(threads, thread_name_prefix="env-server"),
            interceptors=[_TokenInterceptor(config.token)] if config.token else [],
            options=server_options(config.max_message_bytes, -1, config.keepalive_s),
            maximum_concurrent_rpcs=threads,
        )
        service = EnvService(
            self._source,
            self._registry,
            lease_s=config.lease_s,
            max_watchers=config.max_watchers,
        )
        server.add_generic_rpc_handlers((service.handler(),))
        _add_health_and_reflection(server)
        self._address = bind(server, config.host, config.port, config.tls)
        server.start()
        self._server = server
        self._sweeper = threading.Thread(target=self._sweep, name="env-leases", daemon=True)
        self._sweeper.start()
        if config.address_file is not None:
            try:
                write_atomically(config.address_file, self._address)
            except BaseException:
                self.stop()
                raise
        return self._address

    def stop(self) -> None:
        """Close all environments and end, within seconds. Stopping twice is fine."""
        server, self._server = self._server, None
        if server is None:
            return
        self._stopping.set()
        self._shut.set()
        ended = server.stop(0.0)
        self._registry.end(_CLOSE_S)
        ended.wait(_STOP_S)
        if self._sweeper is not None:
            self._sweeper.join(_STOP_S)
        if self._config.address_file is not None:
            remove_if_ours(self._config.address_file, self._address)

    @property
    def address(self) -> str:
        """HOST:PORT as bound; empty before ``start``. Any thread."""
        return self._address

    @property
    def name(self) -> str:
        """Of the environment that is hosted. Any thread."""
        return self._source.name

    @property
    def open_envs(self) -> int:
        """Environments that clients have open. Any thread."""
        return len(self._registry)

    def shut(self) -> None:
        """Let ``wait`` return; whoever waits is to ``stop``. Any thread."""
        self._shut.set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until it is shut or stopped. Any thread.

        Returns:
            Whether it was.
        """
        return self._shut.wait(timeout_s)

    def __enter__(self) -> Self:
        if self._server is None:
            self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def __del__(self) -> None:
        if getattr(self, "_server", None) is not None:
            warnings.warn(
                f"unstopped {type(self).__name__}", ResourceWarning, stacklevel=2, source=self
            )

    def _sweep(self) -> None:
        pause_s = min(1.0, self._config.lease_s / 4)
        while not self._stopping.wait(pause_s):
            try:
                self._registry.expire()
            except Exception:  # the host outlives a bug of one sweep
                logger.exception("looking after leases failed")


_CLOSE_S = 2.5
"""Environments get so long to close when the host stops."""

_STOP_S = 0.7
"""Calls that were cancelled get so long to end, and so does the sweeper."""


class _TokenInterceptor(grpc.ServerInterceptor):  # type: ignore[misc, unused-ignore]
    """Refuses calls that do not carry ``authorization: Bearer TOKEN``."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

    def intercept_service(
        self, continuation: Callable[[Any], Any], handler_call_details: Any
    ) -> Any:
        """Let a call through to its handler, or to one that refuses it."""
        handler = continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith(_OPEN_SERVICES):
            return handler
        given = dict(handler_call_details.invocation_metadata).get("authorization", "")
        given = given.encode() if isinstance(given, str) else given
        if hmac.compare_digest(given, self._expected):
            return handler
        return _refusal(handler, present=bool(given))


def _refusal(handler: Any, *, present: bool) -> Any:
    fault = token_fault("host", present=present)

    def refuse(_request: Any, context: Any) -> None:
        context.set_trailing_metadata(((ERROR_TRAILER, fault.to_detail().SerializeToString()),))
        context.abort(fault.status, str(fault))

    if handler.request_streaming and handler.response_streaming:
        return grpc.stream_stream_rpc_method_handler(refuse)
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(refuse)
    return grpc.unary_unary_rpc_method_handler(refuse)


def _add_health_and_reflection(server: grpc.Server) -> None:
    """Where the packages are installed; a simulator's machine may do without."""
    try:
        from grpc_health.v1 import health, health_pb2, health_pb2_grpc
        from grpc_reflection.v1alpha import reflection
    except ImportError:
        logger.debug("no grpcio-health-checking or grpcio-reflection: serving without them")
        return
    servicer = health.HealthServicer()
    for name in ("", SERVICE_NAME):
        servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    reflection.enable_server_reflection(
        (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), server
    )
