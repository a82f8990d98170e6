"""Faults that more than one part of the server raises, in the same words. Loop thread only."""

from __future__ import annotations

from client_sdk.wire.faults import Fault, Reason
from policy_server.experience import POLICY_ID


def draining() -> Fault:
    """The server is stopping."""
    return Fault(Reason.DRAINING, "the server is stopping; connect again later", retry_after_s=1.0)


def unknown_agent(agent: str, field: str) -> Fault:
    """It is not the only one that there is."""
    return Fault(
        Reason.UNKNOWN_AGENT, f'unknown agent {agent!r:.80}; this server knows one agent, ""', field
    )


def check_policy_id(policy_id: str, field: str) -> None:
    """Refuse another policy than the only one; where none is named, that one is meant."""
    if policy_id not in ("", POLICY_ID):
        raise Fault(
            Reason.UNKNOWN_POLICY,
            f'no policy {policy_id!r:.80}; this server knows one, "{POLICY_ID}"',
            field,
        )


def logp_required(field: str) -> Fault:
    """Logged actions came without their log-densities."""
    return Fault(
        Reason.LOGP_REQUIRED,
        "this algorithm corrects for how likely the behaviour's actions were: "
        "log_action needs logp=, the log-density of the action as given here",
        field,
    )
