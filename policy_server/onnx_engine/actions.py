"""From distribution inputs and noise to actions and their log-densities.

Torch modules to be exported; the rules for them are in ``graphs``. Actor thread only. B is the
batch size, n the number of choices, d that of dimensions of a Box.
"""

from __future__ import annotations

import math
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from ray.rllib.utils.numpy import MAX_LOG_NN_OUTPUT, MIN_LOG_NN_OUTPUT

_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


class Categorical(torch.nn.Module):
    """Gumbel-max sampling of one choice out of n."""

    def __init__(self, space: gym.spaces.Discrete[Any]) -> None:
        super().__init__()
        self._start = int(space.start)

    def forward(self, logits: torch.Tensor, noise: torch.Tensor) -> dict[str, torch.Tensor]:
        """``[B, n]`` each to actions and their log-probabilities ``[B]``."""
        action = torch.argmax(logits + noise, dim=-1)
        return _from_start(action, self._start) | {
            "action_logp": _logp_of_choice(logits, action),
            "action_dist_inputs": logits,
        }


class MultiCategorical(torch.nn.Module):
    """The same for several choices at once."""

    def __init__(self, space: gym.spaces.MultiDiscrete) -> None:
        super().__init__()
        self._sizes = [int(n) for n in space.nvec]
        start = np.asarray(space.start, np.int64)
        self._start = torch.from_numpy(start) if start.any() else 0
        self._dtype = getattr(torch, np.dtype(space.dtype).name)

    def forward(self, logits: torch.Tensor, noise: torch.Tensor) -> dict[str, torch.Tensor]:
        """``[B, sum of n]`` each to actions ``[B, k]`` and their log-probabilities ``[B]``."""
        k, n = len(self._sizes), self._sizes[0]
        noisy = logits + noise
        if all(size == n for size in self._sizes):
            action = torch.argmax(noisy.reshape(-1, k, n), dim=-1)
            logp = _logp_of_choice(logits.reshape(-1, k, n), action).sum(dim=-1)
        else:
            choices = [torch.argmax(part, dim=-1) for part in noisy.split(self._sizes, dim=-1)]
            action = torch.stack(choices, dim=-1)
            parts = logits.split(self._sizes, dim=-1)
            logps = [_logp_of_choice(p, c) for p, c in zip(parts, choices, strict=True)]
            logp = torch.stack(logps, dim=-1).sum(dim=-1)
        found = _from_start(action, self._start)
        if self._dtype != torch.int64:
            found["env_actions"] = found.get("env_actions", action).to(self._dtype)
        return found | {"action_logp": logp, "action_dist_inputs": logits}


class DiagGaussian(torch.nn.Module):
    """Mean plus noise times standard deviation."""

    def __init__(self, space: gym.spaces.Box, executed: BoxActions) -> None:
        super().__init__()
        self._constant = -_HALF_LOG_2PI * space.shape[0]
        self._executed = executed

    def forward(
        self, inputs: tuple[torch.Tensor, torch.Tensor], noise: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Mean, log of the standard deviation and noise ``[B, d]`` to actions ``[B, d]``."""
        mean, log_std = inputs
        std = torch.exp(log_std)
        action = mean + std * noise
        # From the rounded action, not from the noise: the learner sees the action only, and its
        # ratio to this density must be 1 before the first update.
        standard = (action - mean) / std
        logp = self._constant - (0.5 * (standard * standard) + log_std).sum(dim=-1)
        return self._executed(action) | {
            "action_logp": logp,
            "action_dist_inputs": torch.cat(inputs, dim=-1),
        }


class SquashedGaussian(torch.nn.Module):
    """The hyperbolic tangent of such a sum: SAC's actions, within -1 and 1.

    The density takes the change of variables from the sum itself. RLlib's ``logp(action)`` must
    invert a rounded tangent, and is wrong where that is almost 1; its own greedy action is the
    mean, not its tangent.
    """

    def __init__(self, space: gym.spaces.Box, executed: BoxActions) -> None:
        super().__init__()
        self._constant = (-_HALF_LOG_2PI - 2.0 * math.log(2.0)) * space.shape[0]
        self._executed = executed

    def forward(
        self, inputs: tuple[torch.Tensor, torch.Tensor], noise: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Mean, log of the standard deviation and noise ``[B, d]`` to actions ``[B, d]``."""
        mean, log_std = inputs
        log_std = torch.clamp(log_std, float(MIN_LOG_NN_OUTPUT), float(MAX_LOG_NN_OUTPUT))
        x = mean + torch.exp(log_std) * noise
        # log(1 - tanh(x)^2) = 2 (log 2 - x - softplus(-2 x)); Haarnoja et al. 2018, eq. 21.
        squashed = 2.0 * (x + torch.nn.functional.softplus(-2.0 * x))
        logp = self._constant + (squashed - 0.5 * (noise * noise) - log_std).sum(dim=-1)
        # onnxruntime's tangent goes beyond 1 by its rounding.
        return self._executed(torch.clamp(torch.tanh(x), -1.0, 1.0)) | {
            "action_logp": logp,
            "action_dist_inputs": torch.cat(inputs, dim=-1),
        }


class BoxActions:
    """``NormalizeAndClipActions`` for a Box: what the application executes, where that differs."""

    def __init__(self, space: gym.spaces.Box, *, normalize: bool, clip: bool) -> None:
        # RLlib unsquashes only what is bounded everywhere, and clips only where it does not
        # normalize: an unbounded space with normalize_actions is executed as it comes.
        self._unsquash = normalize and space.is_bounded("both")
        self._clip = self._unsquash or (clip and not normalize)
        self._dtype = getattr(torch, np.dtype(space.dtype).name)
        self._low, self._high = torch.from_numpy(space.low), torch.from_numpy(space.high)
        self._same_bounds = len({*space.low.tolist()}) == len({*space.high.tolist()}) == 1

    def __call__(self, actions: torch.Tensor) -> dict[str, torch.Tensor]:
        """``[B, d]`` to outputs by name."""
        if not (self._unsquash or self._clip or self._dtype != actions.dtype):
            return {"actions": actions}
        executed = actions if self._dtype == actions.dtype else actions.to(self._dtype)
        if self._unsquash:
            half = (self._high - self._low) / 2.0
            executed = executed * half + (self._low + half)
        if self._clip and self._same_bounds:
            executed = torch.clamp(executed, float(self._low[0]), float(self._high[0]))
        elif self._clip:
            executed = torch.minimum(torch.maximum(executed, self._low), self._high)
        return {"actions": actions, "env_actions": executed}


class EpsilonGreedy(torch.nn.Module):
    """The best action, or with probability epsilon any: two uniform numbers decide."""

    def __init__(self, space: gym.spaces.Discrete[Any]) -> None:
        super().__init__()
        self._n = int(space.n)
        self._start = int(space.start)
        self.register_buffer("epsilon", torch.zeros(1))

    def forward(self, q: torch.Tensor, noise: torch.Tensor) -> dict[str, torch.Tensor]:
        """``[B, n]`` and ``[B, 2]`` to actions ``[B]``."""
        chosen, which = noise[:, 0], noise[:, 1]
        # In float32 a number just below 1 times n may round to n.
        random = torch.clamp((which * self._n).to(torch.int64), max=self._n - 1)
        action = torch.where(chosen < self.epsilon, random, torch.argmax(q, dim=-1))
        return _from_start(action, self._start) | {"q_values": q}


def _from_start(action: torch.Tensor, start: Any) -> dict[str, torch.Tensor]:
    # RLlib counts from 0 whatever the space's start; the application does not.
    if isinstance(start, int) and start == 0:
        return {"actions": action}
    return {"actions": action, "env_actions": action + start}


def _logp_of_choice(logits: torch.Tensor, choice: torch.Tensor) -> torch.Tensor:
    logps = torch.log_softmax(logits, dim=-1)
    return torch.gather(logps, -1, choice.unsqueeze(-1)).squeeze(-1)
