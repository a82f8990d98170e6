"""Which modules, connectors and spaces have an ONNX graph: ``plan_graph`` decides and builds it.

Only exact types of RLlib's are taken: whatever a user derived may compute something else. Actor
thread only.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import tree
from ray.rllib.algorithms.appo.torch.default_appo_torch_rl_module import DefaultAPPOTorchRLModule
from ray.rllib.algorithms.dqn.torch.default_dqn_torch_rl_module import DefaultDQNTorchRLModule
from ray.rllib.algorithms.ppo.torch.default_ppo_torch_rl_module import DefaultPPOTorchRLModule
from ray.rllib.algorithms.sac.torch.default_sac_torch_rl_module import DefaultSACTorchRLModule
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
    TorchSquashedGaussian,
)
from ray.rllib.core.models.torch.encoder import TorchCNNEncoder, TorchMLPEncoder
from ray.rllib.core.models.torch.heads import TorchFreeLogStdMLPHead, TorchMLPHead
from ray.rllib.utils.spaces.space_utils import get_base_struct_from_space

from client_sdk.onnx_policy import FilterSpec, InputSpec, NoiseSpec
from client_sdk.wire.leaves import child_path
from policy_server.filters import MeanStdFilter as ExactMeanStdFilter
from policy_server.onnx_actions import (
    BoxActions,
    Categorical,
    DiagGaussian,
    EpsilonGreedy,
    MultiCategorical,
    SquashedGaussian,
)
from policy_server.onnx_graphs import AtomsNet, GaussianNet, LogitNet, PolicyGraph, QNet
from policy_server.onnx_observations import Flatten, Standardize

_MODULES = (
    DefaultPPOTorchRLModule,
    DefaultAPPOTorchRLModule,
    DefaultDQNTorchRLModule,
    DefaultSACTorchRLModule,
)
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
_GAUSSIANS: dict[type, tuple[type[DiagGaussian | SquashedGaussian], str]] = {
    TorchDiagGaussian: (DiagGaussian, "diag_gaussian"),
    TorchSquashedGaussian: (SquashedGaussian, "squashed_gaussian"),
}
_FLOATS = (np.dtype(np.float32), np.dtype(np.float64))


class NotExportableError(Exception):
    """Why a module has no ONNX graph: one line, for the log."""


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
    connectors = _observation_connectors(env_to_module)
    executed = _executed_connector(module_to_env)
    observe, inputs = _observations(observation_space, connectors)
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
    return GraphPlan(graph, inputs, noise, distribution, _filter(connectors), recorded)


def is_rllibs_own(module: Any, env_to_module: Any, module_to_env: Any) -> bool:
    """Whether nothing of the user's own is between observations and actions."""
    try:
        _observation_connectors(env_to_module)
        _executed_connector(module_to_env)
    except NotExportableError:
        return False
    return type(module) in _MODULES


# -- modules


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
    if isinstance(space, gym.spaces.MultiDiscrete) and sampled.__bases__ == (
        TorchMultiCategorical,
    ):
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


# -- connectors and observations


def _observation_connectors(env_to_module: Any) -> list[Any]:
    """What stands before RLlib's default pieces."""
    pieces = list(env_to_module.connectors)
    custom = pieces[: -len(_ENV_TO_MODULE_DEFAULTS)]
    if tuple(map(type, pieces[len(custom) :])) != _ENV_TO_MODULE_DEFAULTS:
        raise NotExportableError("the env-to-module pipeline lacks RLlib's default pieces")
    for piece in custom:
        flattens = type(piece) is FlattenObservations and not piece._as_learner_connector
        filters = type(piece) in {MeanStdFilter, ExactMeanStdFilter}
        if not (flattens or filters) or piece._multi_agent:
            raise NotExportableError(f"env-to-module connector {type(piece).__name__}")
    return custom


def _filter(connectors: Sequence[Any]) -> FilterSpec | None:
    filters = [each for each in connectors if isinstance(each, MeanStdFilter)]
    if not filters:
        return None
    if len(filters) > 1:
        raise NotExportableError("more than one MeanStdFilter")
    clip = filters[0].clip_by_value
    return FilterSpec("mean_std", float(clip) if clip else None)


def _executed_connector(module_to_env: Any) -> NormalizeAndClipActions:
    """The piece that turns the module's actions into the application's."""
    pieces = list(module_to_env.connectors)
    for piece in pieces:
        if type(piece) not in _MODULE_TO_ENV_DEFAULTS:
            raise NotExportableError(f"module-to-env connector {type(piece).__name__}")
    if tuple(map(type, pieces)) != _MODULE_TO_ENV_DEFAULTS:
        raise NotExportableError("the module-to-env pipeline lacks RLlib's default pieces")
    return pieces[_MODULE_TO_ENV_DEFAULTS.index(NormalizeAndClipActions)]


def _observations(
    space: gym.Space[Any], connectors: Sequence[Any]
) -> tuple[list[torch.nn.Module], tuple[InputSpec, ...]]:
    """Steps from the leaves to the encoder's input, and the leaves as inputs of the graph."""
    struct = get_base_struct_from_space(space)
    removed = getattr(connectors[0], "_keys_to_remove", None) if connectors else None
    if removed:
        struct = {key: child for key, child in struct.items() if key not in removed}
    # RLlib's order: tree sorts keys.
    leaves = {
        child_path([str(part) for part in path]): leaf
        for path, leaf in tree.flatten_with_path(struct)
    }
    spaces: list[gym.Space[Any]] = list(leaves.values())
    steps: list[torch.nn.Module] = []
    for connector in connectors:
        if isinstance(connector, FlattenObservations):
            try:
                steps.append(Flatten(spaces))
            except ValueError as error:
                raise NotExportableError(str(error)) from error
        else:
            _check_floats(spaces)
            steps.append(Standardize(connector))
        spaces = [connector.observation_space]
    _check_floats(spaces)
    return steps, tuple(
        InputSpec(path, name, _input_dtype(leaf), tuple(leaf.shape or ()))
        for (path, leaf), name in zip(leaves.items(), _input_names(leaves), strict=True)
    )


def _check_floats(spaces: Sequence[gym.Space[Any]]) -> None:
    """What networks and filters take as it is."""
    if len(spaces) == 1 and isinstance(spaces[0], gym.spaces.Box) and spaces[0].dtype in _FLOATS:
        return
    names = ", ".join(str(each) for each in spaces[:3])
    raise NotExportableError(
        f"RLlib's networks take one Box of floats, not {names}: a connector must make one, such as "
        "FlattenObservations"
    )


def _input_dtype(leaf: gym.Space[Any]) -> str:
    # Double precision is the simulators'; networks compute in single.
    dtype = np.dtype(leaf.dtype)
    return "float32" if dtype.kind == "f" else dtype.name


def _input_names(paths: Collection[str]) -> list[str]:
    if len(paths) == 1:
        return ["obs"]
    # Other runtimes make identifiers of names; the metadata maps names to paths.
    return [f"obs_{index}_" + re.sub(r"\W", "_", path) for index, path in enumerate(paths)]
