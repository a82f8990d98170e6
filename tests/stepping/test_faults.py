"""What goes wrong while environments are stepped, and what is left afterwards."""

import copy
import os
import pickle
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time

import gymnasium as gym
import numpy as np
import pytest

from client_sdk import RemoteEnv, RemoteVectorEnv
from client_sdk.config import Address
from client_sdk.endpoint import Endpoint
from client_sdk.env_connection import EnvConnection
from client_sdk.env_server import EnvServer, EnvServerConfig
from client_sdk.errors import (
    ClosedClientError,
    ConcurrentUseError,
    ConnectRefused,
    ConnectTimeout,
    EnvironmentFailedError,
    EnvironmentLostError,
    SpaceMismatchError,
    UnknownEnvironmentError,
)
from client_sdk.wire import policyserver_pb2 as pb
from tests.client.support import Relay
from tests.stepping.support import (
    PATIENCE_S,
    HostProcess,
    Mixed,
    Script,
    hosting,
    raises,
    wait_for,
)


def unused_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


class Gate:
    """Holds an environment inside a call until the test lets it go on."""

    def __init__(self):
        self.entered = threading.Event()
        self.release = threading.Event()

    def __call__(self):
        self.entered.set()
        assert self.release.wait(PATIENCE_S)


# -- the environment raises


@pytest.mark.parametrize("what", ["reset", "step", "render"])
@pytest.mark.parametrize("error", [ValueError("out of fuel"), SystemExit("out of fuel")])
def test_an_environment_that_raises_is_closed_and_the_others_are_not(what, error):
    script = Script()
    with (
        hosting(script.make) as host,
        RemoteEnv(host.address) as other,
        RemoteEnv(host.address, render_mode="rgb_array") as env,
    ):
        other.reset()
        env.reset()
        script.then[what] = raises(error)
        call = {"reset": env.reset, "step": lambda: env.step(0), "render": env.render}[what]
        says = f"failed in {what}: {type(error).__name__}: out of fuel"
        with pytest.raises(EnvironmentFailedError, match=says):
            call()
        wait_for(lambda: script.count("close") == 1)
        assert host.open_envs == 1
        del script.then[what]
        other.step(0)
        with pytest.raises(EnvironmentLostError, match="has closed it"):
            env.step(0)
        env.reset()
        assert env.step(0)[1] == 1.0
        assert script.count("make") == 3


class Speechless(Exception):
    def __str__(self):
        raise RuntimeError("no words")


@pytest.mark.parametrize("what", ["make", "step", "render"])
@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ValueError("long" * 10_000), r"longlong.* \.\.\. \(the host's log has all of it\)"),
        (ValueError("漢字" * 10_000), r"漢字漢字.* \.\.\. \(the host's log has all of it\)"),
        (ValueError("file \udce4.txt"), r"file \\udce4\.txt"),
        (Speechless(), r"\(it cannot say"),
    ],
    ids=["long", "long and foreign", "no UTF-8", "speechless"],
)
def test_whatever_an_environment_says_arrives_as_its_failure(what, error, says, caplog):
    def use(address):
        with RemoteEnv(address, render_mode="rgb_array") as env:
            env.reset()
            env.step(0)
            env.render()

    with hosting(Script(**{what: raises(error)}).make) as host:
        with pytest.raises(EnvironmentFailedError, match=rf"failed in {what}: \w+: {says}"):
            use(host.address)
        assert host.open_envs == 0
        assert f"failed in {what}" in caplog.text


def test_an_environment_that_cannot_be_made_says_why_and_counts_for_nothing():
    script = Script(make=raises(RuntimeError("no licence")))
    with hosting(script.make) as host:
        for _ in range(3):
            with pytest.raises(
                EnvironmentFailedError, match="failed in make: RuntimeError: no lic"
            ):
                RemoteEnv(host.address)
        assert host.open_envs == 0


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (None, "expected a gymnasium.Env, got NoneType"),
        (gym.Env(), "expected a gymnasium.Space as observation_space, got NoneType"),
    ],
)
def test_what_is_no_environment_is_told_to_whoever_wants_one(made, says):
    with (
        hosting(lambda: made) as host,
        pytest.raises(EnvironmentFailedError, match=f"failed in make: TypeError: {says}"),
    ):
        RemoteEnv(host.address)


def test_when_one_of_many_cannot_be_made_the_others_are_closed():
    script = Script()
    script.then["make"] = lambda: raises(RuntimeError("full"))() if script.count("make") > 2 else 0
    with hosting(script.make) as host, pytest.raises(EnvironmentFailedError, match="full"):
        RemoteVectorEnv(host.address, num_envs=4)
    assert script.count("close") == 2


def test_when_one_of_many_raises_all_of_them_are_closed_and_nobody_elses():
    script = Script()
    with (
        hosting(script.make) as host,
        RemoteEnv(host.address) as other,
        RemoteVectorEnv(host.address, num_envs=3) as envs,
    ):
        other.reset()
        envs.reset()
        script.then["step"] = lambda: (
            raises(ValueError("fell"))() if script.count("step") > 1 else 0
        )
        with pytest.raises(
            EnvironmentFailedError, match="environment 1 failed in step: ValueError: fell"
        ):
            envs.step([0, 0, 0])
        wait_for(lambda: script.count("close") == 3)
        del script.then["step"]
        with pytest.raises(EnvironmentLostError, match="has closed it"):
            envs.step([0, 0, 0])
        other.step(0)
        envs.reset()
        assert envs.step([0, 0, 0])[1].tolist() == [1.0] * 3


def test_an_environment_that_raises_in_close_is_gone_all_the_same():
    script = Script(close=raises(RuntimeError("stuck")))
    with hosting(script.make) as host:
        RemoteEnv(host.address).close()
        wait_for(lambda: host.open_envs == 0 and script.count("close") == 1)


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        ((np.zeros(3, np.float32), 0.0, False, False, {}), r"expected \[2\], got \[3\]"),
        ((np.zeros(2, np.float32), 0.0, False, {}), "values to unpack"),
        ((np.zeros(2, np.float32), "much", False, False, {}), "could not convert"),
        ((np.zeros(2, np.float32), 0.0, False, False, 7), "a dict as info"),
        ((None, 0.0, False, False, {}), "got None"),
    ],
)
def test_what_breaks_the_promises_of_an_environment_is_its_failure(returned, says):
    script = Script(step=lambda: returned)
    with hosting(script.make) as host, RemoteEnv(host.address) as env:
        env.reset()
        with pytest.raises(EnvironmentFailedError, match=says):
            env.step(0)


def test_what_cannot_be_sent_is_left_out_of_info_and_said_so_once(caplog):
    info = {
        "array": np.arange(3),
        "deep": {"number": np.float32(0.5), "none": None, "flag": np.bool_(True)},
        "text": "hello",
        "object": object(),
        "inside": [1, object()],
        "beyond": 10**400,
        3: "a number as key",
    }
    script = Script(reset=lambda: info)
    with hosting(script.make) as host, RemoteEnv(host.address) as env:
        for _ in range(3):
            assert env.reset()[1] == {
                "array": [0.0, 1.0, 2.0],
                "deep": {"number": 0.5, "none": None, "flag": True},
                "text": "hello",
            }
    said = [record.getMessage() for record in caplog.records if "left out" in record.message]
    assert len(said) == 4
    for word in ("'object'", "'inside'[1]", "'beyond'", "got 3"):
        assert any(word in line for line in said)


# -- the host, or the way to it, fails


def test_a_host_that_is_not_up_yet_is_waited_for():
    port = unused_port()
    hosts = []

    def start():
        threading.Event().wait(0.7)
        hosts.append(HostProcess("CartPole-v1", "--port", str(port)))

    thread = threading.Thread(target=start)
    thread.start()
    try:
        with RemoteEnv(f"127.0.0.1:{port}") as env:
            env.reset()
    finally:
        thread.join()
        for host in hosts:
            host.__exit__()


def test_nobody_there_is_said_so_in_time():
    start = time.monotonic()
    with pytest.raises(ConnectRefused, match="Is the host of environments running"):
        RemoteEnv(f"127.0.0.1:{unused_port()}", connect_timeout=1.0)
    assert time.monotonic() - start < 5.0


def test_a_host_killed_in_the_middle_of_a_step_loses_that_episode_and_its_successor_has_the_next():
    code = "tests.stepping.hosts:sleepy"
    with HostProcess(code, "--port", "0") as host, RemoteEnv(host.address) as env:
        env.reset(seed=1)
        killer = threading.Timer(0.3, host.process.kill)
        killer.start()
        with pytest.raises(EnvironmentLostError, match=r"is lost.*reset\(\) begins the next"):
            env.step(0)
        with pytest.raises(EnvironmentLostError, match="is lost"):
            env.step(0)
        killer.join()
        host.process.wait(PATIENCE_S)
        port = host.address.rpartition(":")[2]
        with HostProcess("CartPole-v1", "--port", port) as successor:
            assert successor.address == host.address
            env.reset(seed=1)
            assert env.step(0)[1] == 1.0


def test_a_host_restarted_between_two_episodes_is_not_noticed():
    script, port = Script(), unused_port()
    with hosting(script.make, port=port) as host:
        env = RemoteEnv(host.address)
        env.reset()
        env.step(2)
    with env, hosting(script.make, port=port):
        env.reset()
        env.step(1)
        assert script.count("make") == 2


def test_a_host_restarted_with_other_spaces_is_refused_and_keeps_no_environment():
    port = unused_port()
    with hosting("CartPole-v1", port=port) as host:
        env = RemoteEnv(host.address)
    with env, hosting(Mixed, port=port) as other:
        with pytest.raises(SpaceMismatchError, match="restarted"):
            env.reset()
        wait_for(lambda: other.open_envs == 0)


def test_a_connection_that_breaks_loses_the_episode_and_not_the_environment_object():
    script = Script()
    with (
        hosting(script.make) as host,
        Relay(host.address) as relay,
        RemoteEnv(relay.address) as env,
    ):
        env.reset()
        relay.cut()
        with pytest.raises(EnvironmentLostError, match="connection to the host"):
            env.step(0)
        wait_for(lambda: script.count("close") == 1, 1.0)
        env.reset()
        env.step(0)


def test_a_step_that_takes_too_long_is_given_up_and_reset_makes_another_environment():
    gate = Gate()
    script = Script(step=gate)
    with hosting(script.make) as host, RemoteEnv(host.address, step_timeout=0.3) as env:
        env.reset()
        with pytest.raises(EnvironmentLostError, match=r"within step_timeout=0\.3 s"):
            env.step(0)
        gate.release.set()
        env.reset()
        assert env.step(0)[0].tolist() == [1, 1]
        assert script.count("make") == 2


def test_the_time_for_a_step_is_for_each_of_them_and_not_for_all():
    script = Script(step=lambda: threading.Event().wait(0.4))
    with hosting(script.make) as host, RemoteEnv(host.address, step_timeout=1.5) as env:
        env.reset()
        for number in range(1, 6):
            assert env.step(0)[0].tolist() == [number, number]
        threading.Event().wait(2.0)  # nothing is asked for meanwhile
        assert env.step(0)[0].tolist() == [6, 6]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files by /proc")
def test_nothing_is_left_of_a_connection_however_it_ends():
    def left():
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    gate = Gate()
    script = Script(step=gate)
    with hosting(script.make) as host:
        with RemoteEnv(host.address) as env:
            env.reset()
        wait_for(lambda: host.open_envs == 0)
        files, threads = left()
        for _ in range(5):
            with RemoteEnv(host.address, step_timeout=0.5) as env:
                env.reset()
                with pytest.raises(EnvironmentLostError, match="step_timeout"):
                    env.step(0)
            gate.release.set()
            wait_for(lambda: host.open_envs == 0)
            gate.release.clear()
        # The host's pool keeps the threads that it needed once.
        wait_for(lambda: left()[0] <= files and left()[1] <= threads + 4)


def test_an_interrupted_step_does_not_answer_the_next_call():
    code = """
        import signal, sys, threading, os
        from client_sdk import RemoteEnv
        from client_sdk.errors import EnvironmentLostError

        with RemoteEnv(sys.argv[1]) as env:
            env.reset()
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
            try:
                env.step(0)
            except KeyboardInterrupt:
                print("interrupted")
            try:
                env.step(0)
            except EnvironmentLostError as error:
                print(error)
            env.reset()
            print(env.step(0)[1])
    """
    gate = Gate()
    script = Script()
    script.then["step"] = lambda: gate() if not gate.release.is_set() else None
    with hosting(script.make) as host:
        process = start_python(code, host.address)
        try:
            assert gate.entered.wait(PATIENCE_S)
            assert process.stdout.readline() == "interrupted\n"
            assert "given up (KeyboardInterrupt)" in process.stdout.readline()
            gate.release.set()
            assert process.stdout.readline() == "1.0\n"
        finally:
            gate.release.set()
            end(process)


# -- clients come and go


def start_python(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process):
    process.kill()
    return process.communicate(timeout=PATIENCE_S)


CLIENT = """
    import sys, time
    from client_sdk import RemoteEnv
    env = RemoteEnv(sys.argv[1])
    if sys.argv[2] == "reset":
        env.reset()
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("after", ["make", "reset"])
def test_a_client_that_is_killed_leaves_no_environment_behind(after):
    script = Script()
    with hosting(script.make) as host:
        process = start_python(CLIENT, host.address, after)
        try:
            assert process.stdout.readline() == "ready\n"
            assert host.open_envs == 1
            process.send_signal(signal.SIGKILL)
            wait_for(lambda: script.count("close") == 1 and host.open_envs == 0, 1.0)
        finally:
            end(process)


def test_environments_whose_client_did_not_wait_for_them_are_closed_once_made():
    gate = Gate()
    script = Script(make=gate)
    with hosting(script.make, max_envs=1) as host:
        with pytest.raises(ConnectTimeout, match=r"did not make the environment within 0\.\d+ s"):
            RemoteEnv(host.address, connect_timeout=0.5)
        assert gate.entered.is_set()
        gate.release.set()
        wait_for(lambda: script.count("close") == 1 and host.open_envs == 0)
        with RemoteEnv(host.address) as env:
            env.reset()


def test_environments_of_which_nothing_is_heard_are_closed_after_a_lease():
    script = Script()
    with hosting(script.make, lease_s=0.3) as host:
        connection = EnvConnection(Endpoint(Address.parse(host.address)))
        made = connection.make(pb.MakeRequest(protocol_version="1.0"), PATIENCE_S)
        assert made.lease.ToMilliseconds() == 300
        wait_for(lambda: script.count("close") == 1)
        with pytest.raises(UnknownEnvironmentError, match="lease"):
            connection.reset(pb.ResetRequest(env_handle=made.env_handle), PATIENCE_S)
        connection.disconnect()


def test_a_trainer_that_thinks_for_longer_than_the_lease_keeps_its_environment():
    script = Script()
    with hosting(script.make, lease_s=0.2) as host, RemoteEnv(host.address) as env:
        env.reset()
        threading.Event().wait(1.0)
        env.step(0)
        assert script.count("make") == 1


def test_two_clients_have_environments_of_their_own():
    with hosting("CartPole-v1") as host, RemoteEnv(host.address) as a, RemoteEnv(host.address) as b:
        first, _ = a.reset(seed=1)
        b.reset(seed=2)
        for _ in range(5):
            b.step(1)
        again, _ = b.reset(seed=1)
        assert first.tolist() == again.tolist()
        a.step(0)


def test_an_environment_lives_in_one_thread_of_its_own():
    script, other = Script(), Script()
    with hosting(script.make) as host, hosting(other.make) as second:
        with (
            RemoteEnv(host.address, render_mode="rgb_array") as env,
            RemoteEnv(second.address) as neighbour,
        ):
            env.reset()
            env.step(0)
            env.render()
            neighbour.reset()
        wait_for(lambda: script.count("close") == 1)
    assert len({thread for _, thread in script.did}) == 1
    assert {thread for _, thread in script.did} != {thread for _, thread in other.did}


def test_a_slow_environment_does_not_hold_up_another():
    gate = Gate()
    script = Script()
    script.then["step"] = lambda: gate() if not gate.entered.is_set() else None
    with hosting(script.make) as host, RemoteEnv(host.address) as a, RemoteEnv(host.address) as b:
        a.reset()
        b.reset()
        slow = threading.Thread(target=a.step, args=(0,))
        slow.start()
        assert gate.entered.wait(PATIENCE_S)
        for _ in range(5):
            b.step(0)
        gate.release.set()
        slow.join(PATIENCE_S)
        assert not slow.is_alive()


def test_observations_of_20_megabytes_pass():
    with hosting("tests.stepping.hosts:big") as host, RemoteEnv(host.address) as env:
        observation, _ = env.reset()
        assert observation["camera"].nbytes + observation["depth"].nbytes > 20e6
        observation = env.step({"paint": np.full((1024, 1024, 3), 7, np.uint8)})[0]
        assert observation["camera"][5, 6, 2] == 7


# -- the object


def test_a_second_thread_is_told_that_it_must_not():
    gate = Gate()
    with hosting(Script(step=gate).make) as host, RemoteEnv(host.address) as env:
        env.reset()
        stepping = threading.Thread(target=env.step, args=(0,))
        stepping.start()
        assert gate.entered.wait(PATIENCE_S)
        with pytest.raises(ConcurrentUseError, match="RemoteEnv, which is not thread-safe"):
            env.step(0)
        gate.release.set()
        stepping.join(PATIENCE_S)


def test_an_environment_is_of_no_use_in_a_fork_and_says_so():
    code = """
        import os, sys
        from client_sdk import RemoteEnv
        from client_sdk.errors import ForkedClientError

        env = RemoteEnv(sys.argv[1])
        env.reset()
        child = os.fork()
        if child == 0:
            try:
                env.step(0)
            except ForkedClientError as error:
                print(error, flush=True)
            env.close()
            os._exit(0)
        os.waitpid(child, 0)
        print(env.step(0)[1])
        env.close()
    """
    with hosting("CartPole-v1") as host:
        process = start_python(code, host.address)
        out, err = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, err
    assert "make a new RemoteEnv in this one" in out
    assert out.endswith("1.0\n")


@pytest.mark.parametrize("kind", [RemoteEnv, RemoteVectorEnv])
def test_closing_is_idempotent_and_final(kind):
    many = {"num_envs": 2} if kind is RemoteVectorEnv else {}
    with hosting("CartPole-v1") as host:
        env = kind(host.address, **many)
        env.reset()
        env.close()
        assert host.open_envs == 0
        env.close()
        with pytest.raises(ClosedClientError, match=f"this {kind.__name__} is closed"):
            env.reset()


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_an_environment_cannot_be_copied_and_says_so(duplicate):
    with hosting("CartPole-v1") as host, RemoteEnv(host.address) as env:
        with pytest.raises(TypeError, match="a RemoteEnv cannot be copied or pickled"):
            duplicate(env)
        env.reset()


@pytest.mark.parametrize("kind", [RemoteEnv, RemoteVectorEnv])
def test_an_environment_that_is_forgotten_warns_and_is_closed_on_the_host(kind):
    many = {"num_envs": 2} if kind is RemoteVectorEnv else {}
    with hosting("CartPole-v1") as host:
        env = kind(host.address, **many)
        env.reset()
        holder = [env]
        del env
        with pytest.warns(ResourceWarning, match="was never closed"):
            holder.clear()
        wait_for(lambda: host.open_envs == 0)


def test_a_host_is_started_once():
    server = EnvServer("CartPole-v1", EnvServerConfig(port=0))
    server.start()
    with pytest.raises(RuntimeError, match="make another"):
        server.start()
    server.stop()
    server.stop()
    with pytest.raises(RuntimeError, match="make another"), server:
        pass


def test_stopping_a_host_waits_for_its_environments_to_close():
    closed = threading.Event()

    def slowly():
        threading.Event().wait(0.5)
        closed.set()

    with hosting(Script(close=slowly).make) as host, RemoteEnv(host.address) as env:
        env.reset()
        host.stop()
        assert closed.is_set()


def test_stopping_a_host_releases_its_clients_even_if_an_environment_hangs():
    gate = Gate()
    errors = []
    with hosting(Script(step=gate).make) as host:
        env = RemoteEnv(host.address)
        env.reset()

        def step():
            try:
                env.step(0)
            except EnvironmentLostError as error:
                errors.append(error)

        stepping = threading.Thread(target=step)
        stepping.start()
        assert gate.entered.wait(PATIENCE_S)
        start = time.monotonic()
        host.stop()
        assert time.monotonic() - start < 5.0
        stepping.join(PATIENCE_S)
        assert len(errors) == 1
    gate.release.set()
    env.close()
