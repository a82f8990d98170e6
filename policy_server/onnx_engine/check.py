"""Whether a template computes what RLlib computes: asked once per architecture, before it serves.

The check runs on copies, under random weights, filter statistics and observations. Actor thread only.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from ray.rllib.algorithms.dqn.default_dqn_rl_module import QF_PREDS
from ray.rllib.connectors.module_to_env import NormalizeAndClipActions
from ray.rllib.core.columns import Columns as RLlibColumns
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.numpy import MAX_LOG_NN_OUTPUT, MIN_LOG_NN_OUTPUT
from ray.rllib.utils.spaces.space_utils import clip_action, unsquash_action

from client_sdk.noise_pool import NoisePool
from client_sdk.onnx_policy import OnnxPolicy
from client_sdk.wire.batches import SpaceCodec
from policy_server.onnx_engine.graphs import PolicyGraph
from policy_server.onnx_engine.operators import NotExportableError
from policy_server.onnx_engine.plan import GraphPlan
from policy_server.onnx_engine.template import Template, refreshed_values
from policy_server.rl_module_engine import frozen_pipeline

if TYPE_CHECKING:
    from client_sdk.wire.batches import Columns

TOLERANCE: Final = 1e-5
"""Of distribution inputs and actions, relative to the largest magnitude."""
LOGP_TOLERANCE: Final = 1e-4
_EPSILON: Final = 0.5
_FILTERED_ROWS: Final = 20


def randomize(graph: PolicyGraph, rng: np.random.Generator) -> None:
    """Give every refreshed value of a graph random numbers, none like another."""
    with torch.no_grad():
        for _, tensor in [*graph.named_parameters(), *graph.named_buffers()]:
            # As wide as networks begin: nothing saturates, so that differences show.
            width = 1.0 / math.sqrt(math.prod(tensor.shape[1:]) or 1)
            values = rng.standard_normal(tuple(tensor.shape), np.float32) * np.float32(width)
            tensor.copy_(torch.from_numpy(values))


def check_template(
    template: Template,
    plan: GraphPlan,
    module: Any,
    env_to_module: Any,
    module_to_env: Any,
    observation_space: gym.Space[Any],
    action_space: gym.Space[Any],
) -> None:
    """Compare a template with RLlib itself.

    Args:
        template: Exported from ``plan``.
        plan: Of ``module``, whose weights are overwritten here.
        module: A copy of the runner's.
        env_to_module: A copy of the runner's; its filters learn here.
        module_to_env: A copy of the runner's.
        observation_space: Of the application's observations.
        action_space: Of the actions that it executes.

    Raises:
        NotExportableError: They differ; the message says in what.
    """
    rng = np.random.default_rng(1)
    codec = SpaceCodec(observation_space)
    # Lets filters learn something, so that there is something to compare.
    module_inputs(module, env_to_module, codec, probe(codec, _FILTERED_ROWS, rng), _FILTERED_ROWS)
    env_to_module = frozen_pipeline(env_to_module)
    randomize(plan.graph, rng)
    # Reads the statistics of the copy that was frozen just now.
    plan.graph.refresh(_EPSILON)
    policy = OnnxPolicy(template.fill(refreshed_values(plan.graph), 0))
    for rows in (1, 5):
        columns = probe(codec, rows, rng)
        batch = module_inputs(module, env_to_module, codec, columns, rows)
        noise = NoisePool(plan.noise, rng).take(np.zeros(rows, np.bool_))
        found = run_all(policy, columns, noise)
        _check_export(plan, columns, noise, found)
        _check_rllib(plan, module, batch, noise, found)
        check_executed(module_to_env, action_space, found)


def module_inputs(
    module: Any, env_to_module: Any, codec: SpaceCodec, columns: Columns, rows: int
) -> dict[str, Any]:
    """What RLlib's pipeline makes of first observations: the module's batch."""
    episodes = []
    for row in range(rows):
        episode = SingleAgentEpisode(observation_space=codec.space)
        episode.add_env_reset(observation=codec.value(columns, row))
        episodes.append(episode)
    batch: dict[str, Any] = env_to_module(
        episodes=episodes, batch={}, explore=True, rl_module=module, shared_data={}, metrics=None
    )
    return batch


def probe(codec: SpaceCodec, rows: int, rng: np.random.Generator) -> Columns:
    """Values of a space for checks: of moderate size also where the space has no bounds."""
    columns: Columns = {}
    for path in codec.paths:
        leaf = codec.leaf(path)
        shape = (rows, *leaf.shape)
        space = leaf.space
        values: Any
        if isinstance(space, gym.spaces.Discrete):
            values = int(space.start) + rng.integers(0, int(space.n), shape)
        elif isinstance(space, gym.spaces.MultiDiscrete):
            values = rng.integers(0, np.asarray(space.nvec, np.int64), shape) + space.start
        elif isinstance(space, gym.spaces.Box) and leaf.dtype.kind == "f":
            values = np.clip(rng.standard_normal(shape), space.low, space.high)
        elif isinstance(space, gym.spaces.Box) and leaf.dtype.kind in "iu":
            low = np.maximum(space.low.astype(np.float64), -100.0)
            high = np.minimum(space.high.astype(np.float64), low + 255.0)
            values = np.floor(low + rng.random(shape) * (high - low + 1.0))
        else:
            values = rng.integers(0, 2, shape)
        columns[path] = np.asarray(values).astype(leaf.dtype)
    return columns


def run_all(
    policy: OnnxPolicy, columns: Columns, noise: NDArray[np.float32]
) -> dict[str, NDArray[Any]]:
    """All outputs of a graph by role.

    Raises:
        NotExportableError: It does not run, or not with so many rows.
    """
    roles = tuple(policy.spec.roles)
    try:
        found = dict(zip(roles, policy.run(columns, noise, roles), strict=True))
    except Exception as error:  # onnxruntime's errors have no common base but Exception
        raise NotExportableError(f"onnxruntime cannot run the graph: {error}") from error
    if any(len(array) != len(noise) for array in found.values()):
        raise NotExportableError("the exported graph has a frozen batch size")
    return found


def _check_export(
    plan: GraphPlan,
    columns: Columns,
    noise: NDArray[np.float32],
    found: dict[str, NDArray[Any]],
) -> None:
    leaves = [columns[each.path].astype(each.dtype, copy=False) for each in plan.inputs]
    with torch.no_grad():
        expected = plan.graph.results(*(torch.from_numpy(each) for each in [*leaves, noise]))
    for name, tensor in expected.items():
        _compare(name, found[name], tensor.numpy(), TOLERANCE)


def _check_rllib(
    plan: GraphPlan,
    module: Any,
    batch: dict[str, Any],
    noise: NDArray[np.float32],
    found: dict[str, NDArray[Any]],
) -> None:
    role, inputs = rllib_inputs(plan.distribution, module, batch)
    _compare(role, found[role], inputs, TOLERANCE)
    logp = exact_logp(plan.distribution, module, noise, found)
    if logp is not None:
        _compare("action_logp", found["action_logp"], logp, LOGP_TOLERANCE)


def rllib_inputs(
    distribution: str, module: Any, batch: dict[str, Any]
) -> tuple[str, NDArray[np.float32]]:
    """What RLlib's module makes of a batch, ``[N, K]``, and as which role a graph gives it."""
    with torch.no_grad():
        if distribution == "epsilon_greedy":
            return "q_values", module.compute_q_values(batch)[QF_PREDS].numpy()
        outputs = module.forward_exploration(batch, t=0)
        return "action_dist_inputs", outputs[RLlibColumns.ACTION_DIST_INPUTS].numpy()


def exact_logp(
    distribution: str, module: Any, noise: NDArray[np.float32], found: dict[str, NDArray[Any]]
) -> NDArray[Any] | None:
    """What ``action_logp`` should be, ``[N]``; None where the policy has none.

    By the graph's own distribution inputs: where a deviation is tiny, a rounding of the mean counts.
    """
    if distribution == "epsilon_greedy":
        return None
    inputs = found["action_dist_inputs"]
    if distribution == "squashed_gaussian":
        # RLlib's own is no yardstick: it inverts the rounded action.
        return squashed_gaussian(inputs, noise)[1]
    rllibs = module.get_exploration_action_dist_cls().from_logits(torch.from_numpy(inputs))
    logp: NDArray[Any] = rllibs.logp(torch.from_numpy(found["actions"])).numpy()
    return logp


def squashed_gaussian(
    inputs: NDArray[np.float32], noise: NDArray[np.float32]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """SAC's actions and their log-densities by the book.

    Args:
        inputs: Means and logs of the deviations, ``[N, 2 d]``.
        noise: ``[N, d]``.

    Returns:
        ``[N, d]`` and ``[N]``.
    """
    mean, log_std = np.split(inputs.astype(np.float64), 2, axis=-1)
    log_std = np.clip(log_std, MIN_LOG_NN_OUTPUT, MAX_LOG_NN_OUTPUT)
    x = mean + np.exp(log_std) * noise
    normal = -0.5 * (np.square(noise) + np.log(2.0 * np.pi)) - log_std
    # log(1 - tanh(x)^2) = -2 log cosh(x)
    change = -2.0 * (np.logaddexp(x, -x) - np.log(2.0))
    return np.tanh(x), (normal - change).sum(axis=-1)


def check_executed(
    module_to_env: Any, space: gym.Space[Any], found: dict[str, NDArray[Any]]
) -> None:
    """Compare ``env_actions`` with what RLlib's connectors make of ``actions``.

    Raises:
        NotExportableError: They differ.
    """
    (piece,) = module_to_env[NormalizeAndClipActions]
    expected = found["actions"]
    if isinstance(space, gym.spaces.Box):
        if piece.normalize_actions:
            expected = unsquash_action(expected, space)
        elif piece.clip_actions:
            expected = clip_action(expected, space)
    else:
        expected = expected + space.start  # type: ignore[attr-defined]
    _compare("env_actions", found["env_actions"], expected, TOLERANCE)
    if found["env_actions"].dtype != space.dtype:
        raise NotExportableError(f"env_actions are {found['env_actions'].dtype}")


def _compare(name: str, found: NDArray[Any], expected: NDArray[Any], tolerance: float) -> None:
    if found.shape != expected.shape:
        raise NotExportableError(
            f"{name}: expected shape {list(expected.shape)}, got {list(found.shape)}"
        )
    largest = max(1.0, float(np.abs(expected).max(initial=0.0)))
    difference = float(np.abs(found.astype(np.float64) - expected).max(initial=0.0))
    # Written so that NaN fails too.
    if not difference <= tolerance * largest:
        raise NotExportableError(f"{name} differs from RLlib's by {difference:.2g}")
