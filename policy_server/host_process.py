"""``HostProcess``: a host of environments beside the process that steps them.

It belongs to the process that started it, is shared by all of its environments, and ends with the
last of them. Any thread; not usable after a fork.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from client_sdk.credentials import TOKEN_VARIABLE

logger = logging.getLogger(__name__)

_TAIL_LINES = 15
_STOP_S = 5.0
_LOOK_EVERY_S = 0.02
_DYING_S = 0.5
"""A process that dies closes its connections before it is seen to be gone."""


class HostError(RuntimeError):
    """A host process did not start; the message has the end of what it said."""


class HostProcess:
    """One host process after the other, and how many environments need it."""

    _all: dict[tuple[int, tuple[str, ...], float], HostProcess] = {}  # noqa: RUF012 - one for the process
    _lock = threading.RLock()

    @classmethod
    def of_this_process(cls, command: tuple[str, ...], start_timeout_s: float) -> HostProcess:
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
