"""Why no server answers: a second look, with plain sockets, once gRPC has given up.

gRPC reports one status and prose for a closed port, a wrong name, a silent firewall and a wrong
certificate. People need to know which. Blocking; any thread.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import tempfile
import threading
import time

from client_sdk.config import Address
from client_sdk.errors import (
    ConnectError,
    ConnectRefused,
    ConnectTimeout,
    NameNotResolved,
    TlsError,
)
from client_sdk.transport import Endpoint


def diagnose(endpoint: Endpoint, waited_s: float, why: str, timeout_s: float) -> ConnectError:
    """The error to raise for a server that could not be reached.

    Args:
        endpoint: Where and how it was tried.
        waited_s: For how long, for the message.
        why: What gRPC said last.
        timeout_s: How long this may take.
    """
    found: list[ConnectError] = []
    # Name resolution cannot be interrupted: a thread that may be left behind.
    look = threading.Thread(
        target=lambda: found.append(_look(endpoint, waited_s, why, timeout_s)), daemon=True
    )
    look.start()
    look.join(timeout_s + 0.5)
    return found[0] if found else _silent(endpoint.address, waited_s)


def _look(endpoint: Endpoint, waited_s: float, why: str, timeout_s: float) -> ConnectError:
    address = endpoint.address
    until = time.monotonic() + timeout_s
    try:
        candidates = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except OSError as error:
        return NameNotResolved(
            f"no machine is known by the name {address.host!r} ({error}). Check the spelling, or "
            "use its IP address."
        )
    refusal: OSError | None = None
    for host in dict.fromkeys(str(candidate[4][0]) for candidate in candidates):
        try:
            connection = socket.create_connection(
                (host, address.port), timeout=max(until - time.monotonic(), 0.05)
            )
        except ConnectionRefusedError as error:
            refusal = error
            continue
        except TimeoutError:
            continue
        except OSError as error:
            return ConnectError(f"cannot reach {address}: {error.strerror or error}")
        with connection:
            connection.settimeout(max(until - time.monotonic(), 0.05))
            return _listens(endpoint, connection, waited_s, why)
    if refusal is not None:
        return ConnectRefused(
            f"nobody listens on {address} (tried for {waited_s:.3g} s). Is the policy server "
            "running, and on that port?"
        )
    return _silent(address, waited_s)


def _silent(address: Address, waited_s: float) -> ConnectTimeout:
    return ConnectTimeout(
        f"nothing answers at {address} within {waited_s:.3g} s, not even to refuse. Is the "
        "address right, and does a firewall let the port through?"
    )


def _listens(
    endpoint: Endpoint, connection: socket.socket, waited_s: float, why: str
) -> ConnectError:
    """Something accepts connections: does it speak the TLS that we do?"""
    address, tls = endpoint.address, endpoint.tls
    if tls is None:
        anyone = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        anyone.check_hostname = False
        anyone.verify_mode = ssl.CERT_NONE
        anyone.set_alpn_protocols(["h2"])
        with contextlib.suppress(OSError), anyone.wrap_socket(connection):
            return TlsError(
                f"the server at {address} speaks TLS and this client does not: pass "
                "tls=TlsConfig(root_certificates=...)"
            )
    else:
        try:
            with _context(endpoint).wrap_socket(connection, server_hostname=address.host) as secure:
                # A server that misses a client certificate lets the handshake pass, and hangs up.
                hung_up = not secure.recv(1)
        except ConnectionResetError:
            hung_up = True
        except ssl.SSLCertVerificationError as error:
            return TlsError(
                f"the certificate of {address} is refused: {error.verify_message}. "
                "TlsConfig.root_certificates must hold the authority that signed it, and the "
                "address must be a name that it was issued for."
            )
        except ssl.SSLError as error:
            return TlsError(
                f"the server at {address} does not speak TLS, or asks for a client certificate "
                f"(TlsConfig.certificate and .key): {error.reason or error}"
            )
        except OSError:
            hung_up = False
        if hung_up:
            return TlsError(
                f"the server at {address} hangs up after the TLS handshake: it probably asks for a "
                "client certificate, which is TlsConfig.certificate and .key, signed by an "
                "authority that it knows"
            )
    return ConnectTimeout(
        f"something listens on {address} but did not open a session within {waited_s:.3g} s "
        f"({why}). Is it a policy server?"
    )


def _context(endpoint: Endpoint) -> ssl.SSLContext:
    tls = endpoint.tls
    roots = tls.read("root_certificates") if tls else None
    context = ssl.create_default_context(cadata=roots.decode() if roots else None)
    context.set_alpn_protocols(["h2"])
    certificate, key = (tls.read("certificate"), tls.read("key")) if tls else (None, None)
    if certificate and key:
        # The ssl module reads certificates from files only.
        with tempfile.NamedTemporaryFile(suffix=".pem") as file:
            file.write(key + b"\n" + certificate)
            file.flush()
            context.load_cert_chain(file.name)
    return context
