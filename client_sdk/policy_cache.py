"""``PolicyCache``: policy files on disk, by their SHA-256, shared by any number of processes.

A convenience: whatever goes wrong with it costs a download and a warning, never an action. Touched
by one client's threads, one call at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
from pathlib import Path
from typing import Final

from client_sdk.log import logger

FILES_KEPT: Final = 8
"""In a directory; the ones used longest ago go first."""
_SUFFIX: Final = ".onnx"
_PREFIX: Final = "policy-"
_TEMPORARY: Final = ".partial-"
_ABANDONED_S: Final = 3600.0
"""Nobody writes for so long: what is not finished by then was left behind by a crash."""


class PolicyCache:
    """Files that need not be downloaded again.

    Args:
        directory: Made if it is not there; None: nothing is kept.
    """

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._warned = False

    def get(self, sha256: bytes) -> bytes | None:
        """The file of that hash, verified; a damaged one is thrown away."""
        if self._directory is None:
            return None
        path = self._path(self._directory, sha256)
        try:
            model = path.read_bytes()
            if hashlib.sha256(model).digest() == sha256:
                os.utime(path)  # the newest in use
                return model
            logger.warning("the cached policy %s is damaged; downloading it again", path)
            path.unlink(missing_ok=True)
        except FileNotFoundError:
            pass
        except OSError as error:
            self._warn("read from", error)
        return None

    def put(self, sha256: bytes, model: bytes) -> None:
        """Keep a file: whole under its name, or not at all."""
        if self._directory is None:
            return
        temporary = ""
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(prefix=_TEMPORARY, dir=self._directory)
            with open(handle, "wb") as file:
                file.write(model)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self._path(self._directory, sha256))
            self._discard_old(self._directory)
        except OSError as error:
            self._warn("write to", error)
            if temporary:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)

    @staticmethod
    def _path(directory: Path, sha256: bytes) -> Path:
        return directory / f"{_PREFIX}{sha256.hex()}{_SUFFIX}"

    @staticmethod
    def _discard_old(directory: Path) -> None:
        ages: list[tuple[float, Path]] = []
        for path in directory.glob(f"{_PREFIX}*{_SUFFIX}"):
            with contextlib.suppress(FileNotFoundError):  # another process was quicker
                ages.append((path.stat().st_mtime, path))
        for _, path in sorted(ages, reverse=True)[FILES_KEPT:]:
            path.unlink(missing_ok=True)
        for path in directory.glob(f"{_TEMPORARY}*"):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < time.time() - _ABANDONED_S:
                    path.unlink()

    def _warn(self, doing: str, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "cannot %s the policy cache %s (%s); going on without",
                doing,
                self._directory,
                error.strerror or error,
            )
