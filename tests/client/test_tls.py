"""TLS as the client meets it: certificates that fit, and every way in which they do not."""

import shutil
import subprocess

import pytest

from client_sdk import Timeouts, TlsConfig
from client_sdk.errors import TlsError
from policy_server.config import ServerTls
from tests.client.support import connect_once, connected, seen
from tests.servers import serving

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificates")

BRIEF = Timeouts(connect_s=2.0, close_s=0.5)


def make_certificate(folder, name, host):
    """A self-signed certificate for that host name; its files."""
    key, certificate = folder / f"{name}.key", folder / f"{name}.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-days", "2", "-subj", f"/CN={host}", "-addext", f"subjectAltName=DNS:{host}",
         "-keyout", str(key), "-out", str(certificate)],
        check=True,
        capture_output=True,
        timeout=30,
    )  # fmt: skip
    return str(certificate), str(key)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    folder = tmp_path_factory.mktemp("certificates")
    return {
        name: make_certificate(folder, name, host)
        for name, host in (("right", "localhost"), ("elsewhere", "trainer.example"))
    }


@pytest.fixture
def tls_server(certificates):
    with serving(tls=ServerTls(*certificates["right"]), token="word") as server:
        yield f"localhost:{server.address.rpartition(':')[2]}"


def test_a_trusted_certificate_opens_an_encrypted_session(kind, tls_server, certificates):
    tls = TlsConfig(root_certificates=certificates["right"][0])
    with connected(kind, tls_server, tls=tls, token="word") as client:
        assert client.get_action(client.start_episode(), seen(0)) == 0


def test_a_certificate_of_an_unknown_authority_is_refused(kind, tls_server, certificates):
    tls = TlsConfig(root_certificates=certificates["elsewhere"][0])
    with pytest.raises(TlsError, match="root_certificates"):
        connect_once(kind, tls_server, tls=tls, token="word", timeouts=BRIEF)


def test_a_certificate_for_another_host_is_refused(kind, certificates):
    tls = TlsConfig(root_certificates=certificates["elsewhere"][0])
    with serving(tls=ServerTls(*certificates["elsewhere"])) as server:
        address = f"localhost:{server.address.rpartition(':')[2]}"
        with pytest.raises(TlsError, match="name that it was issued for"):
            connect_once(kind, address, tls=tls, timeouts=BRIEF)


def test_a_plaintext_client_is_told_that_the_server_speaks_tls(kind, tls_server):
    with pytest.raises(TlsError, match="speaks TLS"):
        connect_once(kind, tls_server, timeouts=BRIEF)


def test_a_client_certificate_opens_a_server_that_asks_for_one(kind, certificates):
    certificate, key = certificates["right"]
    tls = ServerTls(certificate, key, client_ca=certificate)
    with serving(tls=tls) as server:
        address = f"localhost:{server.address.rpartition(':')[2]}"
        with pytest.raises(TlsError, match="client certificate"):
            connect_once(
                kind, address, tls=TlsConfig(root_certificates=certificate), timeouts=BRIEF
            )
        connect_once(kind, address, tls=TlsConfig(certificate, certificate=certificate, key=key))
