"""Noticing that a parent process is gone, by its process and not by its number.

Blocking waits in a thread of its own.
"""

from __future__ import annotations

import logging
import os
import select
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


class ParentError(RuntimeError):
    """The parent cannot be watched; the message says why."""


def when_process_ends(pid: int, call: Callable[[], object]) -> None:
    """Have ``call`` called, once, in a thread, as soon as that process is gone; maybe at once.

    A number is given to another process once its own is gone. A process that is younger than this
    one cannot be its parent: then the parent is gone already.

    Raises:
        ParentError: This platform needs psutil for it, or the process may not be watched.
    """
    wait = _waiter(pid)

    def watch() -> None:
        if wait is not None:
            wait()
        call()

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def _waiter(pid: int) -> Callable[[], object] | None:
    """What blocks until that process has ended; None: it has."""
    if hasattr(os, "pidfd_open") and Path("/proc/self/stat").exists():
        try:
            return _linux_waiter(pid)
        except OSError as error:  # a kernel before 5.3, or a sandbox that does not let it through
            logger.debug("no descriptor of process %d: %s", pid, error.strerror)
    try:
        import psutil
    except ImportError as error:
        raise ParentError(
            "watching the parent process needs psutil on this platform: pip install psutil"
        ) from error
    try:
        process: Any = psutil.Process(pid)
        if process.create_time() > psutil.Process().create_time():
            return None
    except psutil.NoSuchProcess:
        return None
    except psutil.Error as error:
        raise ParentError(f"cannot watch process {pid}: {error}") from error
    return _psutil_waiter(process)


def _linux_waiter(pid: int) -> Callable[[], object] | None:
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    # The descriptor holds on to whoever has the number now: look at its age only afterwards.
    try:
        younger = _started(pid) > _started(os.getpid())
    except OSError:
        younger = True
    if younger:
        os.close(descriptor)
        return None

    def wait() -> None:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        poll.poll()
        os.close(descriptor)

    return wait


def _started(pid: int) -> int:
    """When a process started, in clock ticks since the machine did."""
    # The name, in parentheses, may contain anything; 20 fields come after it.
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def _psutil_waiter(process: Any) -> Callable[[], object]:
    def wait() -> None:
        import psutil

        while True:
            try:
                process.wait(timeout=3600.0)
                return
            except psutil.TimeoutExpired:
                continue
            except psutil.Error:
                logger.warning("lost sight of process %d; taking it for ended", process.pid)
                return

    return wait
