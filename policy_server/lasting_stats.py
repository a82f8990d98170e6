"""RLlib's mean, minimum and maximum of an iteration, which outlast iterations without a value.

RLlib makes NaN of them there. An env runner cannot prevent that: it does not know where an iteration
ends, and to report the last value once more with each ``sample()`` would weigh it anew each time.
The driver's logger knows, and keeps Stats of the class that the first report brings.
"""

from __future__ import annotations

import math
from typing import Any

import tree
from ray.rllib.utils.metrics import ENV_RUNNER_RESULTS
from ray.rllib.utils.metrics.metrics_logger import MetricsLogger
from ray.rllib.utils.metrics.stats import MaxStats, MeanStats, MinStats, SeriesStats


class _Lasting(SeriesStats):
    # No part of the state: a checkpoint holds RLlib's own Stats, and loads without this module.
    _latest = math.nan

    def reduce(self, compile: bool = True) -> Any:  # noqa: A002, RLlib's name
        """See ``SeriesStats``; compiled, by the driver at the end of an iteration, it lasts."""
        reduced = super().reduce(compile)
        if not compile:
            return reduced
        if not math.isnan(reduced):
            self._latest = reduced
        return self._latest


class _LastingMean(_Lasting, MeanStats):
    pass


class _LastingMin(_Lasting, MinStats):
    pass


class _LastingMax(_Lasting, MaxStats):
    pass


MEAN, MIN, MAX = "lasting_mean", "lasting_min", "lasting_max"
"""What to give ``MetricsLogger.log_value`` as ``reduce``."""


def admit_lasting(metrics: MetricsLogger) -> None:
    """Let values be logged to this logger with ``reduce=MEAN``, ``MIN`` or ``MAX``."""
    metrics.stats_cls_lookup = {
        **metrics.stats_cls_lookup,
        MEAN: _LastingMean,
        MIN: _LastingMin,
        MAX: _LastingMax,
    }


def forget_restored(metrics: MetricsLogger) -> None:
    """Let the next report bring what lasts, where a checkpoint has brought RLlib's own Stats.

    All means, minima and maxima of the env runners are absent until then, those of callbacks too.

    Args:
        metrics: The driver's, between two iterations: nothing is lost, for they are empty then.
    """
    for path, stats in tree.flatten_with_path(metrics.stats.get(ENV_RUNNER_RESULTS, {})):
        if type(stats) in (MeanStats, MinStats, MaxStats):
            metrics.delete(ENV_RUNNER_RESULTS, *path)
