"""Frames as an mp4 file, through imageio's ffmpeg. Main thread only."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client_sdk import ending
from client_sdk.errors import InvalidValueError


class VideoFile:
    """Writes one frame after the other; the file is there, whole, once it is closed.

    Attributes:
        frames: Written so far.
    """

    def __init__(self, path: Path, fps: float) -> None:
        """Nothing is written before the first frame.

        Raises:
            InvalidValueError: The file cannot be written there.
            ImportError: imageio is not installed; the message says what to install.
        """
        try:
            import imageio
            import imageio_ffmpeg  # noqa: F401 - imageio would ask for it only at the first frame
        except ImportError as error:
            raise ImportError(
                "writing a video needs imageio and imageio-ffmpeg: "
                'pip install "policy-server[video]"'
            ) from error
        if path.suffix != ".mp4":
            raise InvalidValueError(f"expected a name that ends in .mp4, got {path.name!r}", "out")
        if not path.parent.is_dir():
            raise InvalidValueError(f"no such directory: {path.parent}", "out")
        if path.is_dir():
            raise InvalidValueError(f"that is a directory: {path}", "out")
        # It starts ffmpeg by a real fork otherwise, and gRPC's handlers of those make one in thirty
        # crash before its exec (grpc/grpc#43055).
        os.environ.setdefault("IMAGEIO_FFMPEG_NO_PREVENT_SIGINT", "1")
        self._imageio: Any = imageio
        self._path = path
        self._unfinished = path.with_name(f".{path.name}.part.mp4")
        self._fps = fps
        self._writer: Any = None
        self._shape: tuple[int, ...] = ()
        self.frames = 0

    def add(self, frame: NDArray[np.uint8]) -> None:
        """Write [height, width, 3], shown for 1 / fps seconds.

        Raises:
            InvalidValueError: It has another size than the first one.
            OSError: The file cannot be written; then there is none.
        """
        with _undisturbed():
            try:
                self._add(frame)
            except OSError:
                self._discard()
                raise

    def _discard(self) -> None:
        writer, self._writer = self._writer, None
        self.frames = 0
        if writer is not None:
            with contextlib.suppress(OSError):
                writer.close()
        self._unfinished.unlink(missing_ok=True)

    def _add(self, frame: NDArray[np.uint8]) -> None:
        if self._writer is None:
            self._shape = frame.shape
            self._writer = self._imageio.get_writer(
                self._unfinished, fps=self._fps, codec="libx264", macro_block_size=1
            )
        if frame.shape != self._shape:
            raise InvalidValueError(
                f"expected frames of {list(self._shape)}, as the first one, got {list(frame.shape)}"
            )
        # The usual pixel format shares colours between pairs of lines and columns.
        odd = [(0, size % 2) for size in frame.shape[:2]]
        with _without_ctrl_c() if self.frames == 0 else contextlib.nullcontext():
            self._writer.append_data(np.pad(frame, [*odd, (0, 0)], mode="edge"))
        self.frames += 1

    def close(self) -> None:
        """Finish the file; without a frame there is none. Idempotent."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with _undisturbed():
                writer.close()
            self._unfinished.replace(self._path)


@contextlib.contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """What is started within never hears a terminal's Ctrl-C: it ends when its input does."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows, where imageio sees to it
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Signals wait until the block is over: in the middle of a frame they would cost the file."""
    came: list[int] = []

    def note(number: int, _frame: Any) -> None:
        came.append(number)

    previous = {number: signal.signal(number, note) for number in ending.SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)
