"""Any exception to the fault that a client is told.

Our own refusals are ``Fault``s. Anything else is a bug: the client gets INTERNAL and an incident
id, the log gets the id and the traceback. Loop thread only.
"""

from __future__ import annotations

import logging
import secrets

from client_sdk.wire.faults import Fault, Reason

logger = logging.getLogger(__name__)


class Incidents:
    """Unexpected errors of this process.

    Attributes:
        count: How many there were.
    """

    def __init__(self) -> None:
        self.count = 0

    def record(self, what: str, error: BaseException) -> Fault:
        """Log an error under an id, and return the fault that names only the id."""
        self.count += 1
        incident_id = secrets.token_hex(4)
        logger.error("incident %s: %s", incident_id, what, exc_info=error)
        return Fault(Reason.INTERNAL, f"internal error; the server's log knows it as {incident_id}")


incidents = Incidents()


def as_fault(error: Exception, what: str) -> Fault:
    """The fault to tell a client of an exception."""
    return error if isinstance(error, Fault) else incidents.record(what, error)
