"""Which engine serves a policy, and the factory that makes a policy of each version.

``build_factory`` is called once, by the actor thread, and so is ``PolicyFactory.build`` for every
version. What it builds is immutable and goes to the server's loop through ``PolicyStore``.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

import gymnasium as gym
import numpy as np

from policy_server.experience import Policy, RowContext
from policy_server.onnx_engine.check import probe
from policy_server.onnx_engine.factory import build_onnx_factory
from policy_server.onnx_engine.operators import NotExportableError
from policy_server.onnx_engine.plan import is_rllibs_own
from policy_server.rl_module_engine import RLModuleFactory, RLModuleSpaces

if TYPE_CHECKING:
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
