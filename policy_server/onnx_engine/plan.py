"""Which modules, connectors and spaces have an ONNX graph: ``plan_graph`` decides and builds it.

Only exact types of RLlib's are taken: whatever a user derived may compute something else. Actor
thread only.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from ray.rllib.algorithms.appo.torch.default_appo_torch_rl_module import DefaultAPPOTorchRLModule
from ray.rllib.algorithms.dqn.torch.default_dqn_torch_rl_module import DefaultDQNTorchRLModule
from ray.rllib.algorithms.ppo.torch.default_ppo_torch_rl_module import DefaultPPOTorchRLModule
from ray.rllib.algorithms.sac.torch.default_sac_torch_rl_module import DefaultSACTorchRLModule
from ray.rllib.connectors.module_to_env import (
    NormalizeAndClipActions,
)
from ray.rllib.core.distribution.torch.torch_distribution import (
    TorchCategorical,
    TorchDiagGaussian,
    TorchMultiCategorical,
    TorchSquashedGaussian,
)
from ray.rllib.core.models.torch.encoder import TorchCNNEncoder, TorchMLPEncoder
from ray.rllib.core.models.torch.heads import TorchFreeLogStdMLPHead, TorchMLPHead

from client_sdk.policy_spec import FilterSpec, InputSpec, NoiseSpec
from policy_server.onnx_engine.actions import (
    BoxActions,
    Categorical,
    DiagGaussian,
    EpsilonGreedy,
    MultiCategorical,
    SquashedGaussian,
)
from policy_server.onnx_engine.connectors import (
    executed_connector,
    observation_connectors,
    observation_filter,
    observation_steps,
)
from policy_server.onnx_engine.graphs import AtomsNet, GaussianNet, LogitNet, PolicyGraph, QNet
from policy_server.onnx_engine.operators import NotExportableError

_MODULES = (
    DefaultPPOTorchRLModule,
    DefaultAPPOTorchRLModule,
    DefaultDQNTorchRLModule,
    DefaultSACTorchRLModule,
)
_GAUSSIANS: dict[type, tuple[type[DiagGaussian | SquashedGaussian], str]] = {
    TorchDiagGaussian: (DiagGaussian, "diag_gaussian"),
    TorchSquashedGaussian: (SquashedGaussian, "squashed_gaussian"),
}
_FLOATS = (np.dtype(np.float32), np.dtype(np.float64))


@dataclasses.dataclass(frozen=True)
class GraphPlan:
    """How to export one module."""

    graph: PolicyGraph
    """Shares its parameters with the module that it was planned for."""
    inputs: tuple[InputSpec, ...]
    noise: NoiseSpec
    distribution: str
    observation_filter: FilterSpec | None
    recorded: tuple[str, ...]
    """Roles that RLlib's learners want in ``extra_model_outputs``."""

    def example(self, rows: int) -> tuple[torch.Tensor, ...]:
        """Inputs of the graph, all zero."""
        leaves = [
            torch.zeros((rows, *each.shape), dtype=getattr(torch, each.dtype))
            for each in self.inputs
        ]
        return (*leaves, torch.zeros((rows, self.noise.size)))

    def output_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of one row of each output of the graph, by name, in order."""
        with torch.no_grad():
            found = self.graph.results(*self.example(1))
        return {name: tuple(tensor.shape[1:]) for name, tensor in found.items()}


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
    kind = type(module)
    if kind not in _MODULES:
        raise NotExportableError(f"{kind.__name__} has no graph")
    if module.is_stateful():
        raise NotExportableError(f"{kind.__name__} is recurrent")
    connectors = observation_connectors(env_to_module)
    executed = executed_connector(module_to_env)
    observe, inputs = observation_steps(observation_space, connectors)
    recorded: tuple[str, ...] = ()
    if kind is DefaultDQNTorchRLModule:
        net, act, noise = _q_parts(module, action_space)
        distribution = "epsilon_greedy"
    else:
        net, act, noise, distribution = _actor_parts(module, action_space, executed)
        if kind is not DefaultSACTorchRLModule:
            recorded = ("action_logp", "action_dist_inputs")
    graph = PolicyGraph(observe, net, act)
    graph.eval()
    return GraphPlan(graph, inputs, noise, distribution, observation_filter(connectors), recorded)


def is_rllibs_own(module: Any, env_to_module: Any, module_to_env: Any) -> bool:
    """Whether nothing of the user's own is between observations and actions."""
    try:
        observation_connectors(env_to_module)
        executed_connector(module_to_env)
    except NotExportableError:
        return False
    return type(module) in _MODULES


def _actor_parts(
    module: Any, space: gym.Space[Any], executed: NormalizeAndClipActions
) -> tuple[torch.nn.Module, torch.nn.Module, NoiseSpec, str]:
    encoder = _actor_encoder(module)
    _take_only(encoder, "encoder", TorchMLPEncoder, TorchCNNEncoder)
    _take_only(module.pi, "pi head", TorchMLPHead, TorchFreeLogStdMLPHead)
    sampled = module.get_exploration_action_dist_cls()
    if module.get_inference_action_dist_cls() is not sampled:
        raise NotExportableError("it explores with another distribution than it exploits with")
    if isinstance(space, gym.spaces.Box) and sampled in _GAUSSIANS:
        if len(space.shape) != 1 or space.dtype not in _FLOATS:
            raise NotExportableError(f"actions of {space} have no graph")
        made = BoxActions(
            space, normalize=bool(executed.normalize_actions), clip=bool(executed.clip_actions)
        )
        gaussian, distribution = _GAUSSIANS[sampled]
        noise = NoiseSpec("normal", space.shape[0], 0.0)
        net = GaussianNet(encoder, module.pi, space.shape[0])
        return net, gaussian(space, made), noise, distribution
    if getattr(module.pi, "clip_log_std", False):
        raise NotExportableError("its pi head clips logits")
    logits = LogitNet(encoder, module.pi)
    if isinstance(space, gym.spaces.Discrete) and sampled is TorchCategorical:
        return logits, Categorical(space), NoiseSpec("gumbel", int(space.n), 0.0), "categorical"
    # RLlib derives one class per MultiDiscrete space, in a closure.
    closure = sampled.__bases__ == (TorchMultiCategorical,)
    if isinstance(space, gym.spaces.MultiDiscrete) and space.nvec.ndim == 1 and closure:
        noise = NoiseSpec("gumbel", int(space.nvec.sum()), 0.0)
        return logits, MultiCategorical(space), noise, "multi_categorical"
    raise NotExportableError(f"{type(space).__name__} actions of {_kind_of(sampled)} have no graph")


def _actor_encoder(module: Any) -> Any:
    if isinstance(module, DefaultSACTorchRLModule):
        return module.pi_encoder
    encoders = module.encoder
    return encoders.encoder if hasattr(encoders, "encoder") else encoders.actor_encoder


def _q_parts(
    module: Any, space: gym.Space[Any]
) -> tuple[torch.nn.Module, torch.nn.Module, NoiseSpec]:
    if not isinstance(space, gym.spaces.Discrete):
        raise NotExportableError(f"Q-values of {type(space).__name__} actions have no graph")
    if module.get_exploration_action_dist_cls() is not TorchCategorical:
        raise NotExportableError("a custom action distribution")
    _take_only(module.encoder, "encoder", TorchMLPEncoder, TorchCNNEncoder)
    for head in (module.af, module.vf) if module.uses_dueling else (module.af,):
        _take_only(head, "head", TorchMLPHead)
    # A first number of 1 is never below epsilon, which is at most 1.
    net = QNet(module) if module.num_atoms == 1 else AtomsNet(module)
    return net, EpsilonGreedy(space), NoiseSpec("uniform", 2, 1.0)


def _take_only(part: Any, what: str, *kinds: type) -> None:
    if type(part) not in kinds:
        raise NotExportableError(f"custom {what} {type(part).__name__}")


def _kind_of(distribution: type) -> str:
    """A distribution's name; RLlib's partial classes carry the repr of their parent instead."""
    return next(each.__name__ for each in distribution.__mro__ if "<" not in each.__name__)
