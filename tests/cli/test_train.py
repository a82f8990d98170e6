"""The command itself, with Ray and with simulators in processes of their own."""

import contextlib
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import grpc
import psutil
import pytest

from client_sdk.onnx_policy import OnnxPolicy
from client_sdk.wire.faults import Reason
from policy_server import PolicyServerConfig, cli
from policy_server.commands.restored import restore
from tests.server.talk import Talker, fault_in

pytestmark = pytest.mark.timeout(240)

START_S = 120
LISTENING = r"policy server listening on (127\.0\.0\.1:\d+)"
QUICK = (
    *("--env", "CartPole-v1", "--seed", "1", "--checkpoint-every", "1"),
    *("--set", "train_batch_size_per_learner=500", "--set", "minibatch_size=100"),
    *("--set", "num_epochs=1"),
)


class Training:
    """A running `policy-server train`, its output as it comes."""

    def __init__(self, arguments):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "policy_server.cli", "train", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines = []
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.process.stdout:
            with self._news:
                self.lines.append(line.rstrip())
                self._news.notify_all()

    def wait_for(self, pattern, timeout_s=START_S):
        """The first match of a line, seen or to come."""

        def found():
            return next((m for m in (re.search(pattern, line) for line in self.lines) if m), None)

        with self._news:
            match = self._news.wait_for(found, timeout_s)
        assert match, "\n".join(self.lines)
        return match

    def children(self):
        """The names of the processes that it has started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return [child.name() for child in psutil.Process(self.process.pid).children()]
        return []

    def end(self, timeout_s):
        """Wait; returns the exit code and how long it took."""
        began = time.monotonic()
        code = self.process.wait(timeout_s)
        elapsed_s = time.monotonic() - began
        self._reader.join(5)
        self.process.stdout.close()
        return code, elapsed_s


@contextlib.contextmanager
def training(*arguments):
    run = Training(arguments)
    try:
        yield run
    finally:
        if run.process.poll() is None:
            run.process.kill()
            run.process.wait()


@contextlib.contextmanager
def simulators(address):
    command = ["run", "CartPole-v1", "--server", address, "--envs", "4", "--quiet"]
    process = subprocess.Popen([sys.executable, "-m", "client_sdk.cli", *command])
    try:
        yield process
    finally:
        process.terminate()
        process.wait(20)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def version_after(lines, iteration):
    line = next(line for line in lines if re.match(rf"iteration +{iteration} .*", line))
    return int(line.split()[-1])


def test_training_reaches_its_goal_and_resumes_where_it_stopped(tmp_path):
    address = f"127.0.0.1:{free_port()}"
    common = (*QUICK, "--port", address.partition(":")[2], "--checkpoint-dir", str(tmp_path))
    written = tmp_path / "address"
    with simulators(address) as client:  # before the server: it waits for it
        with training(*common, "--stop-iters", "3", "--address-file", str(written)) as first:
            assert first.wait_for(LISTENING).group(1) == address
            assert written.read_text() == address
            first.wait_for(r"^acting by the onnx engine: the graph of \w+ passed its check$")
            first.wait_for(r"^iteration +1 ")
            code, _ = first.end(START_S)
        assert code == 0, "\n".join(first.lines)
        assert first.lines[-2] == f"checkpoint: {tmp_path / 'iteration_000003'}"
        assert first.lines[-1] == f"learning curve: {tmp_path / 'learning_curve.png'}"
        assert (tmp_path / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / "latest").resolve() == (tmp_path / "iteration_000003").resolve()
        # The simulators are still there, and come back by themselves.
        with training(*common, "--stop-iters", "5", "--resume") as second:
            second.wait_for(r"^resumed from .*iteration_000003$")
            second.wait_for(r"^iteration +4 ")
            code, _ = second.end(START_S)
        assert code == 0, "\n".join(second.lines)
        assert client.poll() is None
    steps = [
        int(re.search(r"env steps +([\d,]+)", line).group(1).replace(",", ""))
        for line in (*first.lines, *second.lines)
        if re.match(r"iteration +\d", line)
    ]
    assert steps == sorted(steps)
    assert steps[-1] >= 2500
    assert not any(re.match(r"iteration +[123] ", line) for line in second.lines)
    assert version_after(second.lines, 4) > version_after(first.lines, 3)
    # Nobody was served the random weights that RLlib began with the second time.
    resumed = restore(tmp_path).config
    assert PolicyServerConfig.from_env_config(resumed.env_config).awaits_checkpoint
    # And what has been learnt can be taken along.
    assert cli.main(["export", str(tmp_path), str(tmp_path / "policy.onnx")]) == 0
    policy = OnnxPolicy((tmp_path / "policy.onnx").read_bytes())
    assert policy.version == 5  # one for each iteration


def reach_waiting(stack, *arguments):
    run = stack.enter_context(training(*QUICK, *arguments))
    run.wait_for(LISTENING)
    return run


def reach_waiting_alone(stack, *arguments):
    """With the server in the training process."""
    return reach_waiting(stack, "--num-env-runners", "0", *arguments)


def reach_training(stack, *arguments):
    run = reach_waiting(stack, *arguments)
    stack.enter_context(simulators(run.wait_for(LISTENING).group(1)))
    run.wait_for(r"^iteration +2 ")
    return run


def reach_start(stack, *arguments):
    """While Ray is starting: its node is there, this process has not joined it."""
    run = stack.enter_context(training(*QUICK, *arguments))
    tick = threading.Event()
    deadline = time.monotonic() + START_S
    while not any("raylet" in name for name in run.children()):
        assert time.monotonic() < deadline
        tick.wait(0.05)
    return run


def reach_stuck(where):
    def reach(stack, *arguments):
        config = ("--config", f"tests.cli.stuck:{where}", "--checkpoint-every", "1")
        arguments = (*arguments, "--num-env-runners", "0")  # starts sooner
        run = stack.enter_context(training(*config, *arguments))
        stack.enter_context(simulators(run.wait_for(LISTENING).group(1)))
        run.wait_for(f"^stuck in {where}$")
        return run

    return reach


@pytest.mark.parametrize(
    ("reach", "number"),
    [
        pytest.param(reach_start, signal.SIGINT, id="starting-SIGINT"),
        pytest.param(reach_start, signal.SIGTERM, id="starting-SIGTERM"),
        # From here on both signals take the same way.
        pytest.param(reach_waiting, signal.SIGINT, id="waiting-SIGINT"),
        pytest.param(reach_waiting_alone, signal.SIGTERM, id="waiting-alone-SIGTERM"),
        pytest.param(reach_training, signal.SIGTERM, id="training-SIGTERM"),
        pytest.param(reach_stuck("learning"), signal.SIGINT, id="learning-SIGINT"),
        pytest.param(reach_stuck("checkpointing"), signal.SIGTERM, id="checkpointing-SIGTERM"),
    ],
)
def test_signal_ends_everything_in_five_seconds(tmp_path, reach, number):
    with contextlib.ExitStack() as stack:
        run = reach(stack, "--port", "0", "--checkpoint-dir", str(tmp_path))
        children = psutil.Process(run.process.pid).children(recursive=True)
        run.process.send_signal(number)
        code, elapsed_s = run.end(20)
        assert elapsed_s < 5
        assert code == 128 + number, "\n".join(run.lines)
        _, orphans = psutil.wait_procs(children, timeout=3)
        assert not orphans
    said = "\n".join(run.lines)
    assert f"stopped by {number.name}" in run.lines
    assert "SIGTERM received" not in said  # by Ray's own handler, which aborts
    assert "Traceback" not in said
    assert not list(tmp_path.glob(".writing-*"))
    assert (tmp_path / "latest").is_dir() == (reach is reach_training)


def step_for_ever(simulator):
    for step in itertools.count():
        simulator.step(1, step)


def test_a_learner_that_fails_is_told_in_one_line_and_simulators_are_released():
    with training("--config", "tests.cli.stuck:broken", "--port", "0") as run:
        with (
            Talker(run.wait_for(LISTENING).group(1)) as simulator,
            pytest.raises(grpc.RpcError) as ended,
        ):
            step_for_ever(simulator)
        code, _ = run.end(START_S)
    assert fault_in(ended.value).reason is Reason.DRAINING
    assert code == 1
    said = [line for line in run.lines if "no gradient" in line]
    assert len(said) == 1, "\n".join(run.lines)
    assert said[0].startswith(
        "policy-server: iteration 1 failed: ArithmeticError: no gradient today in update, "
    )
    assert re.search(r"tests/cli/stuck\.py:\d+ \(--debug shows more\)$", said[0])
    assert "Traceback" not in "\n".join(run.lines)


@pytest.mark.slow
def test_port_taken_between_the_check_and_the_binding_is_named(tmp_path):
    """The check before Ray's start is a courtesy; the binding itself decides."""
    script = """
import sys
from policy_server import cli
from policy_server.commands import training
training.check_port = lambda server: None
sys.exit(cli.main(sys.argv[1:]))
"""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        done = subprocess.run(
            [sys.executable, "-c", script, "train", *QUICK, "--port", port],
            capture_output=True,
            text=True,
            timeout=START_S,
            check=False,
            env={**os.environ, "RAY_DEDUP_LOGS": "0"},
        )
    assert done.returncode == 4
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"policy-server: cannot listen on 127.0.0.1:{port}")
