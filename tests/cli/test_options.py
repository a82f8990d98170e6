"""What the command says to options that it cannot follow, and to machines that it cannot run on."""

import os
import re
import socket
import subprocess
import sys
import time

import pytest

from policy_server import cli
from policy_server.commands.checkpoints import CheckpointDirectory

ANYWHERE = ("train", "--port", "0")  # whoever uses the default port, these tests do not
TRAIN = (*ANYWHERE, "--env", "CartPole-v1")
CHECK = ("check", "localhost:9900")


def fails(capsys, *arguments):
    """Run a command that fails; returns its exit code and its one line."""
    try:
        code = cli.main(arguments)
    except SystemExit as end:
        code = end.code
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert captured.out == ""
    return code, line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "COMMAND"),
        (("trian",), "trian"),
        (("train",), "one of the arguments --env --spaces --config is required"),
        ((*TRAIN, "--spaces", "x.json"), "not allowed with argument"),
        (
            (*TRAIN, "--port", "99999"),
            "argument --port: expected a whole number from 0 to 65535, got '99999'",
        ),
        ((*TRAIN, "--port", "http"), "argument --port: expected a whole number from 0 to 65535"),
        ((*TRAIN, "--algo", "PPPO"), "argument --algo: invalid choice: 'PPPO'"),
        ((*TRAIN, "--set", "lr"), "argument --set: expected KEY=VALUE, got 'lr'"),
        ((*TRAIN, "--stop-iters", "0"), "expected a whole number from 1 up, got '0'"),
        ((*TRAIN, "--stop-return", "nan"), "expected a finite number, got 'nan'"),
        ((*TRAIN, "--resume"), "argument --resume: needs --checkpoint-dir"),
        (
            (*TRAIN, "--token-file", "nowhere"),
            "argument --token-file: cannot read nowhere: No such file",
        ),
        ((*TRAIN, "--tls-cert", __file__), "--tls-cert and --tls-key: one needs the other"),
        ((*TRAIN, "--plot", "curve.jpg"), "expected a name that ends in .png"),
        ((*TRAIN, "--client-config", "[]"), "expected a JSON object"),
        ((*TRAIN, "--no-such-option"), "unrecognized arguments: --no-such-option"),
        ((*ANYWHERE, "--config", "a.b:c", "--algo", "PPO"), "not allowed with argument --config"),
        (
            (*ANYWHERE, "--spaces", "nowhere.json"),
            "argument --spaces: nowhere.json: No such file",
        ),
        (
            (*ANYWHERE, "--env", "CartPoole-v1"),
            "argument --env: Environment `CartPoole` doesn't",
        ),
        ((*ANYWHERE, "--config", "no_such_module:f"), "cannot import no_such_module"),
        ((*ANYWHERE, "--config", "json"), "expected package.module:attribute"),
        ((*ANYWHERE, "--config", "json:no"), "json has no 'no'"),
        ((*ANYWHERE, "--config", "json.decoder:NaN"), "expected an AlgorithmConfig"),
        ((*ANYWHERE, "--config", "json:loads"), "json:loads() raised TypeError: loads() missing 1"),
        ((*TRAIN, "--address-file", "/no/where/a"), "--address-file: cannot write into /no/where"),
        (
            (*ANYWHERE, "--env", "Pendulum-v1", "--algo", "DQN"),
            "argument --algo: DQN chooses one of n actions (Discrete), not from Box(",
        ),
        ((*TRAIN, "--set", "lrr=1"), "no setting 'lrr'; did you mean 'lr'?"),
        ((*TRAIN, "--host", "0.0.0.0"), "--insecure"),
        (("check",), "HOST:PORT"),
        (("check", "nohost"), 'expected "host:port" such as "localhost:9900", got \'nohost\''),
        (("check", "localhost:99999"), "got 'localhost:99999'"),
        ((*CHECK, "--timeout", "0"), "--timeout: expected a positive number of seconds, got '0'"),
        ((*CHECK, "--timeout", "nan"), "--timeout: expected a positive number of seconds"),
        ((*CHECK, "--timeout", "soon"), "--timeout: expected a positive number of seconds"),
        ((*CHECK, "--tls-cert", __file__), "--tls-cert and --tls-key: one needs the other"),
        ((*CHECK, "--tls-key", __file__), "--tls-cert and --tls-key: one needs the other"),
        ((*CHECK, "--tls-ca", "nowhere"), "argument --tls-ca: cannot read nowhere: No such file"),
        ((*TRAIN, "--tls-client-ca", __file__), "--tls-client-ca: needs --tls-cert and --tls-key"),
        (
            (*TRAIN, "--tls-cert", __file__, "--tls-key", __file__),
            "ServerTls.certificate: expected a CERTIFICATE in PEM form",
        ),
        ((*TRAIN, "--token-file", __file__), "one word of visible ASCII characters as token"),
        ((*CHECK, "--token-file", os.devnull), "/dev/null, which is empty"),
        ((*CHECK, "--tls-ca", __file__), "TlsConfig.root_certificates: expected a CERTIFICATE"),
        ((*CHECK, "--tls-ca", os.path.dirname(__file__)), "Is a directory"),
    ],
)
def test_bad_option_gets_one_line_and_exit_code_2(capsys, arguments, said):
    code, line = fails(capsys, *arguments)
    assert code == 2
    assert said in line


def test_checkpoints_of_another_training_are_not_mixed_with_new_ones(capsys, tmp_path):
    CheckpointDirectory(tmp_path).write(5, lambda _: None)
    code, line = fails(capsys, *TRAIN, "--checkpoint-dir", str(tmp_path))
    assert code == 2
    assert f"argument --checkpoint-dir: {tmp_path} holds the checkpoints of another" in line
    assert "--resume goes on with it, another directory starts a new one" in line


def test_token_of_the_environment_is_not_sent_in_plain_text(capsys, monkeypatch):
    monkeypatch.setenv("POLICY_SERVER_TOKEN", "hidden-word")
    code, line = fails(capsys, "check", "example.org:9900")
    assert code == 2
    assert "in plain text" in line
    assert "hidden-word" not in line


def test_port_in_use_is_named_at_once():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "policy_server.cli", *TRAIN, "--port", str(port)],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        elapsed_s = time.monotonic() - began
    assert done.returncode == 4
    assert len(done.stderr.splitlines()) == 1
    assert f"127.0.0.1:{port}" in done.stderr
    assert elapsed_s < 2


def test_another_ray_is_named_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr(cli.metadata, "version", lambda _: "2.44.1")
    code, line = fails(capsys, *TRAIN)
    assert code == 3
    assert "ray 2.60.0 is needed, 2.44.1 is installed" in line


@pytest.mark.parametrize("module", cli._MODULES)
def test_missing_dependency_is_named_in_one_line(capsys, monkeypatch, module):
    real = cli.importlib.util.find_spec
    monkeypatch.setattr(
        cli.importlib.util, "find_spec", lambda name: None if name == module else real(name)
    )
    code, line = fails(capsys, *TRAIN)
    assert code == 3
    assert f"{module} is not installed" in line
    assert "policy-server[server]" in line


@pytest.mark.parametrize("arguments", [("--help",), ("train", "--help"), ("check", "--help")])
def test_help_explains_the_exit_codes_and_shows_every_option(capsys, arguments):
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert "exit codes:" in text
    if arguments[0] == "train":
        for option in ("--env", "--spaces", "--config", "--stop-return", "--resume", "--insecure"):
            assert option in text
        assert "examples:" in text
        # No option without a word on what it does.
        assert not re.search(r"^  --[a-z-]+( [A-Z:=.a-z]+)?$\n^  -", text, flags=re.MULTILINE)


def test_help_costs_no_ray():
    code = """
import sys
from policy_server import cli
try:
    cli.main(["train", "--help"])
except SystemExit:
    pass
print(sorted({"ray", "torch", "onnxruntime", "matplotlib"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_nobody_answering_is_one_line_and_exit_code_1(capsys):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        code, line = fails(capsys, "check", f"127.0.0.1:{port}", "--timeout", "1")
    assert code == 1
    assert str(port) in line
