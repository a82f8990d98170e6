"""Why no server answers: a second look, with plain sockets, once gRPC has given up.

gRPC reports one status and prose for a closed port, a wrong name, a silent firewall and a wrong
certificate. People need to know which. Blocking; any thread.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time

from client_sdk import pem
from client_sdk.config import Address
from client_sdk.endpoint import Endpoint
from client_sdk.errors import (
    ConnectError,
    ConnectRefused,
    ConnectTimeout,
    NameNotResolved,
    TlsError,
)


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
            f"nobody listens on {address} (tried for {waited_s:.3g} s). Is the {endpoint.peer} "
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
    failure = (
        _plaintext(endpoint, connection) if endpoint.tls is None else _tls(endpoint, connection)
    )
    return failure or ConnectTimeout(
        f"something listens on {endpoint.address} but did not {endpoint.welcome} within "
        f"{waited_s:.3g} s ({why}). Is it a {endpoint.peer}? One that takes longer than that needs a "
        "longer connect timeout."
    )


def _plaintext(endpoint: Endpoint, connection: socket.socket) -> TlsError | None:
    anyone = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anyone.check_hostname = False
    anyone.verify_mode = ssl.CERT_NONE
    anyone.set_alpn_protocols(["h2"])
    with contextlib.suppress(OSError), anyone.wrap_socket(connection):
        return TlsError(
            f"the server at {endpoint.address} speaks TLS and this client does not: pass "
            "tls=TlsConfig(root_certificates=...) or --tls-ca, with the authority that signed its "
            "certificate"
        )
    return None


def _tls(endpoint: Endpoint, connection: socket.socket) -> TlsError | None:
    address = endpoint.address
    shows_certificate = endpoint.tls is not None and endpoint.tls.certificate is not None
    try:
        with _context(endpoint).wrap_socket(connection, server_hostname=address.host) as secure:
            # A server that misses a client certificate, or does not like it, lets the handshake
            # pass, and hangs up.
            refused = not secure.recv(1)
    except ssl.SSLCertVerificationError as error:
        return TlsError(f"the certificate of {address} is refused: {_distrust(error, address)}")
    except ssl.SSLError as error:
        if "ALERT" not in (error.reason or ""):
            return TlsError(
                f"the server at {address} does not speak TLS ({error.reason or error}): connect "
                "without tls= or --tls-ca, or start the server with --tls-cert and --tls-key"
            )
        refused = True
    except ConnectionResetError:
        refused = True
    except OSError:
        refused = False
    if not refused:
        return None
    if shows_certificate:
        return TlsError(
            f"the server at {address} hangs up on this client certificate: it must be valid today "
            "and signed by the authority that the server asks for (--tls-client-ca)"
        )
    return TlsError(
        f"the server at {address} hangs up after the TLS handshake: it probably asks for a client "
        "certificate, which is TlsConfig.certificate and .key, or --tls-cert and --tls-key, signed "
        "by an authority that it knows"
    )


_NOT_YET_VALID, _EXPIRED, _OTHER_NAME, _OTHER_IP = 9, 10, 62, 64
"""X509_V_ERR_* of OpenSSL."""


def _distrust(error: ssl.SSLCertVerificationError, address: Address) -> str:
    """Why a server's certificate is not believed, and what to do."""
    said = str(error.verify_message).rstrip(".")
    if error.verify_code == _EXPIRED:
        return f"{said}. Give the server a new one; `policy-client certs` makes them"
    if error.verify_code == _NOT_YET_VALID:
        return f"{said}. Is the clock of this machine right?"
    if error.verify_code in (_OTHER_NAME, _OTHER_IP):
        return (
            f"{said}. Connect to a name that it was issued for, or give the server one that was "
            f"issued for {address.host} (policy-client certs --host {address.host})"
        )
    return (
        f"{said}. TlsConfig.root_certificates, or --tls-ca, must hold the authority that signed it"
    )


def _context(endpoint: Endpoint) -> ssl.SSLContext:
    tls = endpoint.tls
    roots = tls.read("root_certificates") if tls else None
    context = ssl.create_default_context(cadata=roots.decode() if roots else None)
    context.set_alpn_protocols(["h2"])
    certificate, key = (tls.read("certificate"), tls.read("key")) if tls else (None, None)
    if certificate and key:
        pem.load_chain(context, certificate, key)
    return context
