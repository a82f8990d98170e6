"""Ended episodes in RLlib's metrics: returns, lengths, and the application's own numbers.

MetricsLogger is not thread-safe: actor thread only.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import Any

from ray.rllib.core import DEFAULT_AGENT_ID, DEFAULT_MODULE_ID
from ray.rllib.utils import metrics as rllib_metrics

from policy_server import lasting_stats
from policy_server.experience import EpisodeEnd

_logger = logging.getLogger(__name__)

EVALUATION = "evaluation"
"""Evaluation episodes are reported under this key of the env runners' results."""

_MAX_NAMES = 256
"""Different names of numbers that applications may report; the rest is dropped."""

_AGENT_RETURNS = "agent_episode_return_mean"
_MODULE_RETURNS = "module_episode_return_mean"
_REPORTED = (
    ((rllib_metrics.EPISODE_RETURN_MEAN,), lasting_stats.MEAN, "episode_return"),
    ((rllib_metrics.EPISODE_RETURN_MIN,), lasting_stats.MIN, "episode_return"),
    ((rllib_metrics.EPISODE_RETURN_MAX,), lasting_stats.MAX, "episode_return"),
    ((rllib_metrics.EPISODE_LEN_MEAN,), lasting_stats.MEAN, "length"),
    ((rllib_metrics.EPISODE_LEN_MIN,), lasting_stats.MIN, "length"),
    ((rllib_metrics.EPISODE_LEN_MAX,), lasting_stats.MAX, "length"),
    ((rllib_metrics.EPISODE_DURATION_SEC_MEAN,), lasting_stats.MEAN, "duration_s"),
    ((_AGENT_RETURNS, DEFAULT_AGENT_ID), lasting_stats.MEAN, "episode_return"),
    ((_MODULE_RETURNS, DEFAULT_MODULE_ID), lasting_stats.MEAN, "episode_return"),
)
"""What RLlib's own env runner reports of an episode: key, how it is reduced, field of the end."""

_RESERVED = frozenset(value for value in vars(rllib_metrics).values() if isinstance(value, str)) | {
    _AGENT_RETURNS,
    _MODULE_RETURNS,
    "policy_server",
    "",
}


class EpisodeMetrics:
    """Logs the ends of episodes for one env runner."""

    def __init__(self, runner: Any) -> None:
        self._metrics = runner.metrics
        lasting_stats.admit_lasting(self._metrics)
        config = runner.config
        # Divided because the driver joins the windows of all runners.
        self._window = max(
            1,
            math.ceil(config.metrics_num_episodes_for_smoothing / (config.num_env_runners or 1)),
        )
        self._ever_evaluated = False
        self._names: set[str] = set()
        self._refused: set[str] = set()

    def log(self, ends: Iterable[EpisodeEnd], evaluation_ends: Iterable[EpisodeEnd]) -> None:
        """Report what has ended."""
        for end in ends:
            if end.reported:
                self._log((), end)
        evaluated = [end for end in evaluation_ends if end.reported]
        for end in evaluated:
            self._log((EVALUATION,), end)
        self._ever_evaluated |= bool(evaluated)
        if self._ever_evaluated:  # where none has ended, 0 is a number and NaN is not
            for name, reduce in (
                (rllib_metrics.NUM_EPISODES, "sum"),
                (rllib_metrics.NUM_EPISODES_LIFETIME, "lifetime_sum"),
            ):
                self._metrics.log_value((EVALUATION, name), len(evaluated), reduce=reduce)

    def _log(self, prefix: tuple[str, ...], end: EpisodeEnd) -> None:
        for key, reduce, field in _REPORTED:
            self._log_value((*prefix, *key), getattr(end, field), reduce)
        for name, value in end.metrics.items():
            if math.isfinite(value) and self._admit(name):
                try:
                    self._log_value((*prefix, name), float(value), lasting_stats.MEAN)
                except Exception as error:  # a callback logs something else under that name
                    self._refuse(name, f"it is in use for something else ({error})")

    def _log_value(self, key: tuple[str, ...], value: float, reduce: str) -> None:
        self._metrics.log_value(key, value, reduce=reduce, window=self._window)

    def _admit(self, name: str) -> bool:
        if name in self._names:
            return True
        if name in self._refused:
            return False
        if name in _RESERVED:
            self._refuse(name, "RLlib's own results use that name; choose another")
        elif len(self._names) >= _MAX_NAMES:
            self._refuse(name, f"there are {_MAX_NAMES} names already")
        else:
            self._names.add(name)
            return True
        return False

    def _refuse(self, name: str, why: str) -> None:
        self._names.discard(name)
        if len(self._refused) < _MAX_NAMES and name not in self._refused:
            self._refused.add(name)
            _logger.warning("episode metric %.80r is not reported: %s", name, why)
