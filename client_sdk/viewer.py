"""A window for frames, through pygame. The thread that made it."""

from __future__ import annotations

import logging
import os
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from client_sdk.config import Address
from client_sdk.errors import ServiceError

logger = logging.getLogger(__name__)


class Viewer:
    """Shows one frame after the other."""

    def __init__(self, address: Address) -> None:
        """Nothing is opened before the first frame.

        Raises:
            gymnasium.error.DependencyNotInstalled: There is no pygame.
        """
        os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")  # it would greet on stdout
        try:
            import pygame
        except ImportError as error:
            raise gym.error.DependencyNotInstalled(
                "frames are shown with pygame, which is not installed: "
                'pip install "policy-server[video]"'
            ) from error
        self._pygame: Any = pygame
        self._title = f"environment at {address}"
        self._window: Any = None
        self._clock: Any = None

    def show(self, frame: NDArray[np.uint8], fps: float | None) -> None:
        """Show [height, width, 3], and wait as long as its rate asks for.

        Raises:
            ServiceError: No window can be opened.
        """
        pygame = self._pygame
        size = (frame.shape[1], frame.shape[0])
        if self._window is None or self._window.get_size() != size:
            self._open(size)
        self._window.blit(pygame.surfarray.make_surface(frame.swapaxes(0, 1)), (0, 0))
        pygame.event.pump()
        pygame.display.flip()
        self._clock.tick(fps or 0)

    def _open(self, size: tuple[int, int]) -> None:
        pygame = self._pygame
        try:
            pygame.display.init()
            pygame.display.set_caption(self._title)
            self._window = pygame.display.set_mode(size)
        except pygame.error as error:
            raise ServiceError(f"no window can be opened here: {error}") from error
        self._clock = self._clock or pygame.time.Clock()
        # Without a display SDL draws into memory, and does not say so.
        if pygame.display.get_driver() == "offscreen":
            logger.warning("there is no display here: nobody sees these frames")

    @property
    def dismissed(self) -> bool:
        """Whether somebody has closed the window; frames are shown all the same."""
        return self._window is not None and bool(self._pygame.event.peek(self._pygame.QUIT))

    def close(self) -> None:
        """Close the window. Idempotent."""
        if self._window is not None:
            self._window = None
            self._pygame.display.quit()
