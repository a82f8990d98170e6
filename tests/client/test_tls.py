"""TLS as clients meet it, of policies and of environments: certificates that fit, and those that
do not, in every way."""

import contextlib
import math
import subprocess
import sys

import pytest

from client_sdk import RemoteEnv, Timeouts, TlsConfig
from client_sdk.errors import TlsError, UnauthenticatedError
from policy_server import ServerTls
from tests.authority import EXPIRED, NOT_YET, Authority
from tests.client.support import KINDS, connected, seen
from tests.servers import serving
from tests.stepping.support import hosting

BRIEF = Timeouts(connect_s=2.0, close_s=0.5)


@pytest.fixture(params=[*KINDS, "env"])
def kind(request):
    """Both clients of a policy server, and an environment that a host runs."""
    return request.param


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path)


@pytest.fixture
def stranger(tmp_path):
    """Another authority, which signs for the same names."""
    (tmp_path / "stranger").mkdir()
    return Authority(tmp_path / "stranger")


@contextlib.contextmanager
def listening(kind, *certificate, token=None):
    """A server, or a host, under that certificate (or in plain text); its port."""
    tls = ServerTls(*certificate) if certificate else None
    server = hosting if kind == "env" else serving
    with server(tls=tls, token=token) as under_test:
        yield under_test.address.rpartition(":")[2]


def connect(kind, address, **settings):
    """Connect, have something done, and close again."""
    if kind == "env":
        settings["connect_timeout"] = settings.pop("timeouts", Timeouts()).connect_s
        with RemoteEnv(address, **settings) as env:
            assert env.reset(seed=1)[0].shape == (4,)
        return
    with connected(kind, address, **settings) as client:
        assert client.get_action(client.start_episode(), seen(0)) == 0


def test_a_trusted_certificate_opens_an_encrypted_session(kind, authority):
    tls = TlsConfig(root_certificates=authority.file)
    with listening(kind, *authority.issue("localhost"), token="word") as port:
        for host in ("localhost", "127.0.0.1"):
            connect(kind, f"{host}:{port}", tls=tls, token="word")


def test_a_certificate_of_an_unknown_authority_is_refused(kind, authority, stranger):
    with (
        listening(kind, *authority.issue("localhost")) as port,
        pytest.raises(TlsError, match=r"refused: unable to get local issuer.*--tls-ca, must hold"),
    ):
        # Not even the default patience makes it wait: such a server will not change its mind.
        connect(kind, f"localhost:{port}", tls=TlsConfig(stranger.file))


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_a_certificate_for_another_host_is_refused(kind, authority, host):
    with (
        listening(kind, *authority.issue("trainer.example", ip=None)) as port,
        pytest.raises(TlsError, match=rf"not valid for '{host}'.*name that it was issued for"),
    ):
        connect(kind, f"{host}:{port}", tls=TlsConfig(authority.file), timeouts=BRIEF)


@pytest.mark.parametrize(
    ("days", "says"),
    [
        (EXPIRED, "certificate has expired.*policy-client certs"),
        (NOT_YET, "not yet valid.*clock of this machine"),
    ],
)
def test_a_certificate_of_another_time_is_refused(kind, authority, days, says):
    with (
        listening(kind, *authority.issue("localhost", days=days)) as port,
        pytest.raises(TlsError, match=says),
    ):
        connect(kind, f"localhost:{port}", tls=TlsConfig(authority.file), timeouts=BRIEF)


def test_a_plaintext_client_is_told_that_the_server_speaks_tls(kind, authority):
    with (
        listening(kind, *authority.issue("localhost")) as port,
        pytest.raises(TlsError, match=r"speaks TLS and this client does not.*--tls-ca"),
    ):
        # Nor does this one change its mind.
        connect(kind, f"localhost:{port}", timeouts=Timeouts(connect_s=math.inf))


def test_a_tls_client_is_told_that_the_server_speaks_plaintext(kind, authority):
    with (
        listening(kind) as port,
        pytest.raises(TlsError, match=r"does not speak TLS.*connect without tls="),
    ):
        connect(kind, f"127.0.0.1:{port}", tls=TlsConfig(authority.file), timeouts=BRIEF)


def test_a_wrong_token_is_refused_at_once_inside_tls(kind, authority):
    with listening(kind, *authority.issue("localhost"), token="word") as port:
        for token, says in ((None, "asks for a token"), ("another", "wrong token")):
            with pytest.raises(UnauthenticatedError, match=rf"{says}: .*token=, by --token-file"):
                connect(kind, f"localhost:{port}", tls=TlsConfig(authority.file), token=token)


def test_a_client_certificate_opens_a_server_that_asks_for_one(kind, authority):
    with listening(kind, *authority.issue("localhost"), authority.file) as port:
        tls = TlsConfig(authority.file, *authority.issue("simulator", ip=None))
        connect(kind, f"localhost:{port}", tls=tls)


def test_a_missing_client_certificate_is_asked_for(kind, authority):
    with (
        listening(kind, *authority.issue("localhost"), authority.file) as port,
        pytest.raises(TlsError, match=r"asks for a client certificate.*--tls-cert and --tls-key"),
    ):
        connect(kind, f"localhost:{port}", tls=TlsConfig(authority.file), timeouts=BRIEF)


def test_a_client_certificate_that_the_server_does_not_believe_is_told_so(
    kind, authority, stranger
):
    with listening(kind, *authority.issue("localhost"), authority.file) as port:
        for issuer, days in ((stranger, (-1, 1)), (authority, EXPIRED)):
            tls = TlsConfig(authority.file, *issuer.issue("simulator", ip=None, days=days))
            with pytest.raises(TlsError, match=r"this client certificate.*--tls-client-ca"):
                connect(kind, f"localhost:{port}", tls=tls, timeouts=BRIEF)


RESTARTS = 100
RESTARTING = f"""
import socket, ssl, sys
from client_sdk.env_server import EnvServer, EnvServerConfig
from policy_server import ServerTls

config = EnvServerConfig(port=0, tls=ServerTls(*sys.argv[1:3]))
probe = ssl.create_default_context(cafile=sys.argv[3])
probe.set_alpn_protocols(["h2"])
for _ in range({RESTARTS}):
    with EnvServer("CartPole-v1", config) as host:
        port = int(host.address.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            probe.wrap_socket(connection, server_hostname="localhost").close()
print("stopped every time")
"""


def test_a_host_may_stop_while_a_probe_hangs_up(authority):
    """In a process of its own: with some releases of gRPC (1.78) that ends in a segmentation fault."""
    ran = subprocess.run(
        [sys.executable, "-c", RESTARTING, *authority.issue("localhost"), authority.file],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ran.returncode, ran.stdout) == (0, "stopped every time\n"), ran.stderr
