"""The small torch modules that policies are exported from, never the RLModule itself.

A graph is three parts in a row: raw observation leaves to the encoder's input (what the
env-to-module connectors do), that to distribution inputs (the module), those and noise to actions
(what the module-to-env connectors do). B is the batch size, the only dynamic dimension; nothing here
may look at it, or the exporter makes a constant of it. Actor thread only.

What a later version refreshes is a parameter or a buffer, and is used only together with data: an
exporter folds what it can compute from parameters alone, and no version would replace the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from ray.rllib.core.models.torch.heads import TorchFreeLogStdMLPHead

from policy_server.onnx_engine.actions import EpsilonGreedy
from policy_server.onnx_engine.observations import Standardize


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

    def __init__(self, encoder: torch.nn.Module, head: torch.nn.Module, dims: int) -> None:
        super().__init__()
        self.encoder = encoder.net
        self.head = head.net
        self._dims = dims
        self.log_std = head.log_std if isinstance(head, TorchFreeLogStdMLPHead) else None
        self._bound = float(head.log_std_clip_param) if head.clip_log_std else None

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``[B, ...]`` to mean and log of the standard deviation, ``[B, d]`` each."""
        y = self.head(self.encoder(x))
        if self.log_std is None:
            mean, log_std = y[:, : self._dims], y[:, self._dims :]
        else:
            # Not expand(): that would make a constant of B.
            mean, log_std = y, self.log_std + y * 0.0
        if self._bound is not None:
            log_std = torch.clamp(log_std, -self._bound, self._bound)
        return mean, log_std


class AtomsNet(torch.nn.Module):
    """Q-values of a default DQN module that learns their distribution over atoms (C51)."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.encoder = module.encoder.net
        # A dueling module centres the advantages and adds the state's value, each the same for all
        # atoms of an action: softmax does not see either.
        self.af = module.af.net
        self._atoms = int(module.num_atoms)
        self._n = int(module.action_space.n)
        width = (module.v_max - module.v_min) / (self._atoms - 1)
        self._support = module.v_min + width * torch.arange(self._atoms, dtype=torch.float32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, ...]`` to expectations ``[B, n]``."""
        logits = self.af(self.encoder(x)).reshape(-1, self._n, self._atoms)
        return torch.softmax(logits, dim=-1) @ self._support


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
