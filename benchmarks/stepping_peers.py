"""Whom the stepping direction is measured against, each in a process of its own.

*Unary*: a hand-written service for CartPole, as one writes it in an afternoon: Reset and Step, a
small message, gRPC's sync server with one worker. *remote-gym* 0.7.3, from PyPI, in a virtual
environment of its own with the same gRPC, for it pins an older Gymnasium and protobuf.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from concurrent import futures
from pathlib import Path
from typing import Any, Self

import grpc
import gymnasium as gym
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

REMOTE_GYM = "remote-gym==0.7.3"
_RESET, _STEP = "/benchmarks.CartPole/Reset", "/benchmarks.CartPole/Step"
_INSTALL_TIMEOUT_S = 900.0
_ANSWER_TIMEOUT_S = 60.0


def _messages() -> tuple[Any, Any]:
    """``Action { int64 action = 1; }`` and ``State``, without a .proto."""
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(
        name="benchmarks/cartpole.proto", package="benchmarks", syntax="proto3"
    )
    action = file.message_type.add(name="Action")
    state = file.message_type.add(name="State")
    fields = (
        (action, "action", kinds.TYPE_INT64, kinds.LABEL_OPTIONAL),
        (state, "observation", kinds.TYPE_FLOAT, kinds.LABEL_REPEATED),
        (state, "reward", kinds.TYPE_DOUBLE, kinds.LABEL_OPTIONAL),
        (state, "terminated", kinds.TYPE_BOOL, kinds.LABEL_OPTIONAL),
        (state, "truncated", kinds.TYPE_BOOL, kinds.LABEL_OPTIONAL),
    )
    for message, name, kind, label in fields:
        message.field.add(name=name, number=len(message.field) + 1, type=kind, label=label)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    found = message_factory.GetMessageClassesForFiles([file.name], pool)
    return found["benchmarks.Action"], found["benchmarks.State"]


Action, State = _messages()


class UnaryProcess(contextlib.AbstractContextManager["UnaryProcess"]):
    """The hand-written service."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.stepping_peers"], stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self.address = f"127.0.0.1:{self._process.stdout.readline().strip()}"

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.wait(10)


def _serve_unary() -> None:
    env = gym.make("CartPole-v1")

    def reset(request: Any, _context: Any) -> Any:
        observation, _ = env.reset(seed=request.action)
        return State(observation=observation)

    def step(request: Any, _context: Any) -> Any:
        observation, reward, terminated, truncated, _ = env.step(request.action)
        return State(
            observation=observation, reward=reward, terminated=terminated, truncated=truncated
        )

    server = grpc.server(futures.ThreadPoolExecutor(max_workers=1))
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(call, Action.FromString, State.SerializeToString)
        for name, call in (("Reset", reset), ("Step", step))
    }
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("benchmarks.CartPole", handlers),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(port, flush=True)
    server.wait_for_termination()


class UnaryEnv:
    """Its client, with as much of Gymnasium's face as the loop needs."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address)
        codecs = (Action.SerializeToString, State.FromString)
        self._reset = self._channel.unary_unary(_RESET, *codecs)
        self._step = self._channel.unary_unary(_STEP, *codecs)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._channel.close()

    def reset(self, seed: int) -> tuple[Any, dict[str, Any]]:
        """Begin an episode."""
        return np.array(self._reset(Action(action=seed)).observation, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """One step."""
        state = self._step(Action(action=int(action)))
        observation = np.array(state.observation, np.float32)
        return observation, state.reward, state.terminated, state.truncated, {}


def walk(env: Any, steps: int) -> float:
    """Steps per second of a loop as a trainer has it, resets included."""
    actions = np.random.default_rng(0).integers(2, size=steps + 50)
    env.reset(seed=0)
    start = 0.0
    for number, action in enumerate(actions):
        if number == 50:
            start = time.perf_counter()
        _, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            env.reset(seed=number)
    return steps / (time.perf_counter() - start)


_REMOTE_GYM_PROGRAM = """
import sys, time
import numpy as np
from remote_gym import RemoteEnvironment, create_remote_environment_server

def serve(port):
    # In threads: its processes are forked below a running gRPC server, and hang.
    server = create_remote_environment_server(
        default_args={"entrypoint": "entry.py"}, url="127.0.0.1", port=port, use_thread=True
    )
    print("ready", flush=True)
    sys.stdin.read()

def step(port):
    env = RemoteEnvironment(url="127.0.0.1", port=port)
    print("ready", flush=True)
    for line in sys.stdin:
        steps = int(line)
        actions = np.random.default_rng(0).integers(2, size=steps + 50)
        env.reset()
        for number, action in enumerate(actions):
            if number == 50:
                start = time.perf_counter()
            _, _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                env.reset()
        print(steps / (time.perf_counter() - start), flush=True)

if __name__ == "__main__":
    {"serve": serve, "step": step}[sys.argv[1]](int(sys.argv[2]))
"""

_REMOTE_GYM_ENTRY = """
import gymnasium

def create_environment(env_id=None, **kwargs):
    return gymnasium.make("CartPole-v1")
"""


class RemoteGym(contextlib.AbstractContextManager["RemoteGym"]):
    """remote-gym's server, and its client in another process."""

    def __init__(self, directory: Path, port: int) -> None:
        """Install it there, unless it is there already, and start it.

        Raises:
            OSError: It cannot be installed or does not start; the message says why.
        """
        python = _installed(directory.absolute())
        (directory / "program.py").write_text(_REMOTE_GYM_PROGRAM)
        (directory / "entry.py").write_text(_REMOTE_GYM_ENTRY)
        self._processes: list[subprocess.Popen[str]] = []
        try:
            for role in ("serve", "step"):
                process = subprocess.Popen(
                    [python, "program.py", role, str(port)],
                    cwd=directory,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                )
                self._processes.append(process)
                _line(process)
        except BaseException:
            self.__exit__()
            raise

    def walk(self, steps: int) -> float:
        """Steps per second, as the function of that name."""
        process = self._processes[-1]
        assert process.stdin is not None
        process.stdin.write(f"{steps}\n")
        process.stdin.flush()
        return float(_line(process))

    def __exit__(self, *exception: object) -> None:
        for process in self._processes:
            process.kill()
            process.communicate(timeout=10)


def _line(process: subprocess.Popen[str]) -> str:
    """The next one, in bounded time."""
    assert process.stdout is not None
    patience = threading.Timer(_ANSWER_TIMEOUT_S, process.kill)
    patience.start()
    try:
        line = process.stdout.readline()
    finally:
        patience.cancel()
    if not line:
        raise OSError("remote-gym gives no answer")
    return line.strip()


def _installed(directory: Path) -> Path:
    """The Python of its environment."""
    python = directory / "env/bin/python"
    done = directory / f"installed-grpcio-{grpc.__version__}"
    if done.exists():
        return python
    directory.mkdir(parents=True, exist_ok=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for command in (
        [sys.executable, "-m", "venv", "--clear", str(directory / "env")],
        [*pip, REMOTE_GYM, "gymnasium==0.29.1"],
        # It pins protobuf below 5, for which its own generated stubs are too new. Releases of gRPC
        # differ in speed: ours, for the comparison's sake.
        [*pip, "protobuf>=5.29", f"grpcio=={grpc.__version__}"],
    ):
        try:
            subprocess.run(
                command, check=True, capture_output=True, text=True, timeout=_INSTALL_TIMEOUT_S
            )
        except subprocess.SubprocessError as error:
            said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
            raise OSError(f"{REMOTE_GYM} cannot be installed: {said[-1]}") from error
    done.touch()
    return python


class Images(gym.Env[Any, Any]):
    """Four stacked frames of 84x84, as Atari agents see them; drawn beforehand."""

    observation_space = gym.spaces.Box(0, 255, (84, 84, 4), np.uint8)
    action_space = gym.spaces.Discrete(6)

    def __init__(self) -> None:
        self._frames = np.random.default_rng(0).integers(0, 256, (16, 84, 84, 4), np.uint8)
        self._next = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin."""
        super().reset(seed=seed, options=options)
        return self._frames[0], {}

    def step(self, _action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """The next one."""
        self._next = (self._next + 1) % 16
        return self._frames[self._next], 0.0, False, False, {}


if __name__ == "__main__":
    _serve_unary()
