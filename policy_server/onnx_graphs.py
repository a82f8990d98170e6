"""The small torch modules that policies are exported from, never the RLModule itself.

A graph is three parts in a row: raw observation leaves to the encoder's input (what the
env-to-module connectors do), that to distribution inputs (the module), those and noise to actions
(what the module-to-env connectors do). B is the batch size, the only dynamic dimension; nothing here
may look at it, or the exporter makes a constant of it. Actor thread only.

What a later version refreshes is a parameter or a buffer, and is used only together with data: an
exporter folds what it can compute from parameters alone, and no version would replace the result.
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
from ray.rllib.core.models.torch.heads import TorchFreeLogStdMLPHead
from ray.rllib.utils.filter import RunningStat
from ray.rllib.utils.numpy import SMALL_NUMBER

from policy_server.filters import MeanStdFilter as ExactMeanStdFilter

_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


class PolicyGraph(torch.nn.Module):
    """Raw observation leaves and noise to everything that inference gives, as a tuple.

    Args:
        observe: Takes and returns a list of tensors, as each of its steps does.
        net: The last of those to distribution inputs.
        act: Distribution inputs and noise to outputs by name.
    """

    def __init__(
        self, observe: Sequence[torch.nn.Module], net: torch.nn.Module, act: torch.nn.Module
    ) -> None:
        super().__init__()
        self.observe = torch.nn.ModuleList(observe)
        self.net = net
        self.act = act

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The leaves in order, then the noise."""
        return tuple(self.results(*inputs).values())

    def results(self, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """The same, by the names of the outputs."""
        leaves: Sequence[torch.Tensor] = inputs[:-1]
        for step in self.observe:
            leaves = step(leaves)
        found: dict[str, torch.Tensor] = self.act(self.net(leaves[0]), inputs[-1])
        return found

    def refresh(self, epsilon: float) -> None:
        """Read again what is not a trained tensor: filter statistics, and epsilon as given."""
        for step in self.observe:
            if isinstance(step, Standardize):
                step.refresh()
        if isinstance(self.act, EpsilonGreedy):
            self.act.epsilon.fill_(epsilon)


# -- observations to the encoder's input


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


def _positions(space: gym.Space[Any]) -> list[torch.Tensor] | None:
    sizes = one_hot_sizes(space)
    if sizes is None:
        return None
    dtype = getattr(torch, np.dtype(space.dtype).name)
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


# -- the encoder's input to distribution inputs


class LogitNet(torch.nn.Module):
    """Encoder and pi head of a default actor-critic module with discrete actions."""

    def __init__(self, encoder: torch.nn.Module, head: torch.nn.Module) -> None:
        super().__init__()
        self.encoder = encoder.net
        self.head = head.net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, ...]`` to logits ``[B, n]``."""
        return self.head(self.encoder(x))


class GaussianNet(torch.nn.Module):
    """The same with Box actions."""

    def __init__(self, encoder: torch.nn.Module, head: torch.nn.Module) -> None:
        super().__init__()
        self.encoder = encoder.net
        self.head = head.net
        self.log_std = head.log_std if isinstance(head, TorchFreeLogStdMLPHead) else None
        self._bound = float(head.log_std_clip_param) if head.clip_log_std else None

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``[B, ...]`` to mean and log of the standard deviation, ``[B, d]`` each."""
        y = self.head(self.encoder(x))
        if self.log_std is None:
            mean, log_std = torch.chunk(y, 2, dim=-1)
        else:
            # Not expand(): that would make a constant of B.
            mean, log_std = y, self.log_std + y * 0.0
        if self._bound is not None:
            log_std = torch.clamp(log_std, -self._bound, self._bound)
        return mean, log_std


class QNet(torch.nn.Module):
    """Q-values of a default DQN module, dueling or not."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.encoder = module.encoder.net
        self.af = module.af.net
        self.vf = module.vf.net if module.uses_dueling else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, ...]`` to ``[B, n]``."""
        y = self.encoder(x)
        q = self.af(y)
        if self.vf is None:
            return q
        # RLlib takes a nanmean that leaves out masked (-inf) advantages; there are none here, and
        # nanmean has no ONNX form.
        return q - q.mean(dim=-1, keepdim=True) + self.vf(y)


# -- distribution inputs and noise to actions


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
    """Mean plus noise times standard deviation; then as ``NormalizeAndClipActions`` has it."""

    def __init__(self, space: gym.spaces.Box, *, normalize: bool, clip: bool) -> None:
        super().__init__()
        # RLlib unsquashes only what is bounded everywhere, and clips only where it does not
        # normalize: an unbounded space with normalize_actions is executed as it comes.
        self._unsquash = normalize and space.is_bounded("both")
        self._clip = self._unsquash or (clip and not normalize)
        self._dtype = getattr(torch, np.dtype(space.dtype).name)
        self._low, self._high = torch.from_numpy(space.low), torch.from_numpy(space.high)
        self._same_bounds = len({*space.low.tolist()}) == len({*space.high.tolist()}) == 1

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
        constant = -_HALF_LOG_2PI * self._low.numel()
        logp = constant - (0.5 * (standard * standard) + log_std).sum(dim=-1)
        found = {
            "actions": action,
            "action_logp": logp,
            "action_dist_inputs": torch.cat(inputs, dim=-1),
        }
        if self._unsquash or self._clip or self._dtype != action.dtype:
            found["env_actions"] = self._executed(action.to(self._dtype))
        return found

    def _executed(self, action: torch.Tensor) -> torch.Tensor:
        if self._unsquash:
            half = (self._high - self._low) / 2.0
            action = action * half + (self._low + half)
        if self._clip and self._same_bounds:
            action = torch.clamp(action, float(self._low[0]), float(self._high[0]))
        elif self._clip:
            action = torch.minimum(torch.maximum(action, self._low), self._high)
        return action


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
