"""The contract and this client have the same vocabulary."""

import re

import pytest

from client_sdk import (
    AsyncEpisode,
    AsyncEpisodeBatch,
    AsyncPolicyClient,
    Episode,
    EpisodeBatch,
    PolicyClient,
)
from client_sdk.aio_transport import AioConnection
from client_sdk.env_connection import EnvConnection
from client_sdk.errors import ERROR_OF_REASON
from client_sdk.transport import Connection
from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.faults import Reason

CONNECTIONS = {"PolicyService": [Connection, AioConnection], "EnvService": [EnvConnection]}
RPCS = [
    (connection, method.name)
    for name, service in pb.DESCRIPTOR.services_by_name.items()
    for connection in CONNECTIONS[name]
    for method in service.methods
]


def snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


@pytest.mark.parametrize(("connection", "rpc"), RPCS)
def test_every_rpc_has_a_client_method(connection, rpc):
    assert callable(getattr(connection, snake(rpc)))


@pytest.mark.parametrize("name", [name for name in pb.ErrorReason.keys()])  # noqa: C416, SIM118
def test_every_error_reason_of_the_contract_has_an_exception_class(name):
    reason = Reason(pb.ErrorReason.Value(name))
    assert name == f"ERROR_REASON_{reason.name}"
    assert ERROR_OF_REASON[reason].reason is reason


@pytest.mark.parametrize(
    ("blocking", "asynchronous"),
    [
        (PolicyClient, AsyncPolicyClient),
        (Episode, AsyncEpisode),
        (EpisodeBatch, AsyncEpisodeBatch),
    ],
)
def test_both_clients_have_the_same_verbs(blocking, asynchronous):
    def verbs(kind):
        return {name for name in dir(kind) if not name.startswith("_")}

    assert verbs(asynchronous) - {"connect"} == verbs(blocking)
