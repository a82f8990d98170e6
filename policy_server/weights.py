"""Weights on their way in: brought by Ray within a bound, looked at, and numbered as versions.

Actor thread only.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import ray
import tree
from ray.rllib.core import DEFAULT_MODULE_ID

_FETCH_TIMEOUT_S = 60.0
"""For what Ray brings; without a bound one lost object would stop the runner for good."""

_logger = logging.getLogger(__name__)


def bring(ref: ray.ObjectRef, missing: str) -> Any:
    """What a reference stands for.

    Args:
        ref: Of an object, or of a remote call.
        missing: What to log where it does not come.

    Returns:
        None where it does not come in time, or not at all.
    """
    try:
        return ray.get(ref, timeout=_FETCH_TIMEOUT_S)
    except ray.exceptions.RayError as error:
        _logger.warning("%s (%s); going on", missing, type(error).__name__)
        return None


def weights_of(given: Any, seq_no: int) -> Any:
    """The one module's weights, in whatever wrapping RLlib sends them.

    Args:
        given: Weights, those of a MultiRLModule, or a reference to either.
        seq_no: RLlib's number of them, for the log.

    Returns:
        None where Ray did not bring them.
    """
    if isinstance(given, ray.ObjectRef):
        given = bring(given, f"weights {seq_no} did not arrive")
    if isinstance(given, dict) and DEFAULT_MODULE_ID in given:
        return given[DEFAULT_MODULE_ID]
    return given


def not_finite(weights: Any) -> str | None:
    """The path of the first array with a NaN or infinity."""
    for path, value in tree.flatten_with_path(weights):
        array = np.asarray(value)
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            return "/".join(map(str, path))
    return None


class Versions:
    """Numbers the policies of one server process: as RLlib does, except that it never goes back."""

    def __init__(self) -> None:
        self._offset = 0  # over RLlib's numbers, after a checkpoint was restored

    def after(self, current: int | None, seq_no: int) -> int:
        """The version of weights that are about to be served.

        Args:
            current: The version that is served; None if there is none.
            seq_no: RLlib's number of the weights; 0 where it gives none.
        """
        version = seq_no if current is None else max(seq_no + self._offset, current + 1)
        if seq_no:
            self._offset = version - seq_no
        return version
