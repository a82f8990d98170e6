"""Tokens and certificates as commands and servers take them: options, files, environment.

Every command has the same options for the same things. Main thread only.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import grpc

from client_sdk import pem
from client_sdk.config import ServerTls, TlsConfig, is_token
from client_sdk.errors import InvalidValueError
from client_sdk.wire.faults import Fault, Reason

TOKEN_VARIABLE = "POLICY_SERVER_TOKEN"  # noqa: S105 - its name, not its value
"""Environment variable with the bearer token, where no --token-file is given."""


def add_client_options(parser: argparse.ArgumentParser) -> None:
    """What a command that connects takes; ``client_tls`` and ``token`` read it."""
    group = parser.add_argument_group("whom it trusts, and how it proves who it is")
    _add_token(group)
    group.add_argument("--tls", action="store_true", help="encrypt, with the usual authorities")
    group.add_argument(
        "--tls-ca",
        metavar="PEM",
        type=_file,
        help="encrypt; the authority that signed the server's certificate",
    )
    group.add_argument(
        "--tls-cert", metavar="PEM", type=_file, help="certificate to show, for mTLS"
    )
    group.add_argument("--tls-key", metavar="PEM", type=_file, help="its private key")
    group.add_argument(
        "--insecure",
        action="store_true",
        help="send the token without TLS to another machine all the same",
    )


def add_server_options(group: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """What a command that listens takes; ``server_tls`` and ``token`` read it."""
    _add_token(group)
    group.add_argument("--tls-cert", metavar="PEM", type=_file, help="certificate")
    group.add_argument("--tls-key", metavar="PEM", type=_file, help="its private key")
    group.add_argument(
        "--tls-client-ca",
        metavar="PEM",
        type=_file,
        help="clients must show a certificate signed by this authority (mTLS)",
    )
    group.add_argument(
        "--insecure",
        action="store_true",
        default=None,
        help="listen beyond this machine without TLS and token all the same",
    )


def token(options: argparse.Namespace) -> str | None:
    """The bearer token, from its file or from the environment; None: there is none.

    Raises:
        InvalidValueError: What is there is no token. It is not shown.
    """
    if options.token_file is not None:
        text = (
            pem.read(options.token_file, "argument --token-file").decode(errors="replace").strip()
        )
        where = options.token_file
    else:
        text, where = os.environ.get(TOKEN_VARIABLE, "").strip(), TOKEN_VARIABLE
        if not text:
            return None
    if not is_token(text):
        raise InvalidValueError(
            f"expected one word of visible ASCII characters as token in {where}"
            + (", which is empty" if not text else ""),
            field="argument --token-file",
        )
    return text


def client_tls(options: argparse.Namespace) -> TlsConfig | None:
    """How to encrypt; None: plaintext.

    Raises:
        InvalidValueError: The files do not belong together.
    """
    _both_halves(options)
    if not (options.tls or options.tls_ca or options.tls_cert):
        return None
    return TlsConfig(options.tls_ca, options.tls_cert, options.tls_key)


def server_tls(options: argparse.Namespace) -> ServerTls | None:
    """What to listen with; None: plaintext.

    Raises:
        InvalidValueError: The files do not belong together.
    """
    _both_halves(options)
    if options.tls_cert is None:
        if options.tls_client_ca is not None:
            raise InvalidValueError("needs --tls-cert and --tls-key", "argument --tls-client-ca")
        return None
    tls = ServerTls(options.tls_cert, options.tls_key, options.tls_client_ca)
    tls.check()
    return tls


def server_credentials(tls: ServerTls) -> grpc.ServerCredentials:
    """What gRPC listens with.

    Raises:
        InvalidValueError: The files cannot be read, or do not belong together.
    """
    tls.check()  # gRPC would only say that it cannot listen
    chain = (pem.read(tls.key, "ServerTls.key"), pem.read(tls.certificate, "ServerTls.certificate"))
    roots = None if tls.client_ca is None else pem.read(tls.client_ca, "ServerTls.client_ca")
    return grpc.ssl_server_credentials(
        [chain], root_certificates=roots, require_client_auth=roots is not None
    )


def _add_token(group: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    # No option for the token itself: it would show in the list of processes.
    group.add_argument(
        "--token-file",
        metavar="FILE",
        type=lambda text: Path(_file(text)),
        help=f"holds the bearer token; without it the environment variable {TOKEN_VARIABLE} does",
    )


def _both_halves(options: argparse.Namespace) -> None:
    if (options.tls_cert is None) != (options.tls_key is None):
        raise InvalidValueError("one needs the other", "arguments --tls-cert and --tls-key")


def _file(text: str) -> str:
    """A file that can be read, as argparse checks it."""
    try:
        Path(text).open("rb").close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot read {text}: {error.strerror}") from None
    return text


def token_fault(server: str, *, present: bool) -> Fault:
    """What a server answers to a call without its token.

    Args:
        server: What it calls itself.
        present: Whether the call carried another one.
    """
    said = "wrong token" if present else f"this {server} asks for a token"
    return Fault(
        Reason.UNAUTHENTICATED,
        f"{said}: pass the one that the {server} was started with, as token=, by --token-file or "
        f"in {TOKEN_VARIABLE}. On the wire it is `authorization: Bearer TOKEN`",
    )
