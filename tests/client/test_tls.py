"""TLS as the client meets it: certificates that fit, and every way in which they do not."""

import contextlib

import pytest

from client_sdk import Timeouts, TlsConfig
from client_sdk.errors import TlsError, UnauthenticatedError
from policy_server import ServerTls
from tests.authority import EXPIRED, NOT_YET, Authority
from tests.client.support import connect_once, connected, seen
from tests.servers import serving

BRIEF = Timeouts(connect_s=2.0, close_s=0.5)


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path)


@pytest.fixture
def stranger(tmp_path):
    """Another authority, which signs for the same names."""
    (tmp_path / "stranger").mkdir()
    return Authority(tmp_path / "stranger")


@contextlib.contextmanager
def serving_tls(certificate, key, client_ca=None, **settings):
    """A server under that certificate; its port."""
    with serving(tls=ServerTls(certificate, key, client_ca), **settings) as server:
        yield server.address.rpartition(":")[2]


def test_a_trusted_certificate_opens_an_encrypted_session(kind, authority):
    tls = TlsConfig(root_certificates=authority.file)
    with serving_tls(*authority.issue("localhost"), token="word") as port:
        for host in ("localhost", "127.0.0.1"):
            with connected(kind, f"{host}:{port}", tls=tls, token="word") as client:
                assert client.get_action(client.start_episode(), seen(0)) == 0


def test_a_certificate_of_an_unknown_authority_is_refused(kind, authority, stranger):
    with (
        serving_tls(*authority.issue("localhost")) as port,
        pytest.raises(TlsError, match=r"refused: unable to get local issuer.*--tls-ca, must hold"),
    ):
        connect_once(kind, f"localhost:{port}", tls=TlsConfig(stranger.file), timeouts=BRIEF)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_a_certificate_for_another_host_is_refused(kind, authority, host):
    with (
        serving_tls(*authority.issue("trainer.example", ip=None)) as port,
        pytest.raises(TlsError, match=rf"not valid for '{host}'.*name that it was issued for"),
    ):
        connect_once(kind, f"{host}:{port}", tls=TlsConfig(authority.file), timeouts=BRIEF)


@pytest.mark.parametrize(
    ("days", "says"),
    [
        (EXPIRED, "certificate has expired.*policy-client certs"),
        (NOT_YET, "not yet valid.*clock of this machine"),
    ],
)
def test_a_certificate_of_another_time_is_refused(kind, authority, days, says):
    with (
        serving_tls(*authority.issue("localhost", days=days)) as port,
        pytest.raises(TlsError, match=says),
    ):
        connect_once(kind, f"localhost:{port}", tls=TlsConfig(authority.file), timeouts=BRIEF)


def test_a_plaintext_client_is_told_that_the_server_speaks_tls(kind, authority):
    with (
        serving_tls(*authority.issue("localhost")) as port,
        pytest.raises(TlsError, match=r"speaks TLS and this client does not.*--tls-ca"),
    ):
        connect_once(kind, f"localhost:{port}", timeouts=BRIEF)


def test_a_tls_client_is_told_that_the_server_speaks_plaintext(kind, authority):
    with (
        serving() as server,
        pytest.raises(TlsError, match=r"does not speak TLS.*connect without tls="),
    ):
        connect_once(kind, server.address, tls=TlsConfig(authority.file), timeouts=BRIEF)


def test_a_wrong_token_is_refused_at_once_inside_tls(kind, authority):
    with serving_tls(*authority.issue("localhost"), token="word") as port:
        for token in (None, "another"):
            with pytest.raises(UnauthenticatedError, match="token"):
                connect_once(kind, f"localhost:{port}", tls=TlsConfig(authority.file), token=token)


def test_a_client_certificate_opens_a_server_that_asks_for_one(kind, authority):
    with serving_tls(*authority.issue("localhost"), client_ca=authority.file) as port:
        tls = TlsConfig(authority.file, *authority.issue("simulator", ip=None))
        connect_once(kind, f"localhost:{port}", tls=tls)


def test_a_missing_client_certificate_is_asked_for(kind, authority):
    with (
        serving_tls(*authority.issue("localhost"), client_ca=authority.file) as port,
        pytest.raises(TlsError, match=r"asks for a client certificate.*--tls-cert and --tls-key"),
    ):
        connect_once(kind, f"localhost:{port}", tls=TlsConfig(authority.file), timeouts=BRIEF)


def test_a_client_certificate_that_the_server_does_not_believe_is_told_so(
    kind, authority, stranger
):
    with serving_tls(*authority.issue("localhost"), client_ca=authority.file) as port:
        for issuer, days in ((stranger, (-1, 1)), (authority, EXPIRED)):
            tls = TlsConfig(authority.file, *issuer.issue("simulator", ip=None, days=days))
            with pytest.raises(TlsError, match=r"this client certificate.*--tls-client-ca"):
                connect_once(kind, f"localhost:{port}", tls=tls, timeouts=BRIEF)
