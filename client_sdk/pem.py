"""PEM files: read, and checked before gRPC gets them, which says little of what is wrong with them.

Nothing here is kept. Any thread.
"""

from __future__ import annotations

import ssl
import tempfile
from os import PathLike
from pathlib import Path

from client_sdk.errors import InvalidValueError
from client_sdk.values import check_type

Pem = bytes | str | PathLike[str]
"""PEM data itself, or the path of a file of it."""

_BEGIN = b"-----BEGIN "


def read(value: Pem, field: str) -> bytes:
    """The data, wherever it is.

    Args:
        value: Data, or a path.
        field: Where the value was set, for the message.

    Raises:
        InvalidValueError: Its file cannot be read, or it is neither data nor a path.
    """
    check_type(value, (bytes, str, PathLike), "PEM data or the path of a PEM file", field)
    if isinstance(value, bytes):
        return value
    if isinstance(value, str) and value.lstrip().startswith(_BEGIN.decode()):
        return value.encode()  # no path looks so, and an error must not show a key
    try:
        return Path(value).read_bytes()
    except OSError as error:
        raise InvalidValueError(f"cannot read {str(value)!r}: {error.strerror}", field) from error


def check_authority(value: Pem, field: str) -> None:
    """Refuse what holds no certificate to trust.

    Raises:
        InvalidValueError: It cannot be read, or is something else.
    """
    try:
        trust(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), read(value, field))
    except (ssl.SSLError, ValueError) as error:
        if isinstance(error, InvalidValueError):
            raise
        raise InvalidValueError(_not_pem(value, "CERTIFICATE"), field) from error


def check_chain(certificate: Pem, key: Pem, field: str) -> None:
    """Refuse a certificate and a key that do not belong together.

    Args:
        certificate: The chain, the certificate itself first.
        key: Its private key, without a password.
        field: Of the two together, for the message.

    Raises:
        InvalidValueError: One of them cannot be read or is something else, or they do not match.
    """
    chain = read(certificate, f"{field}.certificate")
    private = read(key, f"{field}.key")
    if _BEGIN + b"CERTIFICATE" not in chain:
        raise InvalidValueError(_not_pem(certificate, "CERTIFICATE"), f"{field}.certificate")
    if b"PRIVATE KEY-----" not in private:
        raise InvalidValueError(_not_pem(key, "PRIVATE KEY"), f"{field}.key")
    if b"ENCRYPTED" in private:
        raise InvalidValueError(
            f"{_name(key)} is protected by a password; write it without: "
            "openssl pkey -in KEY -out PLAIN_KEY",
            f"{field}.key",
        )
    try:
        load_chain(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), chain, private)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise InvalidValueError(
                f"{_name(key)} is not the key of {_name(certificate)}: they were not made together",
                f"{field}.key",
            ) from error
        raise InvalidValueError(
            f"cannot use {_name(certificate)} with {_name(key)}: {error.reason or 'damaged PEM'}",
            field,
        ) from error


def trust(context: ssl.SSLContext, roots: bytes) -> None:
    """Let a context accept what these authorities signed."""
    context.load_verify_locations(cadata=roots.decode("ascii"))


def load_chain(context: ssl.SSLContext, certificate: bytes, key: bytes) -> None:
    """Let a context show that certificate."""
    # The ssl module reads certificates from files only; this directory is for us alone.
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "chain.pem"
        path.write_bytes(key + b"\n" + certificate)
        # An empty password: it never asks on the terminal.
        context.load_cert_chain(path, password="")


def _name(value: Pem) -> str:
    """How a message calls it: data is never shown."""
    if isinstance(value, bytes) or str(value).lstrip().startswith(_BEGIN.decode()):
        return "the given data"
    return repr(str(value))


def _not_pem(value: Pem, kind: str) -> str:
    return f"expected a {kind} in PEM form, which {_name(value)} is not"
