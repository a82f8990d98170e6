"""The one fault type behind every refusal, and its two wire forms.

A fault is raised by whoever notices it, on either side of the wire. It travels as an
``ErrorDetail``: in band for one row, or in the trailer of a failed call. Thread-free.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import grpc

from client_sdk.wire import policyserver_pb2 as pb

ERROR_TRAILER = "policyserver-error-bin"
"""Metadata key of the trailer that carries a serialized ``ErrorDetail``."""


class Reason(IntEnum):
    """Why a request or a row was refused: ``ErrorReason`` of the contract."""

    UNSPECIFIED = 0
    MALFORMED_TENSOR = 1
    SPACE_MISMATCH = 2
    NOT_FINITE = 3
    UNKNOWN_SESSION = 4
    UNKNOWN_EPISODE = 5
    UNKNOWN_POLICY = 6
    UNKNOWN_AGENT = 7
    EPISODE_ENDED = 8
    STEP_OUT_OF_ORDER = 9
    STALE_POLICY = 10
    POLICY_MISMATCH = 11
    WRONG_MODE = 12
    LIMIT_EXCEEDED = 13
    NOT_READY = 14
    DRAINING = 15
    INCOMPATIBLE_PROTOCOL = 16
    LOGP_REQUIRED = 17
    NO_LOCAL_INFERENCE = 18
    UNAUTHENTICATED = 19
    UNKNOWN_ENVIRONMENT = 20
    ENVIRONMENT_FAILED = 21
    INTERNAL = 22


_CODES = grpc.StatusCode

STATUS_OF_REASON: dict[Reason, grpc.StatusCode] = {
    Reason.UNSPECIFIED: _CODES.UNKNOWN,
    Reason.MALFORMED_TENSOR: _CODES.INVALID_ARGUMENT,
    Reason.SPACE_MISMATCH: _CODES.INVALID_ARGUMENT,
    Reason.NOT_FINITE: _CODES.INVALID_ARGUMENT,
    Reason.UNKNOWN_SESSION: _CODES.NOT_FOUND,
    Reason.UNKNOWN_EPISODE: _CODES.NOT_FOUND,
    Reason.UNKNOWN_POLICY: _CODES.NOT_FOUND,
    Reason.UNKNOWN_AGENT: _CODES.INVALID_ARGUMENT,
    Reason.EPISODE_ENDED: _CODES.FAILED_PRECONDITION,
    Reason.STEP_OUT_OF_ORDER: _CODES.FAILED_PRECONDITION,
    Reason.STALE_POLICY: _CODES.FAILED_PRECONDITION,
    Reason.POLICY_MISMATCH: _CODES.INVALID_ARGUMENT,
    Reason.WRONG_MODE: _CODES.FAILED_PRECONDITION,
    Reason.LIMIT_EXCEEDED: _CODES.RESOURCE_EXHAUSTED,
    Reason.NOT_READY: _CODES.UNAVAILABLE,
    Reason.DRAINING: _CODES.UNAVAILABLE,
    Reason.INCOMPATIBLE_PROTOCOL: _CODES.FAILED_PRECONDITION,
    Reason.LOGP_REQUIRED: _CODES.FAILED_PRECONDITION,
    Reason.NO_LOCAL_INFERENCE: _CODES.FAILED_PRECONDITION,
    Reason.UNAUTHENTICATED: _CODES.UNAUTHENTICATED,
    Reason.UNKNOWN_ENVIRONMENT: _CODES.NOT_FOUND,
    Reason.ENVIRONMENT_FAILED: _CODES.ABORTED,
    Reason.INTERNAL: _CODES.INTERNAL,
}
"""What a generic gRPC client may conclude from each reason."""


class Fault(Exception):
    """A refusal: which fault, where, and what was expected, what came, and the cure.

    Attributes:
        reason: Which fault.
        message: One or two sentences for a person.
        field: Path into the request, such as ``groups[0].observations["camera"]``; may be empty.
        retry_after_s: How long to wait before asking again, if that may help.
    """

    def __init__(
        self,
        reason: Reason,
        message: str,
        field: str = "",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(reason, message, field, retry_after_s)
        self.reason = reason
        self.message = message
        self.field = field
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"{self.field}: {self.message}" if self.field else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.reason, self.message, self.field, self.retry_after_s))

    @property
    def status(self) -> grpc.StatusCode:
        """The gRPC status of a call that fails with this."""
        return STATUS_OF_REASON[self.reason]

    def to_detail(self) -> pb.ErrorDetail:
        """The wire form."""
        detail = pb.ErrorDetail(
            reason=int(self.reason),  # type: ignore[arg-type]
            field=self.field,
            message=self.message,
            status_code=self.status.value[0],
        )
        if self.retry_after_s is not None:
            detail.retry_after.FromMicroseconds(int(self.retry_after_s * 1e6))
        return detail

    @classmethod
    def from_detail(cls, detail: pb.ErrorDetail) -> Fault:
        """The fault that a peer sent; an unknown reason of a newer peer becomes UNSPECIFIED."""
        try:
            reason = Reason(detail.reason)
        except ValueError:
            reason = Reason.UNSPECIFIED
        retry_after_s = None
        if detail.HasField("retry_after"):
            retry_after_s = detail.retry_after.ToMicroseconds() / 1e6
        return cls(reason, detail.message, detail.field, retry_after_s)
