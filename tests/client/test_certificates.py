"""``policy-client certs``: what it writes works, is private, and replaces nothing."""

import stat
import subprocess
import sys

import pytest

from client_sdk import PolicyClient, TlsConfig, certificates, cli
from client_sdk.errors import InvalidValueError, TlsError
from policy_server import ServerTls
from tests.client.test_tls import BRIEF
from tests.servers import serving

FILES = {"ca.pem", "ca.key", "server.pem", "server.key", "client.pem", "client.key", "token"}


@pytest.fixture
def made(tmp_path):
    """A directory of them."""
    directory = tmp_path / "certs"
    certificates.make(directory, ["trainer.example", "127.0.0.1"], days=2)
    return directory


def test_a_server_and_a_client_with_them_trust_each_other(made):
    tls = ServerTls(
        str(made / "server.pem"), str(made / "server.key"), client_ca=str(made / "ca.pem")
    )
    token = (made / "token").read_text().strip()
    with serving(tls=tls, token=token, host="0.0.0.0") as server:
        port = server.address.rpartition(":")[2]
        own = TlsConfig(made / "ca.pem", made / "client.pem", made / "client.key")
        for host in ("127.0.0.1", "localhost"):
            with PolicyClient(f"{host}:{port}", tls=own, token=token) as client:
                assert client.ping() > 0
        with pytest.raises(TlsError, match="client certificate"):
            PolicyClient(f"127.0.0.1:{port}", tls=TlsConfig(made / "ca.pem"), timeouts=BRIEF)
        # A client's certificate is none for a server, nor the reverse.
        swapped = TlsConfig(made / "ca.pem", made / "server.pem", made / "server.key")
        with pytest.raises(TlsError, match="client certificate"):
            PolicyClient(f"127.0.0.1:{port}", tls=swapped, timeouts=BRIEF)


def test_keys_and_token_are_for_their_owner_alone(made):
    assert {path.name for path in made.iterdir()} == FILES
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    for path in made.iterdir():
        others = stat.S_IMODE(path.stat().st_mode) & 0o077
        assert path.suffix == ".pem" or not others, path.name
    assert len((made / "token").read_text().strip()) >= 32


def test_nothing_is_overwritten(made, capsys):
    before = {path.name: path.read_bytes() for path in made.iterdir()}
    assert cli.main(["certs", str(made), "--host", "trainer"]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in made.iterdir()} == before
    assert [path.name for path in made.parent.iterdir()] == ["certs"]


def test_a_write_that_fails_leaves_nothing_behind(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["certs", str(tmp_path / "file" / "certs"), "--host", "trainer"]) == 1
    assert "file" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_it_prints_what_is_what_and_how_to_go_on(tmp_path, capsys):
    directory = tmp_path / "deep" / "certs"
    assert cli.main(["certs", str(directory), "--host", "fd00::7", "trainer.example"]) == 0
    out = capsys.readouterr().out
    assert "for fd00::7, trainer.example, localhost, 127.0.0.1, ::1\n" in out
    for file in FILES:
        assert f"\n  {file} " in out
    assert (
        f"policy-client run CartPole-v1 --server [fd00::7]:9900 \\\n    --tls-ca {directory}" in out
    )
    assert f"--tls-cert {directory}/server.pem --tls-key {directory}/server.key" in out


@pytest.mark.parametrize("host", ["trainer:9900", "", "a b", "-a", "http://a", "a..b", "ümlaut"])
def test_what_is_no_host_is_refused(tmp_path, host):
    with pytest.raises(InvalidValueError, match="host name or an IP address without a port"):
        certificates.make(tmp_path / "certs", [host])
    assert list(tmp_path.iterdir()) == []


def test_without_cryptography_it_says_what_to_install(tmp_path):
    code = f"""
import sys
sys.modules["cryptography"] = None
from client_sdk.cli import main
raise SystemExit(main(["certs", {str(tmp_path / "certs")!r}, "--host", "trainer"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "pip install 'policy-server[certs]'" in done.stderr
    assert done.stderr.count("\n") == 1
