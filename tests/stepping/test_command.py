"""``policy-client host`` as a person, or a supervisor of processes, meets it."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from concurrent import futures
from pathlib import Path

import pytest

from client_sdk import RemoteEnv, TlsConfig
from client_sdk.errors import EnvironmentLostError
from client_sdk.parent import when_process_ends
from tests.authority import Authority
from tests.stepping.support import COMMAND, PATIENCE_S, HostProcess, wait_for


def found_here():
    """An environment in which modules are found from this directory, wherever a command runs."""
    path = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path}


def run(*arguments, **options):
    done = subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=60, check=False, **options
    )
    return done.returncode, done.stdout, done.stderr


def test_it_says_what_it_hosts_and_where_and_writes_it_down(tmp_path):
    file = tmp_path / "address"
    with HostProcess("CartPole-v1", "--port", "0", "--address-file", str(file)) as host:
        assert re.fullmatch(r"hosting CartPole-v1 on 127\.0\.0\.1:\d+", host.line)
        wait_for(file.exists)
        assert file.read_text() == host.address
        with RemoteEnv(host.address) as env:
            env.reset(seed=1)
            assert env.step(0)[1] == 1.0
        host.process.send_signal(signal.SIGTERM)
        assert host.process.wait(PATIENCE_S) == 143
        assert not file.exists()


def test_the_address_is_written_once_it_answers(tmp_path):
    file = tmp_path / "address"
    process = subprocess.Popen(
        [*COMMAND, "CartPole-v1", "--port", "0", "--address-file", str(file)],
        stdout=subprocess.DEVNULL,
    )
    try:
        wait_for(file.exists)
        with RemoteEnv(file.read_text(), connect_timeout=5.0) as env:
            env.reset()
    finally:
        process.kill()
        process.wait(PATIENCE_S)


def test_it_hosts_a_function_of_a_module_beside_it_with_arguments(tmp_path):
    (tmp_path / "my_simulator.py").write_text(
        textwrap.dedent("""
            import gymnasium

            def make_env(steps, render_mode=None):
                return gymnasium.make("CartPole-v1", max_episode_steps=steps)
        """)
    )
    arguments = [*COMMAND, "my_simulator:make_env", "--kwargs", '{"steps": 3}', "--port", "0"]
    process = subprocess.Popen(
        arguments, cwd=tmp_path, stdout=subprocess.PIPE, text=True, env=found_here()
    )
    try:
        line = process.stdout.readline()
        assert line.startswith("hosting my_simulator:make_env on ")
        with RemoteEnv(line.split()[-1]) as env:
            env.reset(seed=1)
            assert [env.step(0)[3] for _ in range(3)] == [False, False, True]
    finally:
        process.kill()
        process.communicate(timeout=PATIENCE_S)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "ENV"),
        (["NoSuchEnv-v3"], "NoSuchEnv"),
        (["no_such_module:make"], "no_such_module"),
        ([":make"], "cannot host ':make'"),
        (["json:no_such_function"], "the module 'json' has no function 'no_such_function'"),
        (["json:__doc__"], "the module 'json' has no function '__doc__'"),
        (["CartPole-v1", "--port", "many"], "--port"),
        (["CartPole-v1", "--port", "70000"], "port: expected a whole number, 0 to 65535"),
        (["CartPole-v1", "--kwargs", "[1]"], "--kwargs"),
        (["CartPole-v1", "--kwargs", "{"], "--kwargs"),
        (["CartPole-v1", "--max-envs", "0"], "max_envs"),
        (["CartPole-v1", "--lease", "0"], "lease_s"),
        (["CartPole-v1", "--parent-pid", "0"], "--parent-pid"),
        (["CartPole-v1", "--token-file", "/none"], "/none"),
        (["CartPole-v1", "--tls-cert", __file__], "--tls-key"),
        (["CartPole-v1", "--host", "0.0.0.0"], "--insecure"),
    ],
)
def test_a_bad_option_is_one_line_and_exit_code_2(arguments, says):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [("def make(:", "SyntaxError"), ("raise RuntimeError('no licence')", "no licence")],
)
def test_a_module_that_cannot_be_imported_is_one_line_with_its_words(tmp_path, text, says):
    (tmp_path / "broken.py").write_text(text)
    done = subprocess.run(
        [*COMMAND, "broken:make"], cwd=tmp_path, env=found_here(),
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert "cannot host 'broken:make'" in done.stderr
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_port_in_use_is_named_at_once_with_exit_code_4():
    with HostProcess("CartPole-v1", "--port", "0") as host:
        port = host.address.rpartition(":")[2]
        code, out, err = run("CartPole-v1", "--port", port)
        assert (code, out) == (4, "")
        said = err.splitlines()[-1]  # gRPC has its own line before
        assert f"127.0.0.1:{port}" in said
        assert "in use" in said


def test_an_address_file_that_cannot_be_written_is_one_line():
    code, out, err = run("CartPole-v1", "--port", "0", "--address-file", "/none/address")
    assert (code, out, err.count("\n")) == (4, "", 1)
    assert "/none/address" in err


@pytest.mark.parametrize("state", ["idle", "stepping"])
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
    ids=["SIGINT", "SIGTERM", "SIGHUP"],
)
def test_signals_end_it_within_5_seconds_whatever_an_environment_does(number, code, state):
    name = "CartPole-v1" if state == "idle" else "tests.stepping.hosts:sleepy"
    with HostProcess(name, "--port", "0") as host:
        env = RemoteEnv(host.address)
        env.reset()
        with futures.ThreadPoolExecutor(1) as pool:
            if state == "stepping":  # half a minute long
                step = pool.submit(env.step, 0)
                assert host.process.stdout.readline() == "stepping\n"
            start = time.monotonic()
            host.process.send_signal(number)
            _, err = host.process.communicate(timeout=PATIENCE_S)
            assert host.process.returncode == code, err
            assert time.monotonic() - start < 5.0
            assert "Traceback" not in err
            if state == "stepping":
                with pytest.raises(EnvironmentLostError):
                    step.result(PATIENCE_S)
        env.close()


def test_it_outlives_its_terminal_under_nohup():
    with HostProcess("CartPole-v1", "--port", "0", under=["nohup"]) as host:
        host.process.send_signal(signal.SIGHUP)
        with RemoteEnv(host.address) as env:
            env.reset()
            host.process.send_signal(signal.SIGTERM)
            _, err = host.process.communicate(timeout=PATIENCE_S)
        assert host.process.returncode == 143, err


# -- the parent


def test_it_ends_with_its_parent(tmp_path):
    file = tmp_path / "address"
    code = f"""
        import os, subprocess, sys
        child = subprocess.Popen([*{COMMAND!r}, "CartPole-v1", "--port", "0", "--address-file",
                                  {str(file)!r}, "--parent-pid", str(os.getpid())])
        print(child.pid, flush=True)
        sys.stdin.read()
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        pid = int(parent.stdout.readline())
        wait_for(file.exists)
        parent.kill()
        parent.wait(PATIENCE_S)
        wait_for(lambda: not runs(pid), 2.0)
        assert not file.exists()
    finally:
        parent.kill()
        parent.communicate(timeout=PATIENCE_S)


def test_it_ends_with_its_parent_also_while_it_imports(tmp_path):
    (tmp_path / "slow_to_come.py").write_text(
        "import time; print('importing', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as parent:
        host = subprocess.Popen(
            [*COMMAND, "slow_to_come:make", "--parent-pid", str(parent.pid)],
            cwd=tmp_path, env=found_here(), stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            assert host.stdout.readline() == "importing\n"
            parent.kill()
            assert host.wait(2.0) == 0
        finally:
            host.kill()
            host.communicate(timeout=PATIENCE_S)


def runs(pid):
    """Whether that process does; a zombie that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_it_outlives_a_thread_of_its_parent():
    """The kernel's parent-death signal is bound to the thread that forked; this is not."""
    code = f"""
        import os, subprocess, sys, threading
        started = []
        def start():
            started.append(subprocess.Popen(
                [*{COMMAND!r}, "CartPole-v1", "--port", "0", "--parent-pid", str(os.getpid())],
                stdout=subprocess.PIPE, text=True))
        thread = threading.Thread(target=start)
        thread.start()
        thread.join()
        host = started[0]
        address = host.stdout.readline().split()[-1]
        from client_sdk import RemoteEnv
        with RemoteEnv(address) as env:
            env.reset()
            print(env.step(0)[1], host.poll())
        host.kill()
        host.communicate()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == "1.0 None\n", done.stderr


def test_a_parent_that_is_gone_already_is_noticed_at_start():
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait(PATIENCE_S)
    code, _, err = run("CartPole-v1", "--port", "0", "--parent-pid", str(gone.pid))
    assert code == 0
    assert f"process {gone.pid}, the parent, has ended" in err


def test_a_number_that_was_given_to_a_younger_process_is_no_parent():
    younger = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"],
                               stdin=subprocess.PIPE)  # fmt: skip
    noticed = []
    try:
        when_process_ends(younger.pid, lambda: noticed.append(younger.pid))
        wait_for(lambda: noticed == [younger.pid])
    finally:
        younger.kill()
        younger.communicate(timeout=PATIENCE_S)


@pytest.mark.parametrize(
    "platform",
    [
        pytest.param("", id="pidfd"),
        pytest.param("del os.pidfd_open", id="no pidfd"),
        # As an older kernel, or a sandbox, has it.
        pytest.param("def refuse(*_): raise OSError(38, '')\nos.pidfd_open = refuse", id="refused"),
    ],
)
def test_the_end_of_a_process_is_noticed_on_every_platform(platform):
    code = """
        import os, subprocess, sys
        child = subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid())],
                                 stdout=sys.stdout)
        os.close(1)  # what the child says is all that there is to read
        sys.stdin.read()
    """
    watcher = f"""
import os, sys, threading
{platform}
from client_sdk.parent import when_process_ends
ended = threading.Event()
when_process_ends(int(sys.argv[1]), ended.set)
print("watching", flush=True)
print("noticed" if ended.wait(10) else "missed", flush=True)
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), watcher],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert parent.stdout.readline() == "watching\n"
        parent.kill()
        parent.wait(PATIENCE_S)
        assert parent.stdout.readline() == "noticed\n"
    finally:
        parent.kill()
        parent.communicate(timeout=PATIENCE_S)


# -- security


def test_tls_a_token_and_client_certificates_guard_a_host(tmp_path):
    authority = Authority(tmp_path)
    certificate, key = authority.issue("localhost")
    mine, my_key = authority.issue("trainer")
    token = tmp_path / "token"
    token.write_text("word\n")
    arguments = ["CartPole-v1", "--port", "0", "--host", "localhost", "--tls-cert", certificate,
                 "--tls-key", key, "--tls-client-ca", authority.file,
                 "--token-file", str(token)]  # fmt: skip
    with HostProcess(*arguments) as host:
        tls = TlsConfig(authority.file, certificate=mine, key=my_key)
        with RemoteEnv(host.address, token="word", tls=tls, connect_timeout=10.0) as env:
            env.reset()
            assert env.step(0)[1] == 1.0
        for wrong, says in (
            ({"tls": tls}, "asks for a token"),
            ({"token": "word"}, "speaks TLS"),
            ({"token": "word", "tls": TlsConfig(authority.file)}, "client certificate"),
        ):
            with pytest.raises(Exception, match=says):
                RemoteEnv(host.address, connect_timeout=2.0, **wrong)


def test_health_and_reflection_are_there_where_their_packages_are():
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    with (
        HostProcess("CartPole-v1", "--port", "0") as host,
        grpc.insecure_channel(host.address) as channel,
    ):
        check = health_pb2.HealthCheckRequest(service="policyserver.v1.EnvService")
        answer = health_pb2_grpc.HealthStub(channel).Check(check, timeout=PATIENCE_S)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        (listed,) = stub.ServerReflectionInfo(iter([ask]), timeout=PATIENCE_S)
        names = {service.name for service in listed.list_services_response.service}
        assert "policyserver.v1.EnvService" in names


def test_a_host_without_the_servers_packages_serves_all_the_same():
    code = """
        import sys
        for name in ("grpc_health", "grpc_reflection", "ray", "torch", "onnxruntime", "psutil",
                     "pygame", "imageio", "cryptography", "rich"):
            sys.modules[name] = None
        from client_sdk import RemoteEnv
        from client_sdk.env_server import EnvServer, EnvServerConfig
        with EnvServer("CartPole-v1", EnvServerConfig(port=0)) as server:
            with RemoteEnv(server.address) as env:
                env.reset()
                print(env.step(0)[1])
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("1.0\n", "")


def test_help_names_options_and_examples():
    code, out, _ = run("--help")
    assert code == 0
    for word in (
        "--port",
        "--parent-pid",
        "--tls-client-ca",
        "--any-env",
        "exit codes",
        "examples",
    ):
        assert word in out


def test_an_address_that_is_not_of_this_machine_is_refused():
    code, out, err = run("CartPole-v1", "--host", "192.0.2.1", "--insecure", "--port", "0")
    assert (code, out) == (4, "")
    assert "192.0.2.1" in err.splitlines()[-1]
