"""Servers and clients for these tests."""

import pytest

from tests.client.support import KINDS, ScriptedServer, connected
from tests.servers import serving


@pytest.fixture(params=KINDS)
def kind(request):
    """Which client: the contract is the same for both."""
    return request.param


@pytest.fixture
def server():
    """The real server, serving right away."""
    with serving(need_logp=False) as under_test:
        yield under_test


@pytest.fixture
def scripted():
    """A server in the test's hands."""
    with ScriptedServer() as server:
        yield server


@pytest.fixture
def client(kind, server):
    """A client of the real server."""
    with connected(kind, server.address) as client:
        yield client
