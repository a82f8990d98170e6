"""A directory of checkpoints of which the newest is always whole.

Each is written beside the others under a temporary name and renamed when complete; then the
``latest`` link moves. Whoever is interrupted, or runs out of disk, leaves the previous one.
Main thread of the training process only.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

_NAME = re.compile(r"iteration_(\d{6,})")
_TEMPORARY = ".writing-"
LATEST = "latest"
"""Link to the newest complete checkpoint, relative, so that the directory may move."""

logger = logging.getLogger(__name__)


class CheckpointDirectory:
    """Checkpoints by iteration, the newest few of them kept.

    Args:
        path: Where; made when missing.
        keep: How many complete checkpoints stay.
        fresh: Refuse a directory that holds some, and leave it as it is: those of two trainings in
            one place cannot be told apart.

    Raises:
        FileExistsError: ``fresh``, and there are checkpoints.
        OSError: It cannot be made.
    """

    def __init__(self, path: str | Path, keep: int = 3, *, fresh: bool = False) -> None:
        self.path = Path(path)
        self.keep = keep
        self.path.mkdir(parents=True, exist_ok=True)
        if fresh and (newest := self.latest()) is not None:
            raise FileExistsError(
                f"{path} holds the checkpoints of another training ({newest.name})"
            )
        for abandoned in self.path.glob(f"{_TEMPORARY}*"):  # of a process that was killed
            shutil.rmtree(abandoned, ignore_errors=True)

    def latest(self) -> Path | None:
        """The newest complete checkpoint; None if there is none."""
        link = self.path / LATEST
        if link.is_dir():
            return link.resolve()
        complete = self._complete()
        return complete[-1] if complete else None

    def write(self, iteration: int, save: Callable[[Path], None]) -> Path:
        """Write one checkpoint, or leave everything as it was.

        Args:
            iteration: Names it; one of the same iteration is replaced.
            save: Fills the directory that it is given.

        Returns:
            Where the complete checkpoint is.

        Raises:
            Exception: What ``save`` or the disk raised; nothing of this checkpoint is left then.
        """
        name = f"iteration_{iteration:06d}"
        temporary = self.path / f"{_TEMPORARY}{name}-{os.getpid()}"
        target = self.path / name
        try:
            temporary.mkdir()
            save(temporary)
            if target.exists():
                shutil.rmtree(target)
            temporary.rename(target)
        except BaseException:  # KeyboardInterrupt, too, leaves no half
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._point_at(name)
        self._forget_old()
        return target

    def _point_at(self, name: str) -> None:
        link = self.path / f"{_TEMPORARY}link-{os.getpid()}"
        with contextlib.suppress(FileNotFoundError):
            link.unlink()
        link.symlink_to(name, target_is_directory=True)
        link.replace(self.path / LATEST)

    def _complete(self) -> list[Path]:
        found = [entry for entry in self.path.iterdir() if _NAME.fullmatch(entry.name)]
        return sorted(found, key=lambda entry: int(entry.name.partition("_")[2]))

    def _forget_old(self) -> None:
        newest = self.latest()
        for old in self._complete()[: -self.keep]:
            if old != newest:
                shutil.rmtree(old, ignore_errors=True)
