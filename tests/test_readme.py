"""The README is run as it stands: its simulator against its server, its commands from the Makefile."""

import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SIMULATOR, VECTORISED, SERVER = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )


@pytest.mark.parametrize(("name", "code"), [("simulator", SIMULATOR), ("server", SERVER)])
def test_code_of_the_readme_is_the_example(name, code):
    assert (ROOT / f"examples/{name}.py").read_text() == code


def test_simulator_and_server_are_as_short_as_promised():
    def length(code):
        """Lines after the docstring that are not blank."""
        return len([line for line in code.split('"""\n', 1)[1].splitlines() if line.strip()])

    assert length(SIMULATOR) <= 30
    assert length(SERVER) <= 10


@pytest.mark.timeout(240)
def test_simulators_of_the_readme_learn_from_the_server_of_the_readme():
    port = str(free_port())
    # Only where it listens, how long it runs and how much it asks for are shortened.
    server_code = (
        SERVER.replace("port=9900", f"port={port}")
        .replace("range(100)", "range(2)")
        .replace(
            "algo = config", "config.training(train_batch_size=300, num_epochs=1)\nalgo = config"
        )
    )
    assert server_code.count(port) == 1
    vector_code = VECTORISED.replace("localhost:9900", f"127.0.0.1:{port}")
    simulator_code = SIMULATOR.replace("PolicyClient(address)", "PolicyClient(address, timeouts=T)")
    simulator_code = simulator_code.replace(
        "from client_sdk import PolicyClient",
        "from client_sdk import PolicyClient, Timeouts\n\nT = Timeouts(connect_s=120)",
    )
    processes = [run(server_code), run(simulator_code, f"127.0.0.1:{port}", "100000")]
    server, simulator = processes
    try:
        first = simulator.stdout.readline()
        assert re.fullmatch(r"episode 0: return \d+, policy version \d+\n", first)
        processes.append(run(vector_code))
        out, _ = server.communicate(timeout=180)
        assert server.returncode == 0
        assert processes[2].poll() in (None, 0)
        assert re.search(r"^\d+\.\d+$", out, re.MULTILINE), out
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.communicate()


@pytest.mark.parametrize("command", re.findall(r"^\$ make (\S+)", README, re.MULTILINE))
def test_commands_of_the_readme_exist(command):
    assert re.search(rf"^{command}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


COMMANDS = re.findall(
    r"^\$ (policy-\S+ .*)$", README + (ROOT / "docs/security.md").read_text(), re.MULTILINE
)


@pytest.mark.parametrize("line", COMMANDS)
def test_options_of_the_documents_exist(line):
    program, command, *arguments = line.split()
    module = {"policy-server": "policy_server.cli", "policy-client": "client_sdk.cli"}[program]
    helped = subprocess.run(
        [sys.executable, "-m", module, command, "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    for option in (argument for argument in arguments if argument.startswith("--")):
        assert option in helped


def test_ci_runs_the_commands_of_the_readme():
    script = (ROOT / ".ci/run").read_text()
    assert "make test" in script
    assert "make lint" in script
