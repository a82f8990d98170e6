"""``RemoteEnvCreator``: environments in a process beside each env runner, for RLlib to step.

A host process belongs to the process that started it, is shared by all of its environments, and
ends with the last of them. Any thread, one at a time; not usable after a fork.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import logging
import os
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from client_sdk import RemoteEnv, RemoteVectorEnv
from client_sdk.credentials import TOKEN_VARIABLE

logger = logging.getLogger(__name__)

_TAIL_LINES = 15
_STOP_S = 5.0
_LOOK_EVERY_S = 0.02
_NO_LIMIT = str(2**20)
"""Of environments: whoever asks for too many here, asks for them of themselves."""
_DYING_S = 0.5
"""A process that dies closes its connections before it is seen to be gone."""
_NUM_ENVS = "num_envs"
"""What RLlib adds to the ``env_config`` where it wants a vector environment."""


class HostError(RuntimeError):
    """A host process did not start; the message has the end of what it said."""


@dataclasses.dataclass(frozen=True)
class RemoteEnvCreator:
    """Makes an environment in a process of its own, which RLlib steps.

    ::

        tune.register_env("remote-cartpole", RemoteEnvCreator("CartPole-v1"))
        config.environment("remote-cartpole").env_runners(
            num_env_runners=2, num_envs_per_env_runner=8,
            gym_env_vectorize_mode="vector_entry_point",  # one message per step for all eight
        )

    Each env runner starts one host (``policy-client host``) for all of its environments. It ends
    with them, and with the runner, whichever way that ends. Where it dies, the next ``reset``
    starts another; for RLlib to get that far in the middle of an episode, set
    ``fault_tolerance(restart_failed_sub_environments=True)``.

    Picklable; calling it raises HostError where no host starts.
    """

    env: str
    """A Gymnasium id, or ``module:function``: what ``policy-client host`` serves."""
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Keyword arguments of the environment, JSON values; RLlib's ``env_config`` comes on top."""
    host_command: Sequence[str] | None = None
    """Starts the host instead of ``policy-client host ENV``, for a simulator with a Python or a
    launcher of its own. ``--kwargs``, ``--port``, ``--address-file`` and ``--parent-pid`` are
    appended, and the environment variable POLICY_SERVER_TOKEN is set."""
    start_timeout_s: float = 60.0
    """A host must answer within this long, and make an environment within as long again."""

    def __post_init__(self) -> None:
        command: Any = self.host_command  # whatever its annotation says
        if command is not None and (isinstance(command, str) or not command):
            raise ValueError(
                "RemoteEnvCreator.host_command: expected a list of words, such as "
                f'["/opt/simulator/python", "-m", "simulator"], got {command!r}'
            )
        if not self.start_timeout_s > 0:
            raise ValueError(
                "RemoteEnvCreator.start_timeout_s: expected a positive number of seconds, got "
                f"{self.start_timeout_s!r}"
            )

    def __call__(self, env_config: Mapping[str, Any] | None = None) -> RemoteEnv | RemoteVectorEnv:
        """What RLlib calls: one environment, or a vector of them where it says how many."""
        given = dict(env_config or {})
        num_envs = given.pop(_NUM_ENVS, None)
        try:
            kwargs = json.dumps({**self.kwargs, **given}, sort_keys=True)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"expected JSON values as arguments of {self.env!r} (kwargs and env_config), which "
                f"travel to another process: {error}"
            ) from error
        command = self.host_command or (
            *(sys.executable, "-m", "client_sdk.cli", "host", self.env),
            *("--max-envs", _NO_LIMIT),
        )
        host = _Host.of_this_process((*command, "--kwargs", kwargs), self.start_timeout_s)
        return _HostedEnv(host) if num_envs is None else _HostedVectorEnv(host, num_envs)


class _Host:
    """One host process after the other, and how many environments need it."""

    _all: dict[tuple[int, tuple[str, ...], float], _Host] = {}  # noqa: RUF012 - one for the process
    _lock = threading.RLock()

    @classmethod
    def of_this_process(cls, command: tuple[str, ...], start_timeout_s: float) -> _Host:
        """The one that was started with that command, or is to be."""
        with cls._lock:
            key = (os.getpid(), command, start_timeout_s)
            return cls._all.setdefault(key, cls(command, start_timeout_s))

    def __init__(self, command: tuple[str, ...], start_timeout_s: float) -> None:
        self._command = command
        self.start_timeout_s = start_timeout_s
        self._process: subprocess.Popen[str] | None = None
        self._said: collections.deque[str] = collections.deque(maxlen=_TAIL_LINES)
        self._address = ""
        self._users = 0
        self.token = ""

    def join(self) -> None:
        """One environment more."""
        with self._lock:
            self._users += 1

    def leave(self) -> None:
        """One environment less; the last one ends it."""
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._stop()

    def address(self, *, lost: bool = False) -> str:
        """Where it answers; it is started first, where it does not run.

        Args:
            lost: A connection to it broke; then its end may be a moment away.

        Raises:
            HostError: It does not start.
        """
        with self._lock:
            process = self._process
            if process is not None and lost:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_DYING_S)
            if process is not None and process.poll() is None:
                return self._address
            if process is not None:
                logger.warning(
                    "the host of environments ended (%s); starting another",
                    self._told(process.returncode),
                )
            self._start()
            return self._address

    def _start(self) -> None:
        self._said.clear()
        # Else everyone on this machine could use the environments; an option would show in ps.
        self.token = secrets.token_urlsafe(16)
        environment = {**os.environ, TOKEN_VARIABLE: self.token}
        if self._command[0] == sys.executable:
            # Modules that can be imported here can be there. Another Python has its own.
            environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        with tempfile.TemporaryDirectory(prefix="policy-client-host-") as directory:
            address_file = Path(directory) / "address"
            command = [
                *(*self._command, "--port", "0", "--address-file", str(address_file)),
                *("--parent-pid", str(os.getpid())),
            ]
            try:
                # A session of its own: a terminal's Ctrl-C is for the trainer, which ends it.
                process = subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    errors="replace",
                    start_new_session=True,
                )
            except OSError as error:
                raise HostError(f"cannot start {command[0]!r}: {error.strerror}") from error
            self._process = process
            reader = threading.Thread(target=self._listen, args=(process,), daemon=True)
            reader.start()
            try:
                self._address = _appears(address_file, process, self.start_timeout_s)
            except HostError as error:
                self._stop()
                reader.join(_STOP_S)  # for its last words
                raise HostError(f"{error} ({self._told(process.returncode)})") from None
            except BaseException:
                self._stop()
                raise

    def _listen(self, process: subprocess.Popen[str]) -> None:
        """Keep the pipe empty, and its last lines."""
        if process.stdout is None:
            return
        with process.stdout:
            for line in process.stdout:
                self._said.append(line.rstrip())
                logger.debug("host: %s", line.rstrip())

    def _told(self, code: int | None) -> str:
        said = "\n  ".join(self._said)
        return f"{' '.join(self._command)}: exit code {code}; it said:\n  {said or 'nothing'}"

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _appears(file: Path, process: subprocess.Popen[str], timeout_s: float) -> str:
    """What the host writes there once it answers."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        with contextlib.suppress(FileNotFoundError):
            return file.read_text()
        try:
            process.wait(_LOOK_EVERY_S)
        except subprocess.TimeoutExpired:
            continue
        raise HostError("the host of environments did not start")
    raise HostError(f"the host of environments did not answer within {timeout_s:g} s")


class _Lease:
    """One environment's share of a host, given back once."""

    def __init__(self, host: _Host) -> None:
        self._host = host
        self._held = True
        self._at = ""
        host.join()

    def connection(self) -> dict[str, Any]:
        """Arguments of a remote environment; the host is started where it does not run."""
        self._at = self._host.address()
        return {
            "address": self._at,
            "token": self._host.token,
            "connect_timeout": self._host.start_timeout_s,
        }

    def moved(self, env: RemoteEnv | RemoteVectorEnv) -> bool:
        """Whether the host is somewhere else than this environment knows."""
        return self._held and self._host.address(lost=not env.connected) != self._at

    def release(self) -> None:
        """Give it back."""
        if self._held:
            self._held = False
            self._host.leave()


class _HostedEnv(RemoteEnv):
    """On a host of this process; ``reset`` follows it where it had to be started again."""

    def __init__(self, host: _Host) -> None:
        self._lease = _Lease(host)
        try:
            self._connect()
        except BaseException:
            self._lease.release()
            raise

    def _connect(self) -> None:
        super().__init__(**self._lease.connection())

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """See ``RemoteEnv``; raises HostError where no host starts any more."""
        if self._lease.moved(self):
            super().close()
            self._connect()
        return super().reset(seed=seed, options=options)

    def close(self) -> None:
        """See ``RemoteEnv``; the last environment ends the host."""
        super().close()
        self._lease.release()


class _HostedVectorEnv(RemoteVectorEnv):
    """The same for a vector of them."""

    def __init__(self, host: _Host, num_envs: int) -> None:
        self._lease = _Lease(host)
        try:
            self._connect(num_envs)
        except BaseException:
            self._lease.release()
            raise

    def _connect(self, num_envs: int) -> None:
        super().__init__(num_envs=num_envs, **self._lease.connection())

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        """See ``RemoteVectorEnv``; raises HostError where no host starts any more."""
        if self._lease.moved(self):
            super().close_extras()
            self._connect(self.num_envs)
        return super().reset(seed=seed, options=options)

    def close_extras(self, **kwargs: Any) -> None:
        """See ``RemoteVectorEnv``; the last environment ends the host."""
        super().close_extras(**kwargs)
        self._lease.release()
