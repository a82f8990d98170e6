"""What a host of environments makes of requests that are none, and of errors. Any thread."""

from __future__ import annotations

import logging
import secrets
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from client_sdk.wire.faults import Fault, Reason

logger = logging.getLogger(__name__)

_MessageT = TypeVar("_MessageT", bound=Message)


def parse(kind: type[_MessageT], data: bytes) -> _MessageT:
    """The message in these bytes.

    Raises:
        Fault: MALFORMED_TENSOR; there is none.
    """
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise Fault(
            Reason.MALFORMED_TENSOR, f"these {len(data)} bytes are no {kind.__name__}: {error}"
        ) from error


def as_fault(error: Exception, what: str) -> Fault:
    """What a client is told; an error that is no fault is logged, and told by its incident id."""
    if isinstance(error, Fault):
        return error
    incident_id = secrets.token_hex(4)
    logger.error("incident %s: %s", incident_id, what, exc_info=error)
    return Fault(Reason.INTERNAL, f"internal error; the host's log knows it as {incident_id}")
