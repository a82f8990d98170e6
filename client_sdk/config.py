"""Settings of a client as frozen values, and how an address is written. No I/O but reading PEM files."""

from __future__ import annotations

import dataclasses
import ipaddress
import re
from typing import Any
from urllib.parse import urlsplit

from client_sdk import pem
from client_sdk.errors import InvalidValueError
from client_sdk.pem import Pem
from client_sdk.values import check_type, is_number

_HEADER_WORD = re.compile(r"[!-~]+")
"""What fits into an HTTP header as one word."""


@dataclasses.dataclass(frozen=True)
class Timeouts:
    """How long the client waits before it gives up. Seconds; ``math.inf`` waits for ever.

    Raises:
        InvalidValueError: One of them is not positive; the message names it.
    """

    connect_s: float = 10.0
    """The first connection, from the constructor's start; a refusal is tried again until then."""
    action_s: float = 300.0
    """One answer while connected, the time that a learning server holds it back included."""
    reconnect_s: float = 300.0
    """Coming back after a lost connection, each time."""
    close_s: float = 3.0
    """Closing: the acknowledgements of episodes that just ended, then of the session."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not (is_number(value) and value > 0):
                raise InvalidValueError(
                    f"expected a positive number of seconds, got {value!r}",
                    field=f"Timeouts.{field.name}",
                )


@dataclasses.dataclass(frozen=True)
class TlsConfig:
    """Encrypts the connection and proves who is at its ends.

    Each value is PEM data as bytes, or the path of a PEM file. None of them is shown in ``repr``.
    """

    root_certificates: Pem | None = dataclasses.field(default=None, repr=False)
    """Authorities that may sign the server's certificate; None: those that gRPC trusts."""
    certificate: Pem | None = dataclasses.field(default=None, repr=False)
    """This client's certificate chain, where the server asks for one (mTLS)."""
    key: Pem | None = dataclasses.field(default=None, repr=False)
    """Its private key."""

    def __post_init__(self) -> None:
        if self.root_certificates is not None:
            pem.check_authority(self.root_certificates, "TlsConfig.root_certificates")
        if (self.certificate is None) != (self.key is None):
            raise InvalidValueError(
                "a client certificate needs both certificate= and key=", field="TlsConfig"
            )
        if self.certificate is not None and self.key is not None:
            pem.check_chain(self.certificate, self.key, "TlsConfig")

    def read(self, name: str) -> bytes | None:
        """The PEM data of one field.

        Raises:
            InvalidValueError: Its file cannot be read.
        """
        value: Pem | None = getattr(self, name)
        return None if value is None else pem.read(value, f"TlsConfig.{name}")


@dataclasses.dataclass(frozen=True)
class ServerTls:
    """Certificates of whoever listens, as paths of PEM files. ``check`` looks into them."""

    certificate: str
    """The server's certificate chain."""
    key: str
    """Its private key, without a password."""
    client_ca: str | None = None
    """Clients must present a certificate signed by this authority (mTLS); None: they need none."""

    def check(self) -> None:
        """Refuse what nobody could listen with.

        Raises:
            InvalidValueError: A file cannot be read or is something else, or the key is not that
                of the certificate.
        """
        pem.check_chain(self.certificate, self.key, "ServerTls")
        if self.client_ca is not None:
            pem.check_authority(self.client_ca, "ServerTls.client_ca")


@dataclasses.dataclass(frozen=True)
class Address:
    """Where a server listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether nothing that is sent there leaves this machine."""
        return is_loopback(self.host)

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read ``host:port``, ``[v6]:port`` or ``http://host:port``.

        Raises:
            InvalidValueError: It is none of these.
        """
        if not isinstance(text, str):
            raise InvalidValueError(
                f'expected "host:port" such as "localhost:9900", got {text!r}', field="address"
            )
        rest = text.strip()
        if rest.startswith("https://"):  # whoever writes that must not get plaintext
            raise InvalidValueError(
                f'expected "host:port", got {text!r}; what encrypts is tls=TlsConfig(...) '
                "(--tls, --tls-ca)",
                field="address",
            )
        if rest.startswith("http://"):
            rest = rest.removeprefix("http://").removesuffix("/")
        try:
            parts = urlsplit(f"//{rest}")
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port = None, None
        if not host or not port or parts.path or parts.query or parts.username is not None:
            raise InvalidValueError(
                f'expected "host:port" such as "localhost:9900", got {text!r}', field="address"
            )
        return cls(host, port)


def is_loopback(host: str) -> bool:
    """Whether only this machine can be meant by that host name or address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def is_token(text: Any) -> bool:
    """Whether it can travel as a bearer token."""
    return isinstance(text, str) and _HEADER_WORD.fullmatch(text) is not None


def check_token(
    token: str | None, address: Address, *, tls: TlsConfig | None, insecure: bool
) -> None:
    """Refuse to show a token to a network that can read it.

    Raises:
        InvalidValueError: The token would leave this machine in plain text, or is no token; or
            ``tls`` or ``insecure`` is something else.
    """
    check_type(tls, (TlsConfig, type(None)), "a TlsConfig or None", "tls")
    check_type(insecure, bool, "True or False", "insecure")
    expected = "one word of visible ASCII characters, or None"
    check_type(token, (str, type(None)), expected, "token")
    if token is not None and not is_token(token):
        raise InvalidValueError(f"expected {expected}", field="token")
    if token is None or tls or insecure or address.is_loopback:
        return
    raise InvalidValueError(
        f"a token would travel to {address} in plain text, where anyone on the way can read it. "
        "Pass tls=TlsConfig(...), or insecure=True if the network itself is trusted.",
        field="token",
    )


def check_exposure(host: str, *, protected: bool, insecure: bool) -> None:
    """Refuse to listen where strangers can connect.

    Args:
        host: The interface to listen on.
        protected: With TLS and a token.
        insecure: Whether it was said to be fine.

    Raises:
        InvalidValueError: Anyone on that network could come in.
    """
    if protected or insecure or is_loopback(host):
        return
    raise InvalidValueError(
        f"listening on {host!r} without TLS and a token lets anyone on that network in. Set tls= "
        "and token= (`policy-client certs` makes both), or insecure=True (--insecure) if the "
        "network itself is trusted.",
        field="host",
    )
