"""Ray for one training: imported so that signals stay ours, started, and ended with it.

Main thread of the training process only.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from policy_server.commands.ray_noise import plain_prefixes, quiet_loggers

if TYPE_CHECKING:
    from ray.rllib.algorithms.algorithm_config import AlgorithmConfig

    from policy_server.commands.ending import Ending

CLUSTER = "RAY_ADDRESS"
"""Environment variable that names a running Ray cluster to use, as Ray itself reads it."""
_NATIVE_HANDLER = "RAY_DISABLE_FAILURE_SIGNAL_HANDLER"
"""Environment variable that Ray reads once, when it is imported."""


def import_ray() -> None:
    """Import Ray so that a signal in this process stays ours.

    Its native handler would answer SIGTERM with a stack dump and abort the process. Tracebacks of
    native crashes still come, from Python's faulthandler; Ray's other processes keep theirs.
    """
    before = os.environ.get(_NATIVE_HANDLER)
    os.environ[_NATIVE_HANDLER] = "1"
    try:
        importlib.import_module("ray")
    finally:
        if before is None:
            del os.environ[_NATIVE_HANDLER]
        else:
            os.environ[_NATIVE_HANDLER] = before


@contextlib.contextmanager
def running_ray(config: AlgorithmConfig, ending: Ending, level: int) -> Iterator[None]:
    """Ray, ours unless one is running; it ends with the context.

    Args:
        config: Of the training that is about to begin; told how much to log.
        ending: Whose signals Ray must leave alone.
        level: What Ray logs from there on.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    plain_prefixes()
    import ray

    config.debugging(log_level=logging.getLevelName(level))
    try:
        with ending.at_once():
            if os.environ.get(CLUSTER):
                ray.init(logging_level=level)
            else:
                ray.init(
                    # One for each runner, and a spare one: they wait more than they compute.
                    num_cpus=max(os.cpu_count() or 1, config.num_env_runners + 1),
                    include_dashboard=False,
                    logging_level=level,
                )
        quiet_loggers(level)
        yield
    finally:
        ray.shutdown()
        ending.install()
