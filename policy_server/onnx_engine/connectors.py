"""Which connectors and observations have a graph, and which steps it takes. Actor thread only."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import tree
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
from ray.rllib.utils.spaces.space_utils import get_base_struct_from_space

from client_sdk.policy_spec import FilterSpec, InputSpec
from client_sdk.wire.leaves import child_path
from policy_server.filters import MeanStdFilter as ExactMeanStdFilter
from policy_server.onnx_engine.observations import Flatten, Standardize, input_dtype
from policy_server.onnx_engine.operators import NotExportableError

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
_FLOATS = (np.dtype(np.float32), np.dtype(np.float64))


def observation_connectors(env_to_module: Any) -> list[Any]:
    """What stands before RLlib's default pieces.

    Raises:
        NotExportableError: Some of it has no graph.
    """
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


def observation_filter(connectors: Sequence[Any]) -> FilterSpec | None:
    """What the graph does as a filter.

    Raises:
        NotExportableError: There is more than one.
    """
    filters = [each for each in connectors if isinstance(each, MeanStdFilter)]
    if not filters:
        return None
    if len(filters) > 1:
        raise NotExportableError("more than one MeanStdFilter")
    clip = filters[0].clip_by_value
    return FilterSpec("mean_std", float(clip) if clip else None)


def executed_connector(module_to_env: Any) -> NormalizeAndClipActions:
    """The piece that turns the module's actions into the application's.

    Raises:
        NotExportableError: Something else does so, too.
    """
    pieces = list(module_to_env.connectors)
    for piece in pieces:
        if type(piece) not in _MODULE_TO_ENV_DEFAULTS:
            raise NotExportableError(f"module-to-env connector {type(piece).__name__}")
    if tuple(map(type, pieces)) != _MODULE_TO_ENV_DEFAULTS:
        raise NotExportableError("the module-to-env pipeline lacks RLlib's default pieces")
    return pieces[_MODULE_TO_ENV_DEFAULTS.index(NormalizeAndClipActions)]


def observation_steps(
    space: gym.Space[Any], connectors: Sequence[Any]
) -> tuple[list[torch.nn.Module], tuple[InputSpec, ...]]:
    """Steps from the leaves to the encoder's input, and the leaves as inputs of the graph.

    Raises:
        NotExportableError: RLlib's networks and connectors cannot take such observations.
    """
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
        InputSpec(path, name, input_dtype(leaf), tuple(leaf.shape or ()))
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


def _input_names(paths: Collection[str]) -> list[str]:
    if len(paths) == 1:
        return ["obs"]
    # Other runtimes make identifiers of names; the metadata maps names to paths.
    return [f"obs_{index}_" + re.sub(r"\W", "_", path) for index, path in enumerate(paths)]
