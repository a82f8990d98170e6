"""Frames as an mp4 file, through imageio's ffmpeg. Main thread only."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
        """
        with _undisturbed():
            self._add(frame)

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
        self._writer.append_data(np.pad(frame, [*odd, (0, 0)], mode="edge"))
        self.frames += 1

    def close(self) -> None:
        """Finish the file; without a frame there is none. Idempotent."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with _undisturbed():
                writer.close()
            try:
                self._unfinished.replace(self._path)
            except FileNotFoundError:  # ffmpeg was stopped before it began
                self.frames = 0


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Signals wait until the block is over: in the middle of a frame they would cost the file."""
    came: list[tuple[int, Any]] = []

    def note(number: int, frame: Any) -> None:
        came.append((number, frame))

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for caught, frame in came:
            handler = previous[signal.Signals(caught)]
            if callable(handler):
                handler(caught, frame)
