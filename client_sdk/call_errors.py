"""What a call that failed is raised as: the server's refusal, or a connection that is gone.

gRPC's statuses and the contract's ``ErrorDetail`` on one side, ``errors`` on the other. Pure.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from client_sdk.errors import (
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

_DISTRUST = (
    "CERTIFICATE_VERIFY_FAILED",
    "Hostname Verification Check failed",
    "WRONG_VERSION_NUMBER",  # plaintext where TLS was expected
)

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


def error_of_call(error: Any) -> PolicyClientError | Disconnected:
    """What gRPC's exception says; it is a call as well."""
    return error_of_status(error.code(), error.details(), error.trailing_metadata())


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
            f"whatever answers there does not offer this service ({text.rstrip('!')}). Check host and "
            "port: a policy server and a host of environments are not the same"
        )
    return ServerError(f"{code.name}: {text}")


def error_of_stream(
    error: PolicyClientError | Disconnected,
) -> PolicyClientError | Disconnected:
    """Likewise, where the server's "not now" or "who are you" calls for another connection."""
    if isinstance(error, UnavailableError | UnknownSessionError):
        return Disconnected(str(error))
    return error
