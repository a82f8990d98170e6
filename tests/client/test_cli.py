"""``policy-client`` as a person, or a supervisor of processes, meets it."""

import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from tests.client.support import PATIENCE_S
from tests.servers import serving

COMMAND = [sys.executable, "-m", "client_sdk.cli"]


def run(*arguments):
    done = subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stdout, done.stderr


def unused_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def test_it_runs_so_many_episodes_and_prints_what_they_came_to(server):
    code, out, err = run("run", "CartPole-v1", "--server", server.address, "--envs", "2",
                         "--episodes", "4", "--seed", "1")  # fmt: skip
    assert (code, err) == (0, "")
    assert re.fullmatch(
        r"episodes [45]  steps \d+  steps/s \d+  mean return \d+\.\d  policy version 1\n", out
    )


def test_quiet_prints_nothing(server):
    assert run("run", "CartPole-v1", "--server", server.address, "--episodes", "1", "--quiet") == (
        0,
        "",
        "",
    )


def test_help_names_options_and_exit_codes():
    code, out, _ = run("run", "--help")
    assert code == 0
    for word in ("--server", "--envs", "--episodes", "--connect-timeout", "exit codes", "examples"):
        assert word in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "COMMAND"),
        (["fly"], "fly"),
        (["run", "CartPole-v1"], "--server"),
        (["run", "CartPole-v1", "--server", "nowhere"], "localhost:9900"),
        (["run", "CartPole-v1", "--server", "a:1", "--envs", "0"], "--envs"),
        (["run", "CartPole-v1", "--server", "a:1", "--envs", "many"], "--envs"),
        (["run", "CartPole-v1", "--server", "a:1", "--inference", "both"], "remote"),
        (["run", "CartPole-v1", "--server", "a:1", "--connect-timeout", "0"], "--connect-timeout"),
        (["run", "CartPole-v1", "--server", "a:1", "--token-file", "/none"], "/none"),
        (["run", "CartPole-v1", "--server", "a:1", "--tls-ca", "/none"], "/none"),
        (["run", "NoSuchEnv-v3", "--server", "a:1"], "NoSuchEnv"),
        (["run", "no_such_module:Env-v0", "--server", "a:1"], "no_such_module"),
    ],
)
def test_a_bad_option_or_environment_is_one_line_and_exit_code_2(arguments, says):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1


def test_a_token_is_not_sent_in_the_clear_without_being_told(tmp_path):
    token = tmp_path / "token"
    token.write_text("hidden-word\n")
    code, _, err = run("run", "CartPole-v1", "--server", "trainer:1", "--token-file", str(token))
    assert code == 2
    assert "plain text" in err
    assert "hidden-word" not in err


def test_a_token_file_opens_the_door(tmp_path):
    token = tmp_path / "token"
    token.write_text("hidden-word\n")
    with serving(token="hidden-word") as server:
        where = ["run", "CartPole-v1", "--server", server.address, "--episodes", "1"]
        assert run(*where, "--token-file", str(token))[0] == 0
        code, _, err = run(*where)
    assert code == 1
    assert err.count("\n") == 1


def test_no_server_is_one_line_and_exit_code_1_within_the_timeout():
    start = time.monotonic()
    code, _, err = run(
        "run", "CartPole-v1", "--server", f"127.0.0.1:{unused_port()}", "--connect-timeout", "1"
    )
    assert time.monotonic() - start < 10
    assert (code, err.count("\n")) == (1, 1)
    assert "nobody listens" in err


def test_a_simulator_that_the_server_refuses_is_one_line_and_exit_code_1(server):
    code, out, err = run("run", "Acrobot-v1", "--server", server.address)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "client and server disagree" in err


def test_a_server_that_is_not_up_yet_is_waited_for():
    port = unused_port()
    done = threading.Event()

    def serve():
        threading.Event().wait(1.5)
        with serving(port=port):
            done.wait(PATIENCE_S)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        code, _, err = run("run", "CartPole-v1", "--server", f"127.0.0.1:{port}", "--episodes", "1")
    finally:
        done.set()
        thread.join()
    assert code == 0
    assert all("does not answer yet" in line for line in err.splitlines())


def wait_for(condition):
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until
        threading.Event().wait(0.02)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"]
)
@pytest.mark.parametrize("state", ["acting", "held", "connecting", "server gone"])
def test_signals_end_it_promptly_and_cleanly(number, code, state):
    with (
        serving(hold=state == "held") as server,
        socket.create_server(("127.0.0.1", 0)) as silent,
    ):
        silent.settimeout(PATIENCE_S)
        target = server.address
        if state == "connecting":
            target = f"127.0.0.1:{silent.getsockname()[1]}"
        process = subprocess.Popen(
            [*COMMAND, "run", "CartPole-v1", "--server", target, "--envs", "2"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            if state == "connecting":
                silent.accept()[0].close()
            else:
                wait_for(lambda: server.server.stats()["requests"] > 0)
            if state == "server gone":
                server.server.stop()
                threading.Event().wait(0.5)
            start = time.monotonic()
            process.send_signal(number)
            _, err = process.communicate(timeout=PATIENCE_S)
            assert process.returncode == code, err
            assert time.monotonic() - start < 5.0
            assert "Traceback" not in err
            if state in {"acting", "held"}:
                assert server.server.sessions == 0
        finally:
            process.kill()
            process.communicate()
