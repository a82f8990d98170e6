"""``policy-client certs``: an authority of one's own, what it signed, and a token.

For whom no authority serves already. Needs the ``cryptography`` package (extra ``certs``), which
is imported when it is used. Main thread only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import ipaddress
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from client_sdk.errors import InvalidValueError

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

_LOCAL = ("localhost", "127.0.0.1", "::1")
"""Always among the server's names, so that it can be looked at from its own machine."""
_LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOST_NAME = re.compile(rf"(\*\.)?{_LABEL}(\.{_LABEL})*\.?")
_LONGEST_NAME = 253
_MOST_DAYS = 36500
_CLOCKS_DIFFER = dt.timedelta(hours=1)
"""Valid from so long ago, for machines whose clock is behind."""


@dataclasses.dataclass(frozen=True)
class Certificates:
    """What ``make`` has written; as text, what is what and how to go on."""

    directory: Path
    """Where."""
    names: tuple[str, ...]
    """Of the server: host names and addresses."""
    expires: dt.datetime
    """When everything but the token ends."""

    def __str__(self) -> str:
        at = self.directory
        return f"""\
written to {at}, valid until {self.expires:%Y-%m-%d} for {", ".join(self.names)}
  ca.pem      the authority: every client needs it, to know the server
  ca.key      its key: who has it can make certificates that are trusted here; keep it offline
  server.pem  the server's certificate
  server.key  its key: stays on the server
  client.pem  a client's certificate, for a server that asks for one (mTLS)
  client.key  its key: stays on the clients
  token       a random word that clients must know: for the server and for the clients

on the server:
  policy-server train --env CartPole-v1 --host 0.0.0.0 \\
    --tls-cert {at}/server.pem --tls-key {at}/server.key --token-file {at}/token
on a client, with copies of ca.pem and token:
  policy-client run CartPole-v1 --server {_dialled(self.names[0])}:9900 \\
    --tls-ca {at}/ca.pem --token-file {at}/token
for mTLS besides, the server takes
    --tls-client-ca {at}/ca.pem
and the clients, with copies of client.pem and client.key,
    --tls-cert {at}/client.pem --tls-key {at}/client.key"""


def make(directory: Path, hosts: Sequence[str], *, days: int = 365) -> Certificates:
    """Write an authority, a server's and a client's certificate, and a token; all or nothing.

    Args:
        directory: Where to; must not exist yet. Only its owner can read it, and the keys in it.
        hosts: Names and IP addresses under which clients reach the server.
        days: How long the certificates are valid.

    Raises:
        InvalidValueError: A host is neither a name nor an address, or the directory exists.
        ImportError: The ``cryptography`` package is missing.
        OSError: The files cannot be written.
    """
    if not 1 <= days <= _MOST_DAYS:
        raise InvalidValueError(f"expected 1 to {_MOST_DAYS}, got {days}", field="days")
    names = tuple(dict.fromkeys([*map(_checked, hosts), *_LOCAL]))
    _refuse_existing(directory)
    try:
        files, expires = _files(names, dt.timedelta(days=days))
    except ImportError as error:
        raise ImportError(
            "making certificates needs the cryptography package: pip install 'policy-server[certs]'"
        ) from error
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}-"))
    try:
        for name, data in files.items():
            secret = not name.endswith(".pem")
            descriptor = os.open(
                temporary / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if secret else 0o644
            )
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
        # Whoever else made it meanwhile keeps what is in it: only an empty one is replaced.
        temporary.rename(directory)
    except OSError:
        _refuse_existing(directory)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Certificates(directory, names, expires)


def _refuse_existing(directory: Path) -> None:
    if directory.exists() or directory.is_symlink():
        raise InvalidValueError(
            f"{directory} exists, and nothing is overwritten: name a new directory", field="DIR"
        )


def _checked(host: str) -> str:
    """A host as it stands in a certificate."""
    bare = host.strip("[]")
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_address(bare))
    if len(host) > _LONGEST_NAME or _HOST_NAME.fullmatch(host) is None:
        raise InvalidValueError(
            f"expected a host name or an IP address without a port, got {host!r}", field="--host"
        )
    return host.rstrip(".").lower()


def _dialled(name: str) -> str:
    """As it stands before a port."""
    return f"[{name}]" if ":" in name else name


def _files(names: Sequence[str], validity: dt.timedelta) -> tuple[dict[str, bytes], dt.datetime]:
    """The contents of all files, by name; and when the certificates end."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    now = dt.datetime.now(dt.UTC)
    expires = now + validity
    authority_key = ec.generate_private_key(ec.SECP256R1())
    # Two authorities must not have one name: clients would take one for the other.
    authority_name = f"policy-server authority {secrets.token_hex(4)}"

    def subject(name: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])

    def unsigned(name: str, key: EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        is_authority = key is authority_key
        return (
            x509.CertificateBuilder()
            .subject_name(subject(name))
            .issuer_name(subject(authority_name))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _CLOCKS_DIFFER)
            .not_valid_after(expires)
            .add_extension(
                x509.BasicConstraints(ca=is_authority, path_length=0 if is_authority else None),
                critical=True,
            )
            .add_extension(_usage(is_authority=is_authority), critical=True)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
            )
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()),
                critical=False,
            )
        )

    files: dict[str, bytes] = {}

    def issue(file: str, builder: x509.CertificateBuilder, key: EllipticCurvePrivateKey) -> None:
        signed = builder.sign(authority_key, hashes.SHA256())
        files[f"{file}.pem"] = signed.public_bytes(serialization.Encoding.PEM)
        files[f"{file}.key"] = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )

    issue("ca", unsigned(authority_name, authority_key), authority_key)
    for file, purpose, alternatives in (
        ("server", ExtendedKeyUsageOID.SERVER_AUTH, [_alternative(name) for name in names]),
        ("client", ExtendedKeyUsageOID.CLIENT_AUTH, []),
    ):
        key = ec.generate_private_key(ec.SECP256R1())
        builder = unsigned(f"policy-server {file}", key).add_extension(
            x509.ExtendedKeyUsage([purpose]), critical=False
        )
        if alternatives:
            builder = builder.add_extension(
                x509.SubjectAlternativeName(alternatives), critical=False
            )
        issue(file, builder, key)
    files["token"] = f"{secrets.token_urlsafe(32)}\n".encode()
    return files, expires


def _alternative(name: str) -> x509.GeneralName:
    from cryptography import x509

    with contextlib.suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(name))
    return x509.DNSName(name)


def _usage(*, is_authority: bool) -> x509.KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not is_authority,
        key_cert_sign=is_authority,
        crl_sign=is_authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
