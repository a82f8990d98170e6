"""From raw observation leaves to the encoder's input, as RLlib's env-to-module connectors do it.

Torch modules to be exported; the rules for them are in ``graphs``. Actor thread only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from ray.rllib.connectors.env_to_module import MeanStdFilter
from ray.rllib.utils.filter import RunningStat
from ray.rllib.utils.numpy import SMALL_NUMBER

from policy_server.filters import MeanStdFilter as ExactMeanStdFilter


class Flatten(torch.nn.Module):
    """``FlattenObservations``: leaves in RLlib's order, flattened or one-hot, side by side."""

    def __init__(self, spaces: Sequence[gym.Space[Any]]) -> None:
        super().__init__()
        self._leaves = [(math.prod(space.shape or ()), _positions(space)) for space in spaces]

    def forward(self, leaves: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """``[B, *shape]`` for each leaf to one ``[B, sum of sizes]``."""
        parts: list[torch.Tensor] = []
        for leaf, (size, positions) in zip(leaves, self._leaves, strict=True):
            # -1 for the batch, not for the rest: the other way round B becomes a constant.
            flat = leaf.reshape(-1, size)
            if positions is None:
                parts.append(flat.to(torch.float32))
            else:
                parts += [
                    (flat[:, i : i + 1] == each).to(torch.float32)
                    for i, each in enumerate(positions)
                ]
        return [torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]]


def one_hot_sizes(space: gym.Space[Any]) -> list[int] | None:
    """Sizes of the one-hot vectors that RLlib makes of a leaf; None where it takes the numbers.

    Raises:
        ValueError: RLlib cannot flatten such a leaf.
    """
    if isinstance(space, gym.spaces.Box | gym.spaces.MultiBinary):
        return None
    if isinstance(space, gym.spaces.Discrete) and space.start == 0:
        return [int(space.n)]
    # RLlib's one_hot takes the value itself as the index, so it must count from 0.
    if (
        isinstance(space, gym.spaces.MultiDiscrete)
        and space.nvec.ndim == 1
        and not np.any(space.start)
    ):
        return [int(n) for n in space.nvec]
    raise ValueError(f"RLlib cannot flatten {space}")


def input_dtype(leaf: gym.Space[Any]) -> str:
    """Of the graph's input for a leaf, as numpy says it."""
    dtype = np.dtype(leaf.dtype)
    if dtype.kind == "f":  # double precision is the simulators'; networks compute in single
        return "float32"
    if dtype.kind == "u" and dtype.itemsize > 1:  # torch exports no such tensors
        return "float32" if isinstance(leaf, gym.spaces.Box) else "int64"
    return dtype.name


def _positions(space: gym.Space[Any]) -> list[torch.Tensor] | None:
    sizes = one_hot_sizes(space)
    if sizes is None:
        return None
    dtype = getattr(torch, input_dtype(space))
    return [torch.arange(size, dtype=dtype) for size in sizes]


class Standardize(torch.nn.Module):
    """``MeanStdFilter`` with the statistics of one moment, refreshed with each version.

    The mean comes in two parts, so that values far from zero lose no precision to float32.
    """

    def __init__(self, connector: MeanStdFilter) -> None:
        super().__init__()
        self._connector = connector
        for name, value in self._statistics().items():
            self.register_buffer(name, torch.from_numpy(value))

    def _statistics(self) -> dict[str, NDArray[np.float32]]:
        if isinstance(self._connector, ExactMeanStdFilter):
            mean, wide = self._connector.applied()
            divisor = wide.astype(np.float32)
            clip = self._connector.clip_by_value or float(np.finfo(np.float32).max)
        else:
            mean, divisor, clip = self._rllibs_own_statistics()
        coarse = mean.astype(np.float32)
        return {
            "mean": coarse,
            "mean_rest": (mean - coarse).astype(np.float32),
            "divisor": divisor,
            # Both, though one is the other's negative: the exporter would fold the negation.
            "low": np.full((1,), -clip, np.float32),
            "high": np.full((1,), clip, np.float32),
        }

    def _rllibs_own_statistics(
        self,
    ) -> tuple[NDArray[np.float64], NDArray[np.float32], float]:
        state = self._connector.get_state()[None]
        (stats,) = (RunningStat.from_state(each) for each in state["running_stats"])
        mean = np.asarray(stats.mean, np.float64)
        if not state["de_mean_to_zero"]:
            mean = np.zeros_like(mean)
        divisor = np.asarray(stats.std, np.float32) + np.float32(SMALL_NUMBER)
        if not state["de_std_to_one"]:
            divisor = np.ones_like(divisor)
        clip = state["clip_by_value"] or float(np.finfo(np.float32).max)
        return mean, divisor.astype(np.float32), clip

    def refresh(self) -> None:
        """Take the connector's statistics as they are now."""
        for name, value in self._statistics().items():
            getattr(self, name).copy_(torch.from_numpy(value))

    def forward(self, leaves: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """One ``[B, *shape]`` to the same."""
        x = ((leaves[0] - self.mean) - self.mean_rest) / self.divisor
        return [torch.minimum(torch.maximum(x, self.low), self.high)]
