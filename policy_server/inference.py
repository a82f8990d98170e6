"""Which engine serves a policy, and the factory that makes a policy of each version.

``build_factory`` is called once, by the actor thread, and so is ``PolicyFactory.build`` for every
version. What it builds is immutable and goes to the server's loop through ``PolicyStore``.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

import gymnasium as gym
import numpy as np
from google.protobuf import json_format
from numpy.typing import NDArray

from client_sdk.noise_pool import NoisePool
from client_sdk.onnx_policy import OnnxPolicy
from client_sdk.policy_spec import PolicySpec
from client_sdk.wire.spaces import space_to_proto
from policy_server.experience import POLICY_ID, InferredBatch, Policy, RowContext
from policy_server.onnx_check import check_template, probe, randomize
from policy_server.onnx_export import Template, export_template, refreshed_values
from policy_server.onnx_operators import NotExportableError
from policy_server.onnx_plan import GraphPlan, is_rllibs_own, plan_graph
from policy_server.rl_module_engine import RLModuleFactory, RLModuleSpaces

if TYPE_CHECKING:
    from client_sdk.wire.batches import Columns
    from policy_server.learner_view import LearnerView

_TRIED_ROWS: Final = 8

_logger = logging.getLogger(__name__)


class UnservableError(ValueError):
    """No engine can act: the training would fail on its first batch as well."""


class PolicyFactory(Protocol):
    """Makes policies of one module. Actor thread only."""

    @property
    def name(self) -> str:
        """``"onnx"`` or ``"rl_module"``."""
        ...

    @property
    def reason(self) -> str:
        """Why this engine, in one line."""
        ...

    def build(self, version: int, env_steps: int, view: LearnerView) -> Policy:
        """A policy with the module's weights and its connectors' state as they are now.

        Args:
            version: RLlib's weights sequence number.
            env_steps: How far training has come; exploration schedules depend on it.
            view: How the learner sees observations of this version.
        """
        ...


class OnnxEnginePolicy:
    """One version of a policy, served by its ONNX file. See ``experience.Policy``.

    Attributes:
        version: RLlib's weights sequence number.
        view: How the learner sees observations of this version.
        model: The complete ONNX file.
        sha256: What that file is known by.
        onnx: The file, loaded. Loop thread only.
    """

    __slots__ = ("_act", "model", "onnx", "sha256", "version", "view")

    def __init__(self, version: int, view: LearnerView, model: bytes, noise: NoisePool) -> None:
        self.version = version
        self.view = view
        self.model = model
        self.sha256 = hashlib.sha256(model).digest()
        self.onnx = OnnxPolicy(model, noise)
        self._act = self.onnx.act

    def infer(
        self,
        observations: Columns,
        greedy: NDArray[np.bool_],
        contexts: Sequence[RowContext],  # noqa: ARG002 - no graph has a memory
    ) -> InferredBatch:
        """Choose an action for each row; see ``experience.Policy``. Loop thread only."""
        actions, env_actions, outputs = self._act(observations, greedy)
        return InferredBatch(self, observations, actions, env_actions, outputs)


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


def build_factory(
    algorithm_config: Any,
    module: Any,
    observation_space: gym.Space[Any],
    action_space: gym.Space[Any],
    env_to_module: Any,
    module_to_env: Any,
    *,
    worker_index: int = 0,
) -> PolicyFactory:
    """Choose the engine: ONNX where a graph can be exported and passes its check.

    Args:
        algorithm_config: RLlib's; its seed, with ``worker_index``, is the noise's.
        module: The runner's RLModule. Its weights are read whenever a policy is built.
        observation_space: Of the application's observations.
        action_space: Of the actions that it executes.
        env_to_module: The runner's connector pipeline; its state is read like the weights.
        module_to_env: The runner's connector pipeline.
        worker_index: Of the runner.

    Raises:
        UnservableError: RLlib's own module and connectors cannot act on such observations either.
    """
    try:
        return build_onnx_factory(
            algorithm_config,
            module,
            observation_space,
            action_space,
            env_to_module,
            module_to_env,
            worker_index=worker_index,
        )
    except NotExportableError as error:
        reason = str(error)
    spaces = RLModuleSpaces(
        observation_space,
        action_space,
        lookback=int(algorithm_config.episode_lookback_horizon),
        shift=algorithm_config._module_to_env_connector is None,
    )
    factory = RLModuleFactory(
        reason,
        module=module,
        env_to_module=env_to_module,
        module_to_env=module_to_env,
        spaces=spaces,
    )
    _try_out(factory, spaces, certain=is_rllibs_own(module, env_to_module, module_to_env))
    return factory


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
    """The ONNX engine, or why not; arguments as for ``build_factory``.

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


def _try_out(factory: RLModuleFactory, spaces: RLModuleSpaces, *, certain: bool) -> None:
    """Notice now, not at the first client's row, that RLlib fails on these observations."""
    columns = probe(spaces.observations, _TRIED_ROWS, np.random.default_rng(0))
    contexts = [RowContext() for _ in range(_TRIED_ROWS)]
    policy = factory.build(0, 0, cast("LearnerView", None))
    try:
        policy.infer(columns, np.zeros(_TRIED_ROWS, np.bool_), contexts)
    except Exception as error:  # of whatever module and connectors there are
        said = " ".join(f"{type(error).__name__}: {error}".split())
        if certain:
            raise UnservableError(
                f"RLlib cannot act on observations of {spaces.observation_space} by actions of "
                f"{spaces.action_space}: {said} ({factory.reason})"
            ) from error
        # Connectors of the user's own may rightly refuse what no application would send.
        _logger.warning("acting on made-up observations failed: %s", said)


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
