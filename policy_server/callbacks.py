"""RLlib's callbacks, called at hand-over instead of from an env loop. Actor thread only."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any, Literal

from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.callbacks.utils import make_callback
from ray.rllib.utils import force_list

if TYPE_CHECKING:
    from ray.rllib.algorithms.algorithm_config import AlgorithmConfig

_logger = logging.getLogger(__name__)

_LOG_EVERY_S = 10.0

EpisodeEvent = Literal[
    "on_episode_created", "on_episode_start", "on_episode_step", "on_episode_end"
]


class Callbacks:
    """The callbacks of a config. What they raise is logged and counted, never fatal.

    Attributes:
        errors: How many calls raised.
    """

    def __init__(self, config: AlgorithmConfig, **common: Any) -> None:
        """Instantiate them.

        Args:
            config: Names callback classes and functions.
            common: Passed to each callback.
        """
        self._config = config
        self._common = common
        self._objects: list[RLlibCallback] = [make() for make in force_list(config.callbacks_class)]
        self._wanted: dict[str, bool] = {}
        self._logged_s: dict[str, float] = {}
        self.errors = 0

    def wants(self, event: str) -> bool:
        """Whether anybody listens; what nobody listens to is not prepared."""
        wanted = self._wanted.get(event)
        if wanted is None:
            wanted = bool(self._functions(event)) or any(
                getattr(type(one), event, None) is not getattr(RLlibCallback, event)
                for one in self._objects
            )
            self._wanted[event] = wanted
        return wanted

    def episode(self, event: EpisodeEvent, episode: Any, **more: Any) -> None:
        """One event of an episode, with ``env=None``."""
        if self.wants(event):
            self.call(event, episode=episode, env=None, env_index=0, **more)

    def call(self, event: str, **arguments: Any) -> None:
        """Call everybody who listens."""
        try:
            make_callback(
                event,
                callbacks_objects=self._objects,
                callbacks_functions=self._functions(event),
                kwargs={**self._common, **arguments},
            )
        except Exception:  # the user's bug must not end the training of everybody else
            self.errors += 1
            now = time.monotonic()
            if now - self._logged_s.get(event, -_LOG_EVERY_S) >= _LOG_EVERY_S:
                self._logged_s[event] = now
                _logger.exception("callback %s raised; the training goes on", event)

    def _functions(self, event: str) -> list[Any]:
        functions: list[Any] = force_list(getattr(self._config, f"callbacks_{event}", None))
        return functions
