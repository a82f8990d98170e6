"""Which RLlib modules have an ONNX graph, and the small torch modules it is exported from.

``plan_graph`` decides; its answer wraps the module's own layers, never the RLModule itself. B is
the batch size, the only dynamic dimension. Actor thread only.

A graph is three parts in a row: raw observation leaves to the encoder's input (what the
env-to-module connectors do), that to distribution inputs (the module), those and noise to actions
(what the module-to-env connectors do). Nothing in them may look at B: the legacy exporter freezes it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import tree
from numpy.typing import NDArray
from ray.rllib.algorithms.appo.torch.default_appo_torch_rl_module import DefaultAPPOTorchRLModule
from ray.rllib.algorithms.dqn.torch.default_dqn_torch_rl_module import DefaultDQNTorchRLModule
from ray.rllib.algorithms.ppo.torch.default_ppo_torch_rl_module import DefaultPPOTorchRLModule
from ray.rllib.connectors.common import (
    AddObservationsFromEpisodesToBatch,
    AddStatesFromEpisodesToBatch,
    AddTimeDimToBatchAndZeroPad,
    BatchIndividualItems,
    NumpyToTensor,
    TensorToNumpy,
)
from ray.rllib.connectors.common.flatten_observations import FlattenObservations
from ray.rllib.connectors.env_to_module import MeanStdFilter
from ray.rllib.connectors.module_to_env import (
    GetActions,
    ListifyDataForVectorEnv,
    NormalizeAndClipActions,
    RemoveSingleTsTimeRankFromBatch,
    UnBatchToIndividualItems,
)
from ray.rllib.core.distribution.torch.torch_distribution import (
    TorchCategorical,
    TorchDiagGaussian,
    TorchMultiCategorical,
)
from ray.rllib.core.models.torch.encoder import TorchCNNEncoder, TorchMLPEncoder
from ray.rllib.core.models.torch.heads import TorchFreeLogStdMLPHead, TorchMLPHead
from ray.rllib.utils.filter import RunningStat
from ray.rllib.utils.numpy import SMALL_NUMBER
from ray.rllib.utils.spaces.space_utils import get_base_struct_from_space

from client_sdk.onnx_policy import InputSpec, NoiseSpec
from client_sdk.wire.leaves import child_path

_ENV_TO_MODULE_DEFAULTS = (
    AddObservationsFromEpisodesToBatch,
    AddTimeDimToBatchAndZeroPad,
    AddStatesFromEpisodesToBatch,
    BatchIndividualItems,
    NumpyToTensor,
)
_MODULE_TO_ENV_DEFAULTS = (
    GetActions,
    TensorToNumpy,
    UnBatchToIndividualItems,
    RemoveSingleTsTimeRankFromBatch,
    NormalizeAndClipActions,
    ListifyDataForVectorEnv,
)
_ACTOR_CRITIC_MODULES = (DefaultPPOTorchRLModule, DefaultAPPOTorchRLModule)

_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)
_INPUT_DTYPES = {
    # Observations in double precision are for simulators; networks compute in single.
    np.dtype(np.float16): np.dtype(np.float32),
    np.dtype(np.float64): np.dtype(np.float32),
}


class NotExportableError(Exception):
    """Why a module has no ONNX graph: one line, for the log."""


# -- observations to the encoder's input


class FlattenLeaves(torch.nn.Module):
    """``FlattenObservations``: leaves in RLlib's order, flattened or one-hot, side by side."""

    def __init__(self, spaces: Sequence[gym.Space[Any]]) -> None:
        super().__init__()
        # Per leaf its flat size, and the one-hot positions of each of its numbers or None.
        self._leaves = [(math.prod(space.shape or ()), _positions(space)) for space in spaces]

    def forward(self, leaves: Sequence[torch.Tensor]) -> torch.Tensor:
        """``[B, *shape]`` for each leaf to ``[B, sum of sizes]``."""
        parts: list[torch.Tensor] = []
        for leaf, (size, positions) in zip(leaves, self._leaves, strict=True):
            # -1 for the batch, not for the rest: the other way round B becomes a constant.
            flat = leaf.reshape(-1, size)
            if positions is None:
                parts.append(flat.to(torch.float32))
                continue
            parts += [
                (flat[:, i : i + 1] == each).to(torch.float32) for i, each in enumerate(positions)
            ]
        return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]


class Standardize(torch.nn.Module):
    """``MeanStdFilter`` with the statistics of one moment, refreshed with each version.

    The mean comes in two parts, so that values far from zero lose no precision to float32.
    """

    def __init__(self, connector: MeanStdFilter, shape: tuple[int, ...]) -> None:
        super().__init__()
        self._connector = connector
        self._shape = shape
        for name, value in self.statistics().items():
            self.register_buffer(name, torch.from_numpy(value))

    def statistics(self) -> dict[str, NDArray[np.float32]]:
        """The connector's statistics as they are now, by the name of the buffer."""
        state = self._connector.get_state()[None]
        (stats,) = (RunningStat.from_state(each) for each in state["running_stats"])
        mean = np.asarray(stats.mean, np.float64).reshape(self._shape)
        if not state["de_mean_to_zero"]:
            mean = np.zeros(self._shape)
        divisor = np.asarray(stats.std, np.float32).reshape(self._shape) + np.float32(SMALL_NUMBER)
        if not state["de_std_to_one"]:
            divisor = np.ones(self._shape, np.float32)
        clip = state["clip_by_value"] or np.finfo(np.float32).max
        coarse = mean.astype(np.float32)
        return {
            "mean": coarse,
            "mean_rest": (mean - coarse).astype(np.float32),
            "divisor": divisor,
            # Both, though one is the other's negative: the exporter would fold the negation.
            "low": np.full((1,), -clip, np.float32),
            "high": np.full((1,), clip, np.float32),
        }

    def refresh(self) -> None:
        """Take the connector's statistics as they are now."""
        for name, value in self.statistics().items():
            getattr(self, name).copy_(torch.from_numpy(value))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, *shape]`` to the same."""
        x = ((x - self.mean) - self.mean_rest) / self.divisor
        return torch.minimum(torch.maximum(x, self.low), self.high)


class Observe(torch.nn.Module):
    """What the env-to-module connectors make of an observation."""

    def __init__(
        self, leaves: Sequence[gym.Space[Any]], connectors: Sequence[Any], space: gym.Space[Any]
    ) -> None:
        super().__init__()
        steps: list[torch.nn.Module] = []
        flat = False
        for connector in connectors:
            if isinstance(connector, FlattenObservations):
                steps.append(FlattenLeaves(leaves if not flat and not steps else [space]))
                flat = True
            else:
                shape = connector.input_observation_space.shape
                steps.append(Standardize(connector, tuple(shape)))
            space = connector.observation_space
        self.steps = torch.nn.ModuleList(steps)

    def forward(self, leaves: Sequence[torch.Tensor]) -> torch.Tensor:
        """``[B, *shape]`` for each leaf to the encoder's input."""
        x: Any = leaves
        for step in self.steps:
            if isinstance(step, FlattenLeaves) and not isinstance(x, list | tuple):
                x = step([x])
            elif isinstance(step, Standardize) and isinstance(x, list | tuple):
                x = step(x[0])
            else:
                x = step(x)
        return x[0] if isinstance(x, list | tuple) else x


# -- the encoder's input to distribution inputs


class PolicyNet(torch.nn.Module):
    """Encoder and pi head of a default actor-critic module, stateless."""

    def __init__(self, encoder: torch.nn.Module, head: torch.nn.Module) -> None:
        super().__init__()
        self.encoder = encoder.net
        self.head = head.net
        self.log_std = head.log_std if isinstance(head, TorchFreeLogStdMLPHead) else None
        self._bound = float(head.log_std_clip_param) if head.clip_log_std else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, ...]`` to ``[B, distribution inputs]``."""
        y = self.head(self.encoder(x))
        if self.log_std is not None:
            # Not expand(): that would freeze B. Nor a clamp of the parameter alone: exporters fold
            # it into a constant that no later version replaces.
            mean, log_std = y, self.log_std + y * 0.0
        elif self._bound is not None:
            mean, log_std = torch.chunk(y, 2, dim=-1)
        else:
            return y
        if self._bound is not None:
            log_std = torch.clamp(log_std, -self._bound, self._bound)
        return torch.cat((mean, log_std), dim=-1)


class QNet(torch.nn.Module):
    """Q-values of a default DQN module, dueling or not."""

    def __init__(self, module: DefaultDQNTorchRLModule) -> None:
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

    def __init__(self, space: gym.spaces.Discrete) -> None:
        super().__init__()
        self._start = int(space.start)

    def forward(self, logits: torch.Tensor, noise: torch.Tensor) -> dict[str, torch.Tensor]:
        """``[B, n]`` each to actions and their log-probabilities ``[B]``."""
        action = torch.argmax(logits + noise, dim=-1)
        return _shifted(action, self._start) | {
            "action_logp": _logp_of_choice(logits, action),
            "action_dist_inputs": logits,
        }


class MultiCategorical(torch.nn.Module):
    """The same for several choices at once."""

    def __init__(self, space: gym.spaces.MultiDiscrete) -> None:
        super().__init__()
        self._sizes = [int(n) for n in space.nvec]
        start = np.asarray(space.start, np.int64)
        self._start = torch.from_numpy(start) if start.any() else None
        self._dtype = getattr(torch, space.dtype.name)

    def forward(self, logits: torch.Tensor, noise: torch.Tensor) -> dict[str, torch.Tensor]:
        """``[B, sum of n]`` each to actions ``[B, k]`` and their log-probabilities ``[B]``."""
        k, n = len(self._sizes), self._sizes[0]
        if all(size == n for size in self._sizes):
            table, noisy = logits.reshape(-1, k, n), (logits + noise).reshape(-1, k, n)
            action = torch.argmax(noisy, dim=-1)
            logp = _logp_of_choice(table, action).sum(dim=-1)
        else:
            parts = logits.split(self._sizes, dim=-1)
            choices = [
                torch.argmax(part, dim=-1) for part in (logits + noise).split(self._sizes, dim=-1)
            ]
            action = torch.stack(choices, dim=-1)
            logps = [_logp_of_choice(p, c) for p, c in zip(parts, choices, strict=True)]
            logp = torch.stack(logps, dim=-1).sum(dim=-1)
        executed = _shifted(action, self._start)
        if self._dtype != torch.int64:
            executed["env_actions"] = executed.get("env_actions", action).to(self._dtype)
        return executed | {"action_logp": logp, "action_dist_inputs": logits}


class DiagGaussian(torch.nn.Module):
    """Mean plus noise times standard deviation; then as ``NormalizeAndClipActions`` has it."""

    def __init__(self, space: gym.spaces.Box, *, normalize: bool, clip: bool) -> None:
        super().__init__()
        # RLlib unsquashes only what is bounded everywhere, and clips only where it does not
        # normalize: an unbounded space with normalize_actions is executed as it comes.
        bounded = bool(np.all(space.bounded_below) and np.all(space.bounded_above))
        self._unsquash = normalize and bounded
        self._clip = self._unsquash or (clip and not normalize)
        self._low = torch.from_numpy(space.low.copy())
        self._high = torch.from_numpy(space.high.copy())
        self._width = torch.from_numpy(space.high - space.low) if bounded else None
        self._dtype = self._low.dtype

    def forward(self, inputs: torch.Tensor, noise: torch.Tensor) -> dict[str, torch.Tensor]:
        """``[B, 2 d]`` and ``[B, d]`` to actions ``[B, d]`` and their log-densities ``[B]``."""
        mean, log_std = torch.chunk(inputs, 2, dim=-1)
        std = torch.exp(log_std)
        action = mean + std * noise
        # From the rounded action, not from the noise: the learner sees the action only, and its
        # ratio to this density must be 1 before the first update.
        standard = (action - mean) / std
        logp = (-0.5 * standard * standard - log_std - _HALF_LOG_2PI).sum(dim=-1)
        result = {"actions": action, "action_logp": logp, "action_dist_inputs": inputs}
        executed = action.to(self._dtype)
        if self._unsquash:
            executed = self._low + (executed + 1.0) * self._width / 2.0
        if self._clip:
            executed = torch.minimum(torch.maximum(executed, self._low), self._high)
        if executed is not action:
            result["env_actions"] = executed
        return result


class EpsilonGreedy(torch.nn.Module):
    """The best action, or with probability epsilon any: two uniform numbers decide."""

    def __init__(self, space: gym.spaces.Discrete) -> None:
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
        return _shifted(action, self._start) | {"q_values": q}


def _shifted(action: torch.Tensor, start: Any) -> dict[str, torch.Tensor]:
    # RLlib counts from 0 whatever the space's start; the application does not.
    if start is None or (isinstance(start, int) and start == 0):
        return {"actions": action}
    return {"actions": action, "env_actions": action + start}


def _logp_of_choice(logits: torch.Tensor, choice: torch.Tensor) -> torch.Tensor:
    logps = torch.log_softmax(logits, dim=-1)
    return torch.gather(logps, -1, choice.unsqueeze(-1)).squeeze(-1)


# -- the whole


class PolicyGraph(torch.nn.Module):
    """Raw observation leaves and noise to everything that inference gives, as a tuple."""

    def __init__(self, observe: Observe, net: torch.nn.Module, act: torch.nn.Module) -> None:
        super().__init__()
        self.observe = observe
        self.net = net
        self.act = act

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The leaves in order, then the noise."""
        return tuple(self.results(*inputs).values())

    def results(self, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """The same, by the names of the outputs."""
        found: dict[str, torch.Tensor] = self.act(self.net(self.observe(inputs[:-1])), inputs[-1])
        return found

    def refresh(self, epsilon: float) -> None:
        """Read again what is not a trained tensor: filter statistics, and epsilon as given."""
        for step in self.observe.steps:
            if isinstance(step, Standardize):
                step.refresh()
        if isinstance(self.act, EpsilonGreedy):
            self.act.epsilon.fill_(epsilon)


@dataclasses.dataclass(frozen=True)
class GraphPlan:
    """How to export one module."""

    graph: PolicyGraph
    """Shares its parameters with the module that it was planned for."""
    inputs: tuple[InputSpec, ...]
    noise: NoiseSpec
    distribution: str
    recorded: tuple[str, ...]
    """Roles that RLlib's learners want in ``extra_model_outputs``."""

    def example(self, rows: int) -> tuple[torch.Tensor, ...]:
        """Inputs of the graph, all zero."""
        leaves = [
            torch.zeros((rows, *each.shape), dtype=getattr(torch, each.dtype))
            for each in self.inputs
        ]
        return (*leaves, torch.zeros((rows, self.noise.size)))

    def output_names(self) -> tuple[str, ...]:
        """Of the graph, in order."""
        with torch.no_grad():
            return tuple(self.graph.results(*self.example(1)))


def plan_graph(
    module: Any,
    observation_space: gym.Space[Any],
    action_space: gym.Space[Any],
    env_to_module: Any,
    module_to_env: Any,
) -> GraphPlan:
    """How to export a module with its connectors.

    Raises:
        NotExportableError: It has no graph; the message says why.
    """
    connectors = _known_connectors(env_to_module)
    actions = _known_actions(module_to_env)
    spaces, inputs = _observation_inputs(observation_space, connectors)
    net, act, noise, distribution, recorded = _network(module, action_space, actions)
    graph = PolicyGraph(Observe(spaces, connectors, observation_space), net, act)
    graph.eval()
    return GraphPlan(graph, inputs, noise, distribution, recorded)


def _network(
    module: Any, space: gym.Space[Any], actions: NormalizeAndClipActions
) -> tuple[torch.nn.Module, torch.nn.Module, NoiseSpec, str, tuple[str, ...]]:
    kind = type(module)
    if kind not in {*_ACTOR_CRITIC_MODULES, DefaultDQNTorchRLModule}:
        raise NotExportableError(f"{kind.__name__} is no module of RLlib's that has a graph here")
    if module.is_stateful():
        raise NotExportableError(f"{kind.__name__} is recurrent")
    if kind is DefaultDQNTorchRLModule:
        return _q_network(module, space)
    encoders = module.encoder
    encoder = _known_encoder(
        encoders.encoder if hasattr(encoders, "encoder") else encoders.actor_encoder
    )
    head = _known_head(module.pi)
    net = PolicyNet(encoder, head)
    sampled = module.get_exploration_action_dist_cls()
    if module.get_inference_action_dist_cls() is not sampled:
        raise NotExportableError("it explores with another distribution than it exploits with")
    recorded = ("action_logp", "action_dist_inputs")
    if isinstance(space, gym.spaces.Discrete) and sampled is TorchCategorical:
        noise = NoiseSpec("gumbel", int(space.n), 0.0)
        return net, Categorical(space), noise, "categorical", recorded
    if (
        isinstance(space, gym.spaces.MultiDiscrete)
        and space.nvec.ndim == 1
        # RLlib derives one class per space, by a closure.
        and sampled.__mro__[1] is TorchMultiCategorical
    ):
        noise = NoiseSpec("gumbel", int(space.nvec.sum()), 0.0)
        return net, MultiCategorical(space), noise, "multi_categorical", recorded
    if isinstance(space, gym.spaces.Box) and sampled is TorchDiagGaussian:
        if len(space.shape) != 1 or space.dtype not in (np.float32, np.float64):
            raise NotExportableError(f"actions of {space} have no graph")
        act = DiagGaussian(
            space, normalize=bool(actions.normalize_actions), clip=bool(actions.clip_actions)
        )
        return net, act, NoiseSpec("normal", space.shape[0], 0.0), "diag_gaussian", recorded
    raise NotExportableError(f"{sampled.__name__} over {type(space).__name__} actions has no graph")


def _q_network(
    module: DefaultDQNTorchRLModule, space: gym.Space[Any]
) -> tuple[torch.nn.Module, torch.nn.Module, NoiseSpec, str, tuple[str, ...]]:
    if module.num_atoms != 1:
        raise NotExportableError(f"distributional Q-learning (num_atoms={module.num_atoms})")
    if not isinstance(space, gym.spaces.Discrete):
        raise NotExportableError(f"Q-values over {type(space).__name__} actions have no graph")
    if module.get_exploration_action_dist_cls() is not TorchCategorical:
        raise NotExportableError("a custom action distribution")
    _known_encoder(module.encoder)
    for head in (module.af, module.vf) if module.uses_dueling else (module.af,):
        if type(head) is not TorchMLPHead or head.clip_log_std:
            raise NotExportableError(f"custom head {type(head).__name__}")
    # A first number of 1 is never below epsilon, which is at most 1.
    noise = NoiseSpec("uniform", 2, 1.0)
    return QNet(module), EpsilonGreedy(space), noise, "epsilon_greedy", ()


def _known_encoder(encoder: Any) -> Any:
    if type(encoder) not in {TorchMLPEncoder, TorchCNNEncoder}:
        raise NotExportableError(f"custom encoder {type(encoder).__name__}")
    return encoder


def _known_head(head: Any) -> Any:
    if type(head) not in {TorchMLPHead, TorchFreeLogStdMLPHead}:
        raise NotExportableError(f"custom pi head {type(head).__name__}")
    return head


def _known_connectors(env_to_module: Any) -> list[Any]:
    """The observation connectors in front of RLlib's defaults."""
    pieces = list(env_to_module.connectors)
    count = len(_ENV_TO_MODULE_DEFAULTS)
    custom, rest = pieces[:-count], pieces[-count:]
    if tuple(type(piece) for piece in rest) != _ENV_TO_MODULE_DEFAULTS:
        raise NotExportableError("the env-to-module pipeline is not RLlib's default")
    for piece in custom:
        if type(piece) not in {FlattenObservations, MeanStdFilter} or piece._multi_agent:
            raise NotExportableError(f"env-to-module connector {type(piece).__name__}")
    return custom


def _known_actions(module_to_env: Any) -> NormalizeAndClipActions:
    pieces = list(module_to_env.connectors)
    for piece in pieces:
        if type(piece) not in _MODULE_TO_ENV_DEFAULTS:
            raise NotExportableError(f"module-to-env connector {type(piece).__name__}")
    if tuple(type(piece) for piece in pieces) != _MODULE_TO_ENV_DEFAULTS:
        raise NotExportableError("the module-to-env pipeline is not RLlib's default")
    return next(piece for piece in pieces if type(piece) is NormalizeAndClipActions)


def _observation_inputs(
    space: gym.Space[Any], connectors: Sequence[Any]
) -> tuple[list[gym.Space[Any]], tuple[InputSpec, ...]]:
    """The leaves that the graph reads, in the order in which RLlib flattens them."""
    flattened = bool(connectors) and isinstance(connectors[0], FlattenObservations)
    struct = get_base_struct_from_space(space)
    if flattened and connectors[0]._keys_to_remove:
        struct = {k: v for k, v in struct.items() if k not in connectors[0]._keys_to_remove}
    leaves = tree.flatten_with_path(struct)
    if len(leaves) != 1 and not flattened:
        raise NotExportableError(f"{type(space).__name__} observations without FlattenObservations")
    inputs: list[InputSpec] = []
    for index, (parts, leaf) in enumerate(leaves):
        path = child_path([str(part) for part in parts])
        if flattened:
            _one_hot_sizes(leaf)
        elif not isinstance(leaf, gym.spaces.Box) or leaf.dtype not in (np.float32, np.float64):
            raise NotExportableError(
                f"RLlib's networks do not take {leaf} as it is: put a connector before them that "
                "makes float32 of it, such as FlattenObservations"
            )
        for connector in connectors:
            if isinstance(connector, MeanStdFilter):
                _check_filtered(connector.input_observation_space)
        dtype = np.dtype(leaf.dtype)
        inputs.append(
            InputSpec(
                path,
                _input_name(path, index, len(leaves)),
                _INPUT_DTYPES.get(dtype, dtype).name,
                tuple(leaf.shape or ()),
            )
        )
    return [leaf for _, leaf in leaves], tuple(inputs)


def _check_filtered(space: gym.Space[Any]) -> None:
    if not isinstance(space, gym.spaces.Box) or space.dtype not in (np.float32, np.float64):
        raise NotExportableError(f"MeanStdFilter over {space}")


def _one_hot_sizes(space: gym.Space[Any]) -> list[int] | None:
    """Sizes of the one-hot vectors that RLlib makes of a leaf; None where it takes the numbers."""
    if isinstance(space, gym.spaces.Discrete):
        sizes, start = [int(space.n)], int(space.start)
    elif isinstance(space, gym.spaces.MultiDiscrete):
        if space.nvec.ndim != 1:
            raise NotExportableError(f"RLlib cannot flatten {space}")
        sizes, start = [int(n) for n in space.nvec], int(np.abs(space.start).max(initial=0))
    elif isinstance(space, gym.spaces.Box | gym.spaces.MultiBinary):
        return None
    else:
        raise NotExportableError(f"RLlib cannot flatten {space}")
    if start != 0:
        # RLlib's one_hot takes the value itself as the index.
        raise NotExportableError(f"RLlib cannot flatten {space}, which does not start at 0")
    return sizes


def _positions(space: gym.Space[Any]) -> list[torch.Tensor] | None:
    sizes = _one_hot_sizes(space)
    if sizes is None:
        return None
    return [torch.arange(size, dtype=getattr(torch, np.dtype(space.dtype).name)) for size in sizes]


def _input_name(path: str, index: int, count: int) -> str:
    if count == 1:
        return "obs"
    # Other runtimes make identifiers of names; the metadata maps names to paths.
    return f"obs_{index}_" + re.sub(r"\W", "_", path)
