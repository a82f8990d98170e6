"""What RLlib's learner is to see of raw observations, frozen for each version of the policy.

RLlib's env-to-module connectors may rewrite observations in the episodes that are learnt from:
flatten them, filter them. The server records raw ones; the hand-over turns them into what the
learner expects, with the statistics of the version that chose each action. Actor thread only, but
for ``LearnerView``, which is immutable.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from ray.rllib.connectors.common.add_observations_from_episodes_to_batch import (
    AddObservationsFromEpisodesToBatch,
)
from ray.rllib.connectors.common.add_states_from_episodes_to_batch import (
    AddStatesFromEpisodesToBatch,
)
from ray.rllib.connectors.common.add_time_dim_to_batch_and_zero_pad import (
    AddTimeDimToBatchAndZeroPad,
)
from ray.rllib.connectors.common.batch_individual_items import BatchIndividualItems
from ray.rllib.connectors.common.flatten_observations import FlattenObservations
from ray.rllib.connectors.common.frame_stacking import FrameStacking
from ray.rllib.connectors.common.numpy_to_tensor import NumpyToTensor
from ray.rllib.connectors.env_to_module.mean_std_filter import MeanStdFilter as RLlibMeanStdFilter
from ray.rllib.utils.numpy import flatten_inputs_to_1d_tensor

from client_sdk.wire.batches import SpaceCodec
from policy_server.filters import MeanStdFilter

if TYPE_CHECKING:
    from ray.rllib.connectors.connector_v2 import ConnectorV2
    from ray.rllib.env.single_agent_episode import SingleAgentEpisode

    from client_sdk.wire.batches import Columns

_LEAVE_OBSERVATIONS = (
    AddObservationsFromEpisodesToBatch,
    AddStatesFromEpisodesToBatch,
    AddTimeDimToBatchAndZeroPad,
    BatchIndividualItems,
    FrameStacking,  # stacks in the batch; the learner has its own
    NumpyToTensor,
)
"""Connectors that read episodes and leave them as they are."""


@dataclasses.dataclass(frozen=True)
class MeanStd:
    """The statistics of one version: ``clip((x - mean) / divisor)``."""

    mean: NDArray[np.float64]
    """``[*obs]``; 0 where means are not removed."""
    divisor: NDArray[np.float64]
    """``[*obs]``; never 0."""
    clip: float | None
    """Bound of the result's absolute value."""

    @classmethod
    def of(cls, connector: MeanStdFilter) -> MeanStd:
        """The statistics of this moment."""
        return cls(*connector.applied(), connector.clip_by_value)

    def __call__(self, values: NDArray[Any]) -> NDArray[Any]:
        """Filter ``[N, *obs]``; the dtype stays."""
        filtered = (values - self.mean) / self.divisor
        if self.clip:
            np.clip(filtered, -self.clip, self.clip, out=filtered)
        return filtered.astype(values.dtype)


class Flatten:
    """RLlib's FlattenObservations for whole batches."""

    def __init__(self, connector: FlattenObservations) -> None:
        self._struct = connector._input_obs_base_struct
        self._removed = frozenset(connector._keys_to_remove)

    def __call__(self, values: Any) -> NDArray[np.float32]:
        """``[N, ...]`` by leaf to ``[N, D]``."""
        if self._removed:
            values = {key: value for key, value in values.items() if key not in self._removed}
        flat: NDArray[np.float32] = flatten_inputs_to_1d_tensor(
            values, spaces_struct=self._struct, batch_axis=True
        )
        return flat


class LearnerView:
    """Raw observations as the learner expects them, under one version of the policy.

    Attributes:
        weights_seq_no: RLlib's own number of these weights.
        mean_std: The filter's statistics, if there is one in the usual place.
        replay_state: State of the connectors to replay episodes through; None if observations
            come from ``observations``.
    """

    def __init__(
        self,
        codec: SpaceCodec,
        weights_seq_no: int = 0,
        stages: Sequence[Flatten | MeanStd] = (),
        replay_state: dict[str, Any] | None = None,
    ) -> None:
        self.weights_seq_no = weights_seq_no
        self.replay_state = replay_state
        self.mean_std = next((stage for stage in stages if isinstance(stage, MeanStd)), None)
        self._stages = tuple(stages)
        self._codec = codec
        self._is_leaf = codec.paths == ("",)

    def observations(self, columns: Columns) -> Any:
        """What an episode holds of these raw observations.

        Args:
            columns: ``[N, ...]`` by leaf; not kept, and not changed.

        Returns:
            A struct like the learner's observation space with arrays ``[N, ...]``.
        """
        values = columns[""] if self._is_leaf else self._codec.batched_value(columns)
        for stage in self._stages:
            values = stage(values)
        return values


class LearnerViews:
    """Makes a ``LearnerView`` of each version, and keeps the connectors' running statistics.

    Attributes:
        replays: Connectors of unknown kind rewrite observations; episodes go through them step by
            step.
        counts: Some connector learns from the observations that pass.
        space: Of the observations that the learner gets.
    """

    def __init__(
        self,
        pipeline: ConnectorV2,
        observation_space: gym.Space[Any],
        build_pipeline: Callable[[], ConnectorV2],
    ) -> None:
        """Look at the connectors.

        Args:
            pipeline: The actor's own; RLlib synchronises its state over the runners.
            observation_space: Of the raw observations.
            build_pipeline: Builds another one like it.
        """
        self._codec = SpaceCodec(observation_space)
        self._pipeline = pipeline
        self._rewriting = [
            connector
            for connector in pipeline.connectors
            if not isinstance(connector, _LEAVE_OBSERVATIONS)
        ]
        kinds = [type(connector) for connector in self._rewriting]
        self.replays = not (
            set(kinds) <= {FlattenObservations, MeanStdFilter}
            and kinds.count(MeanStdFilter) <= 1
            and all(
                isinstance(connector.input_observation_space, gym.spaces.Box)
                for connector in self._rewriting
                if isinstance(connector, MeanStdFilter)
            )
        )
        self._frozen: list[ConnectorV2] = []
        if self.replays:
            frozen = use_exact_filters(build_pipeline(), reports=False)
            self._frozen = [
                connector
                for connector in frozen.connectors
                if not isinstance(connector, _LEAVE_OBSERVATIONS)
            ]
            for connector in self._frozen:
                if isinstance(connector, RLlibMeanStdFilter):
                    connector._update_stats = False
        self.counts = self.replays and any(connector.get_state() for connector in self._rewriting)
        self._before_filter: list[Flatten] = []
        self._filter: MeanStdFilter | None = None
        if not self.replays:
            for connector in self._rewriting:
                if isinstance(connector, MeanStdFilter):
                    self._filter = connector
                    break
                self._before_filter.append(Flatten(connector))
            self.counts = self._filter is not None
        self.space: gym.Space[Any] = (
            self._rewriting[-1].observation_space if self._rewriting else observation_space
        )

    def freeze(self, weights_seq_no: int) -> LearnerView:
        """The view of a version that is being published, with the statistics of this moment."""
        if self.replays:
            state = {
                str(index): connector.get_state() for index, connector in enumerate(self._rewriting)
            }
            return LearnerView(self._codec, weights_seq_no, replay_state=state)
        return LearnerView(
            self._codec,
            weights_seq_no,
            [
                MeanStd.of(connector)
                if isinstance(connector, MeanStdFilter)
                else Flatten(connector)
                for connector in self._rewriting
            ],
        )

    def count(self, columns: Columns) -> None:
        """Update the running statistics with raw observations; each is to be given once."""
        if self._filter is None:
            return
        values = columns[""] if self._codec.paths == ("",) else self._codec.batched_value(columns)
        for stage in self._before_filter:
            values = stage(values)
        self._filter.count(values)

    def value(self, columns: Columns, row: int) -> Any:
        """One raw observation as a value of its space."""
        return self._codec.value(columns, row)

    def thaw(self, view: LearnerView) -> list[ConnectorV2]:
        """The connectors to replay an episode through, in the state of that version."""
        for index, connector in enumerate(self._frozen):
            state = (view.replay_state or {}).get(str(index))
            if state:
                connector.set_state(state)
        return self._frozen

    @property
    def own(self) -> list[ConnectorV2]:
        """The actor's own connectors that rewrite observations; running them updates them."""
        return self._rewriting


def rewrite_newest(
    connectors: Sequence[ConnectorV2],
    episode: SingleAgentEpisode,
    *,
    rl_module: Any,
    shared_data: dict[str, Any],
    explore: bool,
) -> None:
    """Run an episode's newest observation through connectors, as RLlib's env runner does."""
    batch: dict[str, Any] = {}
    for connector in connectors:
        batch = connector(
            rl_module=rl_module,
            batch=batch,
            episodes=[episode],
            explore=explore,
            shared_data=shared_data,
            metrics=None,
        )


def use_exact_filters(pipeline: ConnectorV2, *, reports: bool) -> ConnectorV2:
    """Put our MeanStdFilter in the place of RLlib's, which loses and repeats counts.

    Args:
        pipeline: Env-to-module connectors; changed in place.
        reports: A driver merges what is counted here.
    """
    for index, connector in enumerate(pipeline.connectors):
        if type(connector) is RLlibMeanStdFilter:
            exact = pipeline.connectors[index] = MeanStdFilter.replacing(connector)
            exact.reports = reports
    return pipeline
