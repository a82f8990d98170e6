"""Everything that the client raises, in one tree. All of it pickles.

::

    PolicyClientError
    |-- UsageError                      the program is wrong; repeating the call will not help
    |   |-- InvalidValueError           (ValueError) a value that cannot be sent; nothing was recorded
    |   |   |-- MalformedTensorError
    |   |   |-- SpaceMismatchError      wrong shape, dtype, keys or range; or other spaces altogether
    |   |   |-- NotFiniteError
    |   |   |-- UnknownAgentError
    |   |   `-- PolicyMismatchError
    |   |-- EpisodeStateError           the episode is not in a state for that call
    |   |   |-- EpisodeEndedError
    |   |   |-- UnknownEpisodeError
    |   |   `-- StepOutOfOrderError
    |   |-- WrongModeError
    |   |   `-- NoLocalInferenceError
    |   |-- LogpRequiredError
    |   |-- UnknownPolicyError
    |   |-- UnknownEnvironmentError
    |   |-- ConcurrentUseError          two threads, or two calls for one episode, at a time
    |   |-- ForkedClientError           made before os.fork(), used in the child
    |   |-- ClosedClientError
    |   `-- NotConnectedError           an AsyncPolicyClient asked before it connected
    |-- ServiceError                    the world is wrong; the same program may work later
    |   |-- ConnectError                (ConnectionError) no server answers there
    |   |   |-- ConnectRefused          the machine answers, nobody listens on that port
    |   |   |-- NameNotResolved         no machine has that name
    |   |   |-- ConnectTimeout          nothing answers: a firewall, a wrong address
    |   |   `-- TlsError                it answers, but not with a TLS that both accept
    |   |-- PolicyTimeout               (TimeoutError) no answer in time; calling again is safe
    |   |-- UnavailableError            it answers: not now
    |   |   |-- NotReadyError
    |   |   `-- DrainingError
    |   |-- LimitExceededError
    |   |-- UnauthenticatedError
    |   |-- IncompatibleProtocolError
    |   |-- UnknownSessionError
    |   |-- StalePolicyError
    |   |-- EnvironmentFailedError      the hosted environment raised; it has been closed
    |   |-- EnvironmentLostError        its host is gone, and the episode with it
    |   `-- ServerError                 a fault that this release has no name for
    |       `-- InternalServerError     the server's own bug, with an incident number
    `-- BatchError                      some rows of a vector step, each with an error of its own
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from client_sdk.wire.faults import Fault, Reason


class PolicyClientError(Exception):
    """Base of everything that the client raises on purpose.

    Attributes:
        reason: The server's or the codec's reason; None where the client itself noticed.
        message: What was expected, what came, and the cure.
        field: Where, such as ``observation["camera"]``; may be empty.
        retry_after_s: When the server would like to be asked again, if it said so.
    """

    reason: ClassVar[Reason | None] = None

    def __init__(self, message: str, field: str = "", retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"{self.field}: {self.message}" if self.field else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.message, self.field, self.retry_after_s))


class UsageError(PolicyClientError):
    """A bug of the calling program: repeating the same call will not help."""


class ServiceError(PolicyClientError):
    """A fault of the world: the same program may work another time."""


class InvalidValueError(UsageError, ValueError):
    """A value that cannot be sent. Nothing was recorded; the episode goes on as before."""


class MalformedTensorError(InvalidValueError):
    """A tensor whose bytes do not fit its shape and dtype."""

    reason = Reason.MALFORMED_TENSOR


class SpaceMismatchError(InvalidValueError):
    """A value outside its space, or a client that expects other spaces than the server's."""

    reason = Reason.SPACE_MISMATCH


class NotFiniteError(InvalidValueError):
    """NaN or infinity in an observation, a reward, a metric or an action."""

    reason = Reason.NOT_FINITE


class UnknownAgentError(InvalidValueError):
    """An agent that the server does not know; the message names those that it does."""

    reason = Reason.UNKNOWN_AGENT


class PolicyMismatchError(InvalidValueError):
    """Actions or logps that the named policy does not give."""

    reason = Reason.POLICY_MISMATCH


class EpisodeStateError(UsageError):
    """The episode is not in a state in which that call makes sense."""


class EpisodeEndedError(EpisodeStateError):
    """The episode has already ended; start another one."""

    reason = Reason.EPISODE_ENDED


class UnknownEpisodeError(EpisodeStateError):
    """No such episode: never started, or ended and forgotten."""

    reason = Reason.UNKNOWN_EPISODE


class StepOutOfOrderError(EpisodeStateError):
    """The server expected another step of that episode."""

    reason = Reason.STEP_OUT_OF_ORDER


class WrongModeError(UsageError):
    """That call does not belong to the session's inference mode."""

    reason = Reason.WRONG_MODE


class NoLocalInferenceError(WrongModeError):
    """This policy cannot leave the server; ``inference_mode="remote"`` works."""

    reason = Reason.NO_LOCAL_INFERENCE


class LogpRequiredError(UsageError):
    """The algorithm learns from logged actions only with their log-density: pass ``logp=``."""

    reason = Reason.LOGP_REQUIRED


class UnknownPolicyError(UsageError):
    """The server has no policy of that name."""

    reason = Reason.UNKNOWN_POLICY


class UnknownEnvironmentError(UsageError):
    """The host has no environment of that name."""

    reason = Reason.UNKNOWN_ENVIRONMENT


class ConcurrentUseError(UsageError):
    """Another thread or task is inside that client or episode: use one of each per thread."""


class ForkedClientError(UsageError):
    """This process is a fork of the one that made the client: make a new client here."""


class ClosedClientError(UsageError):
    """The client is closed."""


class NotConnectedError(UsageError):
    """Nothing is known of the server yet: ``await client.connect()`` first."""


class ConnectError(ServiceError, ConnectionError):
    """No policy server answers at that address."""


class ConnectRefused(ConnectError):
    """The machine answers, but nobody listens on that port."""


class NameNotResolved(ConnectError):
    """No machine has that name."""


class ConnectTimeout(ConnectError):
    """Nothing answers: usually a firewall that drops packets, or a wrong address."""


class TlsError(ConnectError):
    """Something answers, but not with a TLS that both sides accept."""


class PolicyTimeout(ServiceError, TimeoutError):
    """No answer within ``Timeouts.action_s``. Calling again is safe: the same step is asked again."""


class UnavailableError(ServiceError):
    """The server answers: not now."""


class NotReadyError(UnavailableError):
    """No policy yet, or actions are held back while it learns."""

    reason = Reason.NOT_READY


class DrainingError(UnavailableError):
    """The server is stopping."""

    reason = Reason.DRAINING


class LimitExceededError(ServiceError):
    """One of the server's limits; the message names it and the setting that changes it."""

    reason = Reason.LIMIT_EXCEEDED


class UnauthenticatedError(ServiceError):
    """The token is missing or wrong. Never retried."""

    reason = Reason.UNAUTHENTICATED


class IncompatibleProtocolError(ServiceError):
    """Client and server speak different major versions of the protocol."""

    reason = Reason.INCOMPATIBLE_PROTOCOL


class UnknownSessionError(ServiceError):
    """The session's lease is over or its server has restarted."""

    reason = Reason.UNKNOWN_SESSION


class StalePolicyError(ServiceError):
    """The experience comes from a policy too old to learn from."""

    reason = Reason.STALE_POLICY


class EnvironmentFailedError(ServiceError):
    """The hosted environment raised and has been closed."""

    reason = Reason.ENVIRONMENT_FAILED


class EnvironmentLostError(ServiceError):
    """The host of a remote environment is gone, or silent for too long, in the middle of an episode.

    That episode is lost; ``reset()`` begins the next one, there or on the host's successor.
    """


class ServerError(ServiceError):
    """A refusal that this release of the client has no class for."""

    reason = Reason.UNSPECIFIED


class InternalServerError(ServerError):
    """A bug of the server; its log has the details under the incident number in the message."""

    reason = Reason.INTERNAL


class BatchError(PolicyClientError):
    """Some rows of a vector step failed; their neighbours did not.

    Attributes:
        rows: The error of each row that failed.
        actions: None: the client noticed before anything was sent, nothing was recorded, and the
            step can be repeated with better values or after ``abandon(rows)``. Otherwise what the
            server answered to all the others, like the return value of ``act``; the failed rows'
            episodes are given up, and their next observations begin new ones.
    """

    def __init__(self, rows: Mapping[int, PolicyClientError], actions: Any = None) -> None:
        first, *others = sorted(rows)
        more = f" (and {len(others)} more: rows {_listed(others)})" if others else ""
        super().__init__(f"row {first}: {rows[first]}{more}")
        self.rows = dict(rows)
        self.actions = actions

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.rows, self.actions))


def _listed(rows: list[int], at_most: int = 8) -> str:
    text = ", ".join(str(row) for row in rows[:at_most])
    return text + ", ..." if len(rows) > at_most else text


def _subclasses(base: type[PolicyClientError]) -> list[type[PolicyClientError]]:
    return [base, *(each for child in base.__subclasses__() for each in _subclasses(child))]


ERROR_OF_REASON: dict[Reason, type[PolicyClientError]] = {
    error.reason: error for error in _subclasses(PolicyClientError) if error.reason is not None
}
"""The class that each reason is raised as."""


def error_from_fault(fault: Fault) -> PolicyClientError:
    """The exception for a refusal, whoever noticed it: the server or the codec on this side."""
    error = ERROR_OF_REASON.get(fault.reason, ServerError)
    return error(fault.message, fault.field, fault.retry_after_s)
