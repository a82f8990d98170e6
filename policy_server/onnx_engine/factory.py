"""The engine's policies, one of each version, and the factory that fills the template in for them.

``build_onnx_factory`` and ``OnnxFactory`` are the actor thread's; what is built goes to the server's
loop through ``PolicyStore``.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from google.protobuf import json_format
from numpy.typing import NDArray

from client_sdk.noise_pool import NoisePool
from client_sdk.onnx_policy import BoundPolicy, OnnxPolicy
from client_sdk.policy_spec import PolicySpec
from client_sdk.wire.spaces import space_to_proto
from policy_server.experience import POLICY_ID, InferredBatch, RowContext
from policy_server.onnx_engine.check import check_template, randomize
from policy_server.onnx_engine.operators import NotExportableError
from policy_server.onnx_engine.plan import GraphPlan, plan_graph
from policy_server.onnx_engine.template import Template, export_template, refreshed_values

if TYPE_CHECKING:
    from client_sdk.wire.batches import Columns
    from policy_server.learner_view import LearnerView

_logger = logging.getLogger(__name__)

_BATCHES_BEFORE_BINDING = 16
"""Of one size in a row: to bind takes longer than a batch does."""


class OnnxEnginePolicy:
    """One version of a policy, served by its ONNX file. See ``experience.Policy``.

    Attributes:
        version: RLlib's weights sequence number.
        view: How the learner sees observations of this version.
        model: The complete ONNX file.
        sha256: What that file is known by.
        onnx: The file, loaded. Loop thread only.
    """

    __slots__ = ("_bound", "_in_a_row", "_size", "model", "onnx", "sha256", "version", "view")

    def __init__(self, version: int, view: LearnerView, model: bytes, noise: NoisePool) -> None:
        self.version = version
        self.view = view
        self.model = model
        self.sha256 = hashlib.sha256(model).digest()
        self.onnx = OnnxPolicy(model, noise)
        self._size = self._in_a_row = 0  # of the latest batches
        self._bound: BoundPolicy | None = None  # for that size

    def infer(
        self,
        observations: Columns,
        greedy: NDArray[np.bool_],
        contexts: Sequence[RowContext],  # noqa: ARG002 - no graph has a memory
    ) -> InferredBatch:
        """Choose an action for each row; see ``experience.Policy``. Loop thread only."""
        bound = self._bound
        if bound is None or len(greedy) != self._size:
            bound = self._bind(len(greedy))
        if bound is None:
            return InferredBatch(self, observations, *self.onnx.act(observations, greedy))
        chosen, executed, found = bound.act(observations, greedy)
        # Copies, for the next batch overwrites what this one gave.
        actions = env_actions = {path: column.copy() for path, column in chosen.items()}
        if executed is not chosen:
            env_actions = {path: column.copy() for path, column in executed.items()}
        outputs = {name: column.copy() for name, column in found.items()}
        return InferredBatch(self, observations, actions, env_actions, outputs)

    def _bind(self, size: int) -> BoundPolicy | None:
        """The policy in memory that stays in place, for a size that keeps coming; None: it does not."""
        if size != self._size:
            self._size, self._in_a_row, self._bound = size, 0, None
        self._in_a_row += 1
        if self._in_a_row > _BATCHES_BEFORE_BINDING:
            self._bound = self.onnx.bind(size)
        return self._bound


class OnnxFactory:
    """Builds policies by filling a template. Actor thread only.

    Attributes:
        name: ``"onnx"``.
        reason: What the graph is made of, in one line.
    """

    name = "onnx"

    def __init__(
        self, module: Any, plan: GraphPlan, template: Template, rng: np.random.Generator
    ) -> None:
        self.reason = f"the graph of {type(module).__name__} passed its check"
        self._module = module
        self._graph = plan.graph
        self._template = template
        # One pool for all versions; the loop thread draws from it.
        self._noise = NoisePool(plan.noise, rng)

    def build(self, version: int, env_steps: int, view: LearnerView) -> OnnxEnginePolicy:
        """A policy with everything as it is now."""
        schedule = getattr(self._module, "epsilon_schedule", None)
        self._graph.refresh(0.0 if schedule is None else float(schedule.update(env_steps)))
        model = self._template.fill(refreshed_values(self._graph), version)
        return OnnxEnginePolicy(version, view, model, self._noise)


def build_onnx_factory(
    algorithm_config: Any,
    module: Any,
    observation_space: gym.Space[Any],
    action_space: gym.Space[Any],
    env_to_module: Any,
    module_to_env: Any,
    *,
    worker_index: int = 0,
) -> OnnxFactory:
    """The ONNX engine, or why not; arguments as for ``inference.build_factory``.

    Raises:
        NotExportableError: No graph can be exported, or it failed its check; one line.
    """
    seed = None if algorithm_config.seed is None else [int(algorithm_config.seed), worker_index]
    pipelines = (env_to_module, module_to_env)
    try:
        plan = plan_graph(module, observation_space, action_space, *pipelines)
        spec = _spec(plan, algorithm_config, observation_space, action_space)
        # Exported and checked with weights of its own: the runner's module stays as it is.
        twin, twin_pipelines = copy.deepcopy(module), copy.deepcopy(pipelines)
        twin_plan = plan_graph(twin, observation_space, action_space, *twin_pipelines)
        rng = np.random.default_rng(0)
        randomize(twin_plan.graph, rng)
        template = export_template(twin_plan, spec)
        check_template(template, twin_plan, twin, *twin_pipelines, observation_space, action_space)
        refreshed_values(plan.graph)
        return OnnxFactory(module, plan, template, np.random.default_rng(seed))
    except NotExportableError as error:
        raise NotExportableError(" ".join(str(error).split())) from error
    except Exception as error:
        # Whatever goes wrong on this way, the module itself can still serve.
        _logger.warning("no ONNX graph for %s", type(module).__name__, exc_info=True)
        said = " ".join(str(error).split())
        raise NotExportableError(
            f"unexpected {type(error).__name__} while exporting: {said}"
        ) from error


def _spec(
    plan: GraphPlan,
    algorithm_config: Any,
    observation_space: gym.Space[Any],
    action_space: gym.Space[Any],
) -> PolicySpec:
    outputs = plan.output_shapes()
    roles = {name: name for name in outputs if name != "env_actions"}
    roles["env_actions"] = "env_actions" if "env_actions" in outputs else "actions"
    return PolicySpec(
        policy_id=POLICY_ID,
        version=0,
        algorithm=getattr(algorithm_config.algo_class, "__name__", ""),
        observation_space=_space_json(observation_space),
        action_space=_space_json(action_space),
        distribution=plan.distribution,
        noise=plan.noise,
        inputs=plan.inputs,
        roles=roles,
        recorded=plan.recorded,
        observation_filter=plan.observation_filter,
    )


def _space_json(space: gym.Space[Any]) -> str:
    # Sorted: the keys of a Dict come in any order, and equal policies must be equal files.
    return json.dumps(json_format.MessageToDict(space_to_proto(space)), sort_keys=True)
