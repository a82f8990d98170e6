"""The commands under TLS, client certificates and a token, with files of `policy-client certs`."""

import os
import subprocess
import sys

import pytest

from client_sdk import certificates
from policy_server import cli
from tests.authority import EXPIRED, Authority
from tests.cli.test_train import LISTENING, QUICK, training

TRUST = "unable to get local issuer certificate"


@pytest.mark.timeout(240)
@pytest.mark.slow
def test_training_under_tls_admits_who_shows_everything_and_tells_the_others(
    tmp_path, capsys, monkeypatch
):
    certs = tmp_path / "certs"
    certificates.make(certs, ["trainer.example"])
    ca, token = ("--tls-ca", str(certs / "ca.pem")), ("--token-file", str(certs / "token"))
    own = ("--tls-cert", str(certs / "client.pem"), "--tls-key", str(certs / "client.key"))
    (tmp_path / "stranger").mkdir()
    stranger = Authority(tmp_path / "stranger")
    late = stranger.issue("simulator", days=EXPIRED)
    wrong = tmp_path / "wrong"
    wrong.write_text("sesame")
    serve = (
        *("--port", "0", "--tls-cert", str(certs / "server.pem"), *token),
        *("--tls-key", str(certs / "server.key"), "--tls-client-ca", str(certs / "ca.pem")),
    )
    with training(*QUICK, *serve, "--stop-iters", "1") as run:
        address = run.wait_for(LISTENING)[1]
        for options, says in (
            (token, "speaks TLS and this client does not"),
            ((*ca, *token), "client certificate"),
            (("--tls", *own, *token), TRUST),
            (("--tls-ca", stranger.file, *own, *token), TRUST),
            ((*ca, "--tls-cert", late[0], "--tls-key", late[1], *token), "this client certificate"),
            ((*ca, *own), "asks for a token"),
            ((*ca, *own, "--token-file", str(wrong)), "wrong token"),
        ):
            assert cli.main(["check", address, "--timeout", "1", *options]) == 1, options
            (line,) = capsys.readouterr().err.splitlines()
            assert says in line
        monkeypatch.setenv("POLICY_SERVER_TOKEN", (certs / "token").read_text())
        assert cli.main(["check", address, *ca, *own]) == 0
        assert "handshake" in capsys.readouterr().out
        simulator = subprocess.Popen(
            [
                *(sys.executable, "-m", "client_sdk.cli", "run", "CartPole-v1", "--quiet"),
                *("--server", address.replace("127.0.0.1", "localhost"), *ca, *own),
            ],
            env=os.environ.copy(),
        )
        try:
            code, _ = run.end(120)
        finally:
            simulator.kill()
            simulator.wait()
    assert code == 0, run.lines
    said = "\n".join(run.lines)
    assert (certs / "token").read_text().strip() not in said
