"""Ended episodes in RLlib's metrics: returns, lengths, and the application's own numbers.

MetricsLogger is not thread-safe: actor thread only.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import Any

from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from ray.rllib.utils import metrics as rllib_metrics

from policy_server.experience import EpisodeEnd

_logger = logging.getLogger(__name__)

EVALUATION = "evaluation"
"""Evaluation episodes are reported under this key of the env runners' results."""

_MAX_NAMES = 256
"""Different names of numbers that applications may report; the rest is dropped."""

_RESERVED = frozenset(value for value in vars(rllib_metrics).values() if isinstance(value, str)) | {
    "agent_episode_return_mean",
    "module_episode_return_mean",
    "policy_server",
    "",
}


class EpisodeMetrics:
    """Logs the ends of episodes for one env runner."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._metrics = runner.metrics
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
                SingleAgentEnvRunner._log_episode_metrics(
                    self._runner, end.length, end.episode_return, end.duration_s
                )
                self._log_numbers((), end)
        evaluated = [end for end in evaluation_ends if end.reported]
        for end in evaluated:
            self._log_evaluation(end)
            self._log_numbers((EVALUATION,), end)
        self._ever_evaluated |= bool(evaluated)
        if self._ever_evaluated:  # where none has ended, 0 is a number and NaN is not
            for name, reduce in (
                (rllib_metrics.NUM_EPISODES, "sum"),
                (rllib_metrics.NUM_EPISODES_LIFETIME, "lifetime_sum"),
            ):
                self._metrics.log_value((EVALUATION, name), len(evaluated), reduce=reduce)

    def _log_evaluation(self, end: EpisodeEnd) -> None:
        for name, value in (
            (rllib_metrics.EPISODE_RETURN_MEAN, end.episode_return),
            (rllib_metrics.EPISODE_LEN_MEAN, end.length),
            (rllib_metrics.EPISODE_DURATION_SEC_MEAN, end.duration_s),
        ):
            self._metrics.log_value((EVALUATION, name), value, window=self._window)
        for name, value, reduce in (
            (rllib_metrics.EPISODE_RETURN_MIN, end.episode_return, "min"),
            (rllib_metrics.EPISODE_RETURN_MAX, end.episode_return, "max"),
        ):
            self._metrics.log_value((EVALUATION, name), value, reduce=reduce, window=self._window)

    def _log_numbers(self, prefix: tuple[str, ...], end: EpisodeEnd) -> None:
        for name, value in end.metrics.items():
            if math.isfinite(value) and self._admit(name):
                try:
                    self._metrics.log_value((*prefix, name), float(value), window=self._window)
                except Exception as error:  # a callback logs something else under that name
                    self._refuse(name, f"it is in use for something else ({error})")

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
