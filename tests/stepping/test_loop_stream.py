"""Stepping from wherever a program steps: in event loops, in threads, beside a fork."""

import asyncio
import random
import signal
import subprocess
import sys
import textwrap
import threading

import pytest

from client_sdk import RemoteEnv, RemoteVectorEnv
from client_sdk.call_errors import Disconnected, Overdue
from client_sdk.config import Address
from client_sdk.endpoint import Endpoint
from client_sdk.env_connection import EnvConnection
from client_sdk.errors import EnvironmentLostError
from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.batches import SpaceCodec
from tests.stepping.support import (
    PATIENCE_S,
    HostProcess,
    Script,
    Scripted,
    hosting,
    wait_for,
)


@pytest.fixture(scope="module")
def cartpole():
    """The address of a host in a process of its own."""
    with HostProcess("CartPole-v1", "--port", "0") as host:
        yield host.address


class Gate:
    """Holds an environment inside its step until the test lets it go on."""

    def __init__(self):
        self.entered = threading.Event()
        self.release = threading.Event()

    def __call__(self):
        self.entered.set()
        assert self.release.wait(PATIENCE_S)


def run_python(code, *arguments):
    """What it prints; nothing else may it say."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE_S,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def walk(env, steps=20):
    env.reset(seed=1)
    for number in range(steps):
        if any(env.step(number % 2)[2:4]):
            env.reset()


# -- event loops


def test_an_environment_made_outside_an_event_loop_is_stepped_inside_one(cartpole):
    async def use():
        walk(env)
        env.reset(seed=1)
        return env.step(0)

    with RemoteEnv(cartpole) as env:
        env.reset(seed=1)
        outside = env.step(0)
        inside = asyncio.run(use())
        walk(env)
    assert inside[0].tolist() == outside[0].tolist()


def test_an_environment_made_inside_an_event_loop_is_stepped_there_and_outside(cartpole):
    async def make():
        env = RemoteEnv(cartpole)
        walk(env)
        return env

    with asyncio.run(make()) as env:
        walk(env)


def test_an_environment_is_closed_or_forgotten_inside_an_event_loop():
    async def close(env):
        env.close()

    async def forget(holder):
        with pytest.warns(ResourceWarning, match="was never closed"):
            holder.clear()

    with hosting("CartPole-v1") as host:
        env, holder = RemoteEnv(host.address), [RemoteEnv(host.address)]
        walk(env)
        walk(holder[0])
        asyncio.run(close(env))
        asyncio.run(forget(holder))
        wait_for(lambda: host.open_envs == 0)


def test_a_step_that_takes_too_long_inside_an_event_loop_is_given_up():
    gate = Gate()

    async def step():
        with pytest.raises(EnvironmentLostError, match=r"within step_timeout=0\.3 s"):
            env.step(0)
        gate.release.set()
        env.reset()
        assert env.step(0)[1] == 1.0

    with hosting(Script(step=gate).make) as host, RemoteEnv(host.address, step_timeout=0.3) as env:
        env.reset()
        asyncio.run(step())


# -- threads


def test_an_environment_made_in_one_thread_is_stepped_and_closed_in_others(cartpole):
    env = RemoteEnv(cartpole)
    for work in (lambda: walk(env), lambda: walk(env), env.close):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def test_environments_take_turns_in_one_thread(cartpole):
    with (
        RemoteEnv(cartpole) as one,
        RemoteEnv(cartpole) as other,
        RemoteVectorEnv(cartpole, num_envs=2) as many,
    ):
        for env in (one, other, many):
            env.reset(seed=1)
        for _ in range(5):
            first, second = one.step(1)[0], other.step(1)[0]
            assert first.tolist() == second.tolist() == many.step([1, 0])[0][0].tolist()


def test_environments_are_stepped_in_several_threads_at_once_and_nothing_is_logged(
    cartpole, caplog
):
    finished = []

    def work():
        with RemoteEnv(cartpole) as env:
            walk(env, 100)
        finished.append(True)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert len(finished) == len(threads)
    assert caplog.records == []


def test_closing_while_another_thread_steps_releases_it():
    gate, errors = Gate(), []

    def step():
        try:
            env.step(0)
        except EnvironmentLostError as error:
            errors.append(error)

    with hosting(Script(step=gate).make) as host:
        env = RemoteEnv(host.address)
        env.reset()
        stepping = threading.Thread(target=step)
        stepping.start()
        assert gate.entered.wait(PATIENCE_S)
        env.close()
        stepping.join(PATIENCE_S)
        gate.release.set()
        assert len(errors) == 1


# -- time


def test_a_trainer_may_think_for_longer_than_a_step_may_take():
    script = Script()
    with hosting(script.make) as host, RemoteEnv(host.address, step_timeout=0.2) as env:
        env.reset()
        threading.Event().wait(0.5)
        env.step(0)
        threading.Event().wait(0.5)
    assert script.count("make") == 1


def test_a_later_message_may_have_less_time_than_the_one_before():
    gate = Gate()
    with hosting(Script(step=gate).make) as host:
        connection = EnvConnection(Endpoint(Address.parse(host.address)))
        made = connection.make(pb.MakeRequest(protocol_version="1.0"), PATIENCE_S)
        stream = connection.drive_in_turns(PATIENCE_S)
        reset = pb.ResetRequest(env_handle=made.env_handle)
        stream.send(pb.DriveRequest(reset=reset).SerializeToString())
        assert pb.DriveResponse.FromString(stream.receive(PATIENCE_S)).HasField("reset")
        step = pb.StepRequest(env_handle=made.env_handle)
        codec = SpaceCodec(Scripted.action_space)
        codec.encode(codec.columns_of(0), step.actions)
        stream.send(pb.DriveRequest(step=step).SerializeToString())
        with pytest.raises(Overdue):
            stream.receive(0.2)
        gate.release.set()
        stream.close()
        stream.close()
        with pytest.raises(Disconnected, match="closed"):
            stream.receive(PATIENCE_S)
        connection.disconnect()


# -- what is left


def test_closed_environments_leave_no_threads_and_no_open_files(cartpole):
    out = run_python(
        """
        import os, sys, threading, time
        from client_sdk import RemoteEnv

        def held():
            return len(os.listdir("/proc/self/fd")), threading.active_count()

        before = held()
        for _ in range(5):
            with RemoteEnv(sys.argv[1]) as env:
                env.reset()
                env.step(0)
        until = time.monotonic() + 10.0
        while held() != before and time.monotonic() < until:
            threading.Event().wait(0.01)  # gRPC closes its sockets in its own time
        print(held() == before)
        """,
        cartpole,
    )
    assert out == "True\n"


def test_a_program_that_never_closes_its_environment_ends_in_silence(cartpole):
    code = """
        import sys
        from client_sdk import RemoteEnv
        env = RemoteEnv(sys.argv[1])
        env.reset()
        env.step(0)
    """
    assert run_python(code, cartpole) == ""


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_an_interrupt_rises_once_and_reset_makes_another_environment(where):
    gate = Gate()
    script = Script()
    script.then["step"] = lambda: gate() if not gate.release.is_set() else None
    code = """
        import asyncio, sys
        from client_sdk import RemoteEnv

        def step():
            try:
                env.step(0)
            except KeyboardInterrupt:
                print("interrupted", flush=True)
                sys.stdin.readline()
                env.reset()
                print(env.step(0)[1])

        async def cell():
            step()

        with RemoteEnv(sys.argv[1]) as env:
            env.reset()
            if sys.argv[2] == "outside":
                step()
            else:  # as a notebook does; asyncio.run would take the interrupt for itself
                loop = asyncio.new_event_loop()
                loop.run_until_complete(cell())
                loop.close()
    """
    with hosting(script.make) as host:
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), host.address, where],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert gate.entered.wait(PATIENCE_S)
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == "interrupted\n"
            gate.release.set()
            out, err = process.communicate("go on\n", timeout=PATIENCE_S)
            assert (out, err) == ("1.0\n", "")
        finally:
            gate.release.set()
            process.kill()
            process.communicate(timeout=PATIENCE_S)


def test_interrupts_at_full_speed_rise_one_by_one(cartpole):
    code = """
        import sys
        from client_sdk import RemoteEnv

        with RemoteEnv(sys.argv[1]) as env:
            for _ in range(int(sys.argv[2])):
                try:
                    env.reset()
                    print("stepping", flush=True)
                    while True:
                        if any(env.step(0)[2:4]):
                            env.reset()
                except KeyboardInterrupt:
                    pass
    """
    times, jitter = 60, random.Random(0)
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), cartpole, str(times)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for _ in range(times):
            assert process.stdout.readline() == "stepping\n"
            threading.Event().wait(jitter.uniform(0.0, 0.005))  # in the midst of whatever
            process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=PATIENCE_S) == ("", "")
    finally:
        process.kill()
        process.communicate(timeout=PATIENCE_S)


def test_a_fork_that_ends_leaves_the_environment_of_its_parent_alone(cartpole):
    out = run_python(
        """
        import gc, os, sys
        from client_sdk import RemoteEnv

        env = RemoteEnv(sys.argv[1])
        env.reset()
        child = os.fork()
        if not child:
            del env
            gc.collect()
            sys.exit()
        assert os.waitpid(child, 0)[1] == 0
        print(env.step(0)[1])
        env.close()
        """,
        cartpole,
    )
    assert out == "1.0\n"
