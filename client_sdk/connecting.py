"""How the blocking client finds its server: redirects followed, attempts repeated, failures explained.

Both inference modes connect this way. One thread at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from client_sdk.attempts import MAX_REDIRECTS, Attempts
from client_sdk.call_errors import Disconnected
from client_sdk.config import Address
from client_sdk.diagnosis import diagnose
from client_sdk.endpoint import Endpoint
from client_sdk.errors import ConnectError, PolicyClientError, TlsError
from client_sdk.log import logger
from client_sdk.transport import Connection
from client_sdk.wire import policyserver_pb2 as pb


def open_session(
    endpoint: Endpoint, hello: pb.OpenSessionRequest, timeout_s: float
) -> tuple[Connection, Address, pb.OpenSessionResponse]:
    """One attempt.

    Returns:
        The connection, where it leads, and what the server there says.

    Raises:
        PolicyClientError: It was refused.
        Disconnected: It did not get there, or back.
    """
    target = endpoint.address
    for _ in range(MAX_REDIRECTS + 1):
        connection = Connection(endpoint, target)
        try:
            response = connection.open_session(hello, timeout_s)
        except BaseException:
            connection.close()
            raise
        if not response.redirect_address:
            return connection, target, response
        connection.close()
        target = Address.parse(response.redirect_address)
    raise ConnectError(f"{endpoint.address} sends us on more than {MAX_REDIRECTS} times")


def keep_trying(
    endpoint: Endpoint,
    attempts: Attempts,
    attempt: Callable[[float], None],
    pause: Callable[[float], None],
) -> None:
    """Repeat an attempt until it succeeds.

    Args:
        endpoint: For the diagnosis.
        attempts: When to try again.
        attempt: Given a timeout.
        pause: Waits; raises to end it all.

    Raises:
        ConnectError: There was no time for another attempt; its subclass says what is wrong.
        PolicyClientError: The server refuses this client.
    """
    while True:
        pause(0.0)
        try:
            attempt(attempts.timeout_s(time.monotonic()))
            return
        except (Disconnected, PolicyClientError) as error:
            failure = error
        now = time.monotonic()
        delay_s = attempts.delay_s(now, failure)
        if delay_s is None:
            raise verdict(endpoint, attempts, failure, now)
        report(endpoint, attempts, failure, now)
        pause(delay_s)


def report(
    endpoint: Endpoint, attempts: Attempts, failure: PolicyClientError | Disconnected, now: float
) -> None:
    """Tell, once and not at once, that this takes long; and look whether it is in vain. Blocking.

    Raises:
        TlsError: The server speaks TLS and this client does not. gRPC cannot tell that from a
            server that is not up yet.
    """
    news = attempts.news(now)
    if news is None:
        return
    logger.info("%s %s", endpoint.address, news)
    if endpoint.tls is None and isinstance(
        found := verdict(endpoint, attempts, failure, now), TlsError
    ):
        raise found


def verdict(
    endpoint: Endpoint, attempts: Attempts, failure: PolicyClientError | Disconnected, now: float
) -> PolicyClientError:
    """What to raise where the last attempt failed like that; looks for the reason. Blocking."""
    if isinstance(failure, PolicyClientError):
        return failure
    diagnosis = diagnose(endpoint, attempts.waited_s(now), failure.why, attempts.diagnosis_s)
    return attempts.verdict(diagnosis)
