"""What a server needs to listen: options, a port, and a file that says where.

Shared by whoever listens. Blocking; any thread.
"""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from client_sdk.config import ServerTls
from client_sdk.credentials import server_credentials
from client_sdk.errors import InvalidValueError

logger = logging.getLogger(__name__)


class ServerStartError(RuntimeError):
    """The server could not listen; the message names the address and the likely cause."""


def server_options(
    max_request_bytes: int, max_answer_bytes: int, keepalive_s: float
) -> list[tuple[str, int]]:
    """Options of gRPC for a server.

    Args:
        max_request_bytes: -1: no limit.
        max_answer_bytes: Likewise.
        keepalive_s: A silent connection is probed this often, and given up after as long again.
    """
    keepalive_ms = int(keepalive_s * 1000)
    return [
        # Else two processes can bind one port, and each gets half of the connections.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", max_request_bytes),
        ("grpc.max_send_message_length", max_answer_bytes),
        # Half-open connections are noticed, busy or idle.
        ("grpc.keepalive_time_ms", keepalive_ms),
        ("grpc.keepalive_timeout_ms", keepalive_ms),
        # What really bounds the wait for a ping's answer; else it is a minute.
        ("grpc.http2.ping_timeout_ms", keepalive_ms),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        # Clients may probe us as often.
        ("grpc.http2.min_ping_interval_without_data_ms", 1000),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 1000),
    ]


def bind(server: Any, host: str, port: int, tls: ServerTls | None) -> str:
    """Take a port.

    Args:
        server: Of gRPC, not started.
        host: A name or an address.
        port: 0 takes a free one.
        tls: None: plaintext.

    Returns:
        HOST:PORT as bound.

    Raises:
        ServerStartError: The port is in use, or the certificates are no good.
    """
    host = host.strip("[]")
    if ":" in host:  # IPv6
        host = f"[{host}]"
    address = f"{host}:{port}"
    try:
        credentials = None if tls is None else server_credentials(tls)
    except InvalidValueError as error:
        raise ServerStartError(f"the certificates are no good: {error}") from error
    try:
        if credentials is None:
            bound = server.add_insecure_port(address)
        else:
            bound = server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise ServerStartError(
            f"cannot listen on {address}: the port is in use, or the address is not one of this "
            "machine. Choose another --port, or 0 for a free one"
        ) from error
    return f"{host}:{bound}"


def write_atomically(path: str | Path, text: str) -> None:
    """Write a file of which a reader sees the whole text, or nothing.

    Raises:
        ServerStartError: It cannot be written.
    """
    path = Path(path)
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        Path(temporary).replace(path)
    except OSError as error:
        raise ServerStartError(
            f"cannot write the address to {path}: {error.strerror}. Choose another --address-file"
        ) from error


def remove_if_ours(path: str | Path, text: str) -> None:
    """Remove that file, unless another server has written it since."""
    path = Path(path)
    try:
        if path.read_text() == text:
            path.unlink()
    except OSError as error:
        logger.debug("cannot remove %s: %s", path, error)
