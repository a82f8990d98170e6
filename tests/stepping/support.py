"""Environments made for testing, hosts in this process and in others, and ways to wait."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from client_sdk.env_server import EnvServer, EnvServerConfig

PATIENCE_S = 20.0
COMMAND = [sys.executable, "-m", "client_sdk.cli", "host"]


@contextlib.contextmanager
def hosting(
    env: Any = "CartPole-v1", *, kwargs: Any = None, **settings: Any
) -> Iterator[EnvServer]:
    """A host on a free port of this process, stopped at the end."""
    with EnvServer(env, EnvServerConfig(**{"port": 0, **settings}), kwargs=kwargs) as server:
        yield server


def wait_for(condition: Callable[[], bool], within_s: float = PATIENCE_S) -> None:
    """Until it holds."""
    until = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until, "it did not come about in time"
        threading.Event().wait(0.01)


class HostProcess:
    """``policy-client host`` as a person starts it.

    Attributes:
        line: What it printed first.
        address: From that line.
    """

    def __init__(self, *arguments: str, under: Sequence[str] = ()) -> None:
        self.process = subprocess.Popen(
            [*under, *COMMAND, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.line = self.process.stdout.readline().strip()
        self.address = self.line.rpartition(" ")[2]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.communicate(timeout=PATIENCE_S)


class Mixed(gym.Env):
    """Every kind of space at once; what it shows follows from its seed and its actions."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}  # noqa: RUF012 - as gymnasium has it
    observation_space = spaces.Dict(
        {
            "bits": spaces.MultiBinary(5),
            "counts": spaces.MultiDiscrete([3, 4, 5], start=[0, -1, 2]),
            "gear": spaces.Discrete(6, start=-1),
            "image": spaces.Box(0, 255, (4, 5, 3), np.uint8),
            "pair": spaces.Tuple((spaces.Box(-1.0, 1.0, (2,), np.float64), spaces.Discrete(3))),
            "word": spaces.Text(8, min_length=0),
        }
    )
    action_space = spaces.Dict(
        {
            "keys": spaces.MultiBinary(3),
            "push": spaces.Box(-1.0, 1.0, (2,), np.float32),
            "say": spaces.Text(4, min_length=1),
        }
    )

    def __init__(self, level: int = 0, render_mode: str | None = None) -> None:
        self.level = level
        self.render_mode = render_mode
        self._steps = 0

    def _observe(self) -> tuple[Any, dict[str, Any]]:
        self.observation_space.seed(int(self.np_random.integers(2**31)))
        return self.observation_space.sample(), {"steps": self._steps, "level": self.level}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self._steps = (options or {}).get("from", 0)
        return self._observe()

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action), action
        self._steps += 1
        observation, info = self._observe()
        reward = float(np.sum(action["push"], dtype=np.float64)) / 3 + len(action["say"])
        return observation, reward, self._steps % 7 == 0, self._steps % 5 == 0, info

    def render(self) -> Any:
        return np.full((6, 8, 3), self._steps, np.uint8)


class Scripted(gym.Env):
    """Does what a test wants done, and remembers what became of it.

    Made by ``Script.make``; the script is what the test holds.
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012 - as gymnasium has it
    observation_space = spaces.Box(-10.0, 10.0, (2,), np.float32)
    action_space = spaces.Discrete(3)

    def __init__(self, script: Script, render_mode: str | None = None) -> None:
        self._script = script
        self.render_mode = render_mode
        self._step = 0
        script.note("make")

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self._step = 0
        self._script.options.append(options)
        info = self._script.note("reset") or {}
        return np.zeros(2, np.float32), info

    def step(self, action: Any) -> Any:
        self._step += 1
        outcome = self._script.note("step")
        if isinstance(outcome, tuple):
            return outcome
        ended = action == 2
        return np.full(2, self._step, np.float32), 1.0, ended, False, outcome or {}

    def render(self) -> Any:
        frame = self._script.note("render")
        return np.full((4, 6, 3), self._step % 256, np.uint8) if frame is None else frame

    def close(self) -> None:
        self._script.note("close")


class Script:
    """What the environments of one test do, and did.

    Attributes:
        did: Every call, in order, with the thread that made it.
        then: What a call of that name does: returns something else, or raises.
        options: Of every reset.
    """

    def __init__(self, **then: Callable[[], Any]) -> None:
        self.did: list[tuple[str, int]] = []
        self.then = then
        self.options: list[Any] = []

    def make(self, **kwargs: Any) -> Scripted:
        return Scripted(self, **kwargs)

    def note(self, what: str) -> Any:
        self.did.append((what, threading.get_ident()))
        return self.then[what]() if what in self.then else None

    def count(self, what: str) -> int:
        return [each for each, _ in self.did].count(what)


def raises(error: BaseException) -> Callable[[], Any]:
    """What raises that."""

    def run() -> Any:
        raise error

    return run
