"""The engine for every module that has no ONNX graph: the RLModule itself, with RLlib's connectors.

A version is a frozen copy of the module and of both connector pipelines. Built by the actor thread,
then used by the loop thread alone. Remote inference only.

Connectors read episodes, so each agent has a *shadow episode* here: its recent steps as RLlib's own
runner would have them, cut so that it stays short. It lives in ``RowContext.memory``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import tree
from numpy.typing import NDArray
from ray.rllib.core.columns import Columns as RLlibColumns
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from client_sdk.wire.batches import SpaceCodec
from client_sdk.wire.leaves import child_path
from policy_server.experience import InferredBatch, RowContext

if TYPE_CHECKING:
    from client_sdk.wire.batches import Columns
    from policy_server.learner_view import LearnerView

_ACTION_LOGP: Final[str] = RLlibColumns.ACTION_LOGP
_ACTION_DIST_INPUTS: Final[str] = RLlibColumns.ACTION_DIST_INPUTS

_CUT_AFTER_STEPS: Final = 16
"""A shadow episode is cut when it got this long; each cut costs some tens of microseconds."""


class Shadow:
    """One agent's episode as RLlib's connectors want to see it. Loop thread only.

    Attributes:
        episode: Up to the last observation.
        action: What was done there, as the module gave it; None until it is known.
        outputs: The module's other outputs there.
    """

    __slots__ = ("action", "episode", "outputs")

    def __init__(self, episode: Any) -> None:
        self.episode = episode
        self.action: Any = None
        self.outputs: dict[str, Any] = {}

    def observe(self, observation: Any, reward: float, lookback: int) -> None:
        """Take the action known so far, which led here. Safe to repeat after a failed inference."""
        episode = self.episode
        if not episode.is_reset:
            episode.add_env_reset(observation=observation)
            return
        if self.action is None:
            # The inference for this very step failed: its observation is there already, perhaps
            # rewritten by some of the connectors.
            episode.set_observations(at_indices=-1, new_data=observation)
            return
        if len(episode) >= _CUT_AFTER_STEPS:
            self.episode = episode = episode.cut(len_lookback_buffer=lookback)
        episode.add_env_step(
            observation=observation,
            action=self.action,
            reward=reward,
            extra_model_outputs=self.outputs,
        )
        self.action = None


class RLModuleSpaces:
    """Both spaces as this engine needs them: values for episodes, columns from results.

    Attributes:
        observation_space: Of the application's observations.
        action_space: Of the actions that it executes.
        observations: Codec of the former.
        lookback: Steps that stay visible in a shadow episode that was cut.
    """

    def __init__(
        self,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        *,
        lookback: int,
        shift: bool,
    ) -> None:
        self.observation_space = observation_space
        self.action_space = action_space
        self.observations = SpaceCodec(observation_space)
        # A recurrent module's state is read from the last step before the cut.
        self.lookback = max(1, lookback)
        self._actions = codec = SpaceCodec(action_space)
        self._leaves = {path: codec.leaf(path) for path in codec.paths}
        # RLlib counts from 0 whatever a space's start; the application does not.
        self._starts = {
            path: leaf.space.start if shift and hasattr(leaf.space, "start") else 0
            for path, leaf in self._leaves.items()
        }

    def module_action(self, batch: InferredBatch, row: int) -> Any:
        """One row's action, as the module would have given it."""
        if "" in batch.actions:
            return np.array(batch.actions[""][row])
        return self._actions.value(batch.actions, row)

    def action_columns(self, actions: Sequence[Any]) -> Columns:
        """Module actions, one per row, as columns."""
        columns = self._columns(actions)
        for path, column in columns.items():
            if column.dtype.kind in "iu":
                columns[path] = column.astype(np.int64, copy=False)
        return columns

    def env_action_columns(self, actions: Sequence[Any]) -> Columns:
        """The same of actions to be executed: in the space's dtypes, from its start on."""
        columns = self._columns(actions)
        return {
            path: (column + self._starts[path]).astype(self._leaves[path].dtype, copy=False)
            for path, column in columns.items()
        }

    def _columns(self, actions: Sequence[Any]) -> Columns:
        if len(self._leaves) == 1 and "" in self._leaves:
            return {"": np.stack([np.asarray(action) for action in actions])}
        rows = [dict(arrays_of(action)) for action in actions]
        return {path: np.stack([row[path] for row in rows]) for path in self._leaves}


class RLModulePolicy:
    """One version of a policy, served by RLlib itself. See ``experience.Policy``.

    Args:
        version: RLlib's weights sequence number.
        view: How the learner sees observations of this version.
        module: A copy for this version alone, as are both pipelines.
        env_to_module: From episodes to the module's input.
        module_to_env: From the module's output to actions.
        env_steps: How far training has come; exploration schedules depend on it.
        spaces: Shared by all versions.
    """

    def __init__(
        self,
        version: int,
        view: LearnerView,
        *,
        module: Any,
        env_to_module: Any,
        module_to_env: Any,
        env_steps: int,
        spaces: RLModuleSpaces,
    ) -> None:
        self.version = version
        self.view = view
        self._module = module
        self._env_to_module = env_to_module
        self._module_to_env = module_to_env
        self._env_steps = env_steps
        self._spaces = spaces

    def infer(
        self, observations: Columns, greedy: NDArray[np.bool_], contexts: Sequence[RowContext]
    ) -> InferredBatch:
        """Choose an action for each row; see ``experience.Policy``."""
        shadows = [self._shadow(context, observations, row) for row, context in enumerate(contexts)]
        results: list[_Result] = [_NOTHING] * len(shadows)
        for explore in (True, False):
            rows = np.flatnonzero(greedy != explore)
            if rows.size:
                found = self._forward([shadows[row].episode for row in rows], explore)
                for row, result in zip(rows, found, strict=True):
                    results[row] = result
        # Outputs have the form that explored rows give them: those are the ones learnt from.
        outputs = _columns_like(int(np.argmin(greedy)), [result.outputs for result in results])
        batch = InferredBatch(
            self,
            observations,
            self._spaces.action_columns([result.action for result in results]),
            self._spaces.env_action_columns([result.env_action for result in results]),
            outputs,
        )
        for shadow, result in zip(shadows, results, strict=True):
            shadow.action, shadow.outputs = result.action, result.outputs
        return batch

    def _shadow(self, context: RowContext, observations: Columns, row: int) -> Shadow:
        spaces = self._spaces
        if context.memory is None:
            context.memory = Shadow(
                SingleAgentEpisode(
                    observation_space=spaces.observation_space, action_space=spaces.action_space
                )
            )
        shadow: Shadow = context.memory
        if context.logged is not None:
            shadow.action = spaces.module_action(*context.logged)
            context.logged = None
        observation = spaces.observations.value(observations, row)
        shadow.observe(observation, context.reward, spaces.lookback)
        return shadow

    def _forward(self, episodes: list[Any], explore: bool) -> list[_Result]:
        """RLlib's own way from episodes to actions."""
        module = self._module
        shared: dict[str, Any] = {}
        context = {"episodes": episodes, "rl_module": module, "shared_data": shared}
        with torch.no_grad():
            batch = self._env_to_module(batch={}, explore=explore, metrics=None, **context)
            if explore:
                outputs = module.forward_exploration(batch, t=self._env_steps)
            else:
                outputs = module.forward_inference(batch)
                if _ACTION_DIST_INPUTS in outputs and _ACTION_LOGP not in outputs:
                    # RLlib's deterministic distributions give a "logp" of the action's own shape
                    # and fail to add those up for Dict actions. Nobody learns from a greedy row.
                    timed = shared.get("_added_single_ts_time_rank")
                    n = len(episodes)
                    outputs[_ACTION_LOGP] = torch.zeros((n, 1) if timed else (n,))
            outputs = self._module_to_env(batch=outputs, explore=explore, metrics=None, **context)
        actions = outputs.pop(RLlibColumns.ACTIONS)
        env_actions = outputs.pop(RLlibColumns.ACTIONS_FOR_ENV, actions)
        return [
            _Result(
                _row_of(actions, row),
                _row_of(env_actions, row),
                {name: column[row] for name, column in outputs.items()},
            )
            for row in range(len(episodes))
        ]


class _Result(NamedTuple):
    """What came out for one row."""

    action: Any
    env_action: Any
    outputs: dict[str, Any]


_NOTHING = _Result(None, None, {})


class RLModuleFactory:
    """Builds the policies of a module that has no ONNX graph. Actor thread only.

    Attributes:
        name: ``"rl_module"``.
        reason: Why there is no graph, in one line.

    Args:
        reason: See above.
        module: The runner's own; copied for each version, and so are the pipelines.
        env_to_module: The runner's pipeline.
        module_to_env: The runner's pipeline.
        spaces: See ``RLModuleSpaces``.
    """

    name = "rl_module"

    def __init__(
        self,
        reason: str,
        *,
        module: Any,
        env_to_module: Any,
        module_to_env: Any,
        spaces: RLModuleSpaces,
    ) -> None:
        self.reason = reason
        self._module = module
        self._env_to_module = env_to_module
        self._module_to_env = module_to_env
        self._spaces = spaces

    def build(self, version: int, env_steps: int, view: LearnerView) -> RLModulePolicy:
        """A policy with everything as it is now."""
        return RLModulePolicy(
            version,
            view,
            module=frozen_module(self._module),
            env_to_module=frozen_pipeline(self._env_to_module),
            module_to_env=copy.deepcopy(self._module_to_env),
            env_steps=env_steps,
            spaces=self._spaces,
        )


def frozen_module(module: Any) -> Any:
    """A copy of a module that no later weights reach."""
    module = copy.deepcopy(module)
    module.eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return module


def frozen_pipeline(pipeline: Any) -> Any:
    """A copy of an env-to-module pipeline whose filters no longer learn from what they see."""
    pipeline = copy.deepcopy(pipeline)
    for connector in pipeline.connectors:
        if hasattr(connector, "_update_stats"):
            connector._update_stats = False
    return pipeline


def arrays_of(value: Any, parts: tuple[str, ...] = ()) -> Iterator[tuple[str, NDArray[Any]]]:
    """The leaves of nested dicts, tuples and lists, by path."""
    if isinstance(value, Mapping):
        for key, child in value.items():
            yield from arrays_of(child, (*parts, str(key)))
    elif isinstance(value, tuple | list):
        for index, child in enumerate(value):
            yield from arrays_of(child, (*parts, str(index)))
    else:
        yield child_path(parts), np.asarray(value)


def _columns_like(lead: int, rows: Sequence[dict[str, Any]]) -> dict[str, NDArray[Any]]:
    """Rows as columns, each in the form of one leading row; zeros where another has none like it."""
    flat = [dict(arrays_of(row)) for row in rows]
    columns: dict[str, NDArray[Any]] = {}
    for name, like in flat[lead].items():
        zero = np.zeros_like(like)
        arrays = [row.get(name, zero) for row in flat]
        columns[name] = np.stack([each if each.shape == like.shape else zero for each in arrays])
    return columns


def _row_of(column: Any, row: int) -> Any:
    # RLlib batches actions for its vector envs; pipelines of the user's own may leave a list.
    if isinstance(column, list):
        return column[row]
    return tree.map_structure(lambda each: each[row], column)
