"""Running mean and standard deviation of observations, counted exactly once whatever gets lost.

RLlib merges the statistics of its env runners in three calls that may each be lost or repeated:
``get_state`` on the runners, ``merge_states`` on the driver, ``set_state`` on the runners. Here a
runner numbers what it counted between two reports, the driver remembers which numbers it merged,
and says so in what it sends back. Actor thread only.
"""

from __future__ import annotations

import uuid
from typing import Any

import numpy as np
import tree
from numpy.typing import NDArray
from ray.rllib.connectors.env_to_module.mean_std_filter import MeanStdFilter as RLlibMeanStdFilter
from ray.rllib.utils.filter import RunningStat
from ray.rllib.utils.numpy import SMALL_NUMBER

_MAX_SEGMENTS = 128
"""Unacknowledged counts that are kept; older ones were merged by a driver that does not answer."""
_ENOUGH = 2
"""Observations that have a standard deviation."""
_MAX_SOURCES = 1024
"""Runners, restarted ones included, whose numbers the driver remembers."""

_Segment = tuple[int, list[RunningStat]]


def statistics_of(rows: NDArray[Any]) -> RunningStat:
    """Count, mean and sum of squared differences of ``[N, *shape]``."""
    statistics = RunningStat(rows.shape[1:])
    if len(rows):
        values = rows.astype(np.float64, copy=False)
        statistics.num_pushes = len(values)
        statistics.mean_array = np.asarray(values.mean(axis=0))
        statistics.sum_sq_diff_array = np.asarray(
            np.square(values - statistics.mean_array).sum(axis=0)
        )
    return statistics


def merge(into: RunningStat, other: RunningStat) -> None:
    """Add what another one has counted (Chan, Golub, LeVeque 1983)."""
    count = into.num_pushes + other.num_pushes
    if not other.num_pushes:
        return
    difference = other.mean_array - into.mean_array
    into.mean_array = into.mean_array + difference * (other.num_pushes / count)
    into.sum_sq_diff_array = (
        into.sum_sq_diff_array
        + other.sum_sq_diff_array
        + np.square(difference) * (into.num_pushes * other.num_pushes / count)
    )
    into.num_pushes = count


class MeanStdFilter(RLlibMeanStdFilter):
    """RLlib's connector of that name, with whole batches counted and merged exactly once.

    Its state is RLlib's with a few keys more, so that checkpoints are good for both. It leaves
    observations as they are until two of them were counted: RLlib's own divides by almost nothing
    there, which does not matter where statistics change with every step, but here they are those
    of a version, and the first one may see thousands of steps.

    Attributes:
        reports: A driver merges what is counted here; False where this is the only copy.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._update_stats: bool = kwargs.get("update_stats", True)
        self.reports = True
        self._source = uuid.uuid4().hex
        self._next_segment = 0
        # By agent (None in single-agent work), one RunningStat per leaf.
        self._open: dict[Any, list[RunningStat]] = {}
        self._unacknowledged: dict[Any, list[_Segment]] = {}
        self._merged: dict[str, int] = {}

    @classmethod
    def replacing(cls, connector: RLlibMeanStdFilter) -> MeanStdFilter:
        """One that does what RLlib's own does."""
        exact = cls(
            multi_agent=connector._multi_agent,
            de_mean_to_zero=connector.de_mean_to_zero,
            de_std_to_one=connector.de_std_to_one,
            clip_by_value=connector.clip_by_value,
            update_stats=connector._update_stats,
        )
        # RLlib's constructor looks at its own clip before it has one, if it is given spaces.
        exact.input_action_space = connector.input_action_space
        exact.input_observation_space = connector.input_observation_space
        return exact

    def running(self, agent: Any = None) -> list[RunningStat]:
        """The statistics by leaf; not a copy."""
        if self._filters is None:
            self._init_new_filters()
        statistics: list[RunningStat] = tree.flatten(self._filters[agent].running_stats)
        return statistics

    def applied(self, agent: Any = None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """What is subtracted from observations, and what they are divided by then: ``[*obs]``."""
        (running,) = self.running(agent)
        mean, divisor = np.zeros(running.shape), np.ones(running.shape)
        if running.num_pushes >= _ENOUGH:
            if self.de_mean_to_zero:
                mean = running.mean.copy()
            if self.de_std_to_one:
                divisor = np.asarray(running.std + SMALL_NUMBER, np.float64)
        return mean, divisor

    def count(self, rows: NDArray[Any], agent: Any = None) -> None:
        """Count observations, ``[N, *shape]``, each once."""
        if not self._update_stats or not len(rows):
            return
        statistics = statistics_of(rows)
        (running,) = self.running(agent)
        merge(running, statistics)
        if not self.reports:
            return
        segment = self._open.setdefault(agent, [RunningStat(statistics.shape)])
        merge(segment[0], statistics)

    def __call__(self, *, batch: dict[str, Any], episodes: list[Any], **_: Any) -> Any:
        """See ``ConnectorV2``: filters the newest observations, having counted them."""
        for episode in self.single_agent_episode_iterator(episodes):
            observation = np.asarray(episode.get_observations(indices=-1))
            self.count(observation[None], episode.agent_id)
            mean, divisor = self.applied(episode.agent_id)
            filtered = (observation - mean) / divisor
            if self.clip_by_value:
                filtered = np.clip(filtered, -self.clip_by_value, self.clip_by_value)
            episode.set_observations(at_indices=-1, new_data=filtered.astype(observation.dtype))
            episode.observation_space = self.observation_space
        return batch

    def close_segment(self) -> None:
        """The driver is about to be told: what is counted from now on has another number."""
        if not self._open:
            return
        for agent, statistics in self._open.items():
            segments = self._unacknowledged.setdefault(agent, [])
            segments.append((self._next_segment, statistics))
            del segments[:-_MAX_SEGMENTS]
        self._next_segment += 1
        self._open = {}

    def get_state(
        self, components: Any = None, *, not_components: Any = None, **kwargs: Any
    ) -> dict[Any, Any]:
        """See ``Checkpointable``. Reports what was counted up to the last ``close_segment``."""
        state: dict[Any, Any] = super().get_state(
            components, not_components=not_components, **kwargs
        )
        for agent, agent_state in state.items():
            segments = self._unacknowledged.get(agent, [])
            agent_state["source"] = self._source
            agent_state["segments"] = [
                (number, [one.to_state() for one in statistics]) for number, statistics in segments
            ]
            agent_state["merged"] = dict(self._merged)
            # What RLlib's own merge_states would add, should the driver not be ours.
            pending = [RunningStat(one.shape) for one in self.running(agent)]
            for _, statistics in segments:
                for into, one in zip(pending, statistics, strict=True):
                    merge(into, one)
            for one, delta in zip(agent_state["running_stats"], pending, strict=True):
                one.update(_as_delta(delta))
        return state

    def set_state(self, state: dict[Any, Any]) -> None:
        """See ``Checkpointable``. What is not merged in there yet stays counted."""
        super().set_state(state)
        for agent, agent_state in state.items():
            merged = agent_state.get("merged")
            segments = self._unacknowledged.get(agent, [])
            # A driver that is not ours has merged whatever it was sent.
            last = self._next_segment if merged is None else merged.get(self._source, -1)
            segments = [segment for segment in segments if segment[0] > last]
            self._unacknowledged[agent] = segments
            pending = [statistics for _, statistics in segments]
            pending += [self._open[agent]] if agent in self._open else []
            for statistics in pending:
                for into, one in zip(self.running(agent), statistics, strict=True):
                    merge(into, one)
            self._merged = dict(merged or {})

    def merge_states(self, states: list[dict[Any, Any]]) -> dict[Any, Any]:
        """See ``ConnectorV2``: on the driver, adds what the runners counted and was not added yet.

        Returns:
            The state to send to all of them.
        """
        merged = dict(self._merged)
        for state in states:
            for agent, agent_state in state.items():
                source = agent_state.get("source")
                if source is None:
                    super().merge_states([{agent: agent_state}])
                    continue
                for number, statistics in agent_state["segments"]:
                    if number <= self._merged.get(source, -1):
                        continue
                    for into, one in zip(self.running(agent), statistics, strict=True):
                        merge(into, RunningStat.from_state(one))
                    merged[source] = max(number, merged.get(source, -1))
        self._merged = dict(list(merged.items())[-_MAX_SOURCES:])
        return self.get_state()


def _as_delta(statistics: RunningStat) -> dict[str, Any]:
    state = statistics.to_state()
    return {
        "num_pushes_delta": state["num_pushes"],
        "mean_delta_array": state["mean_array"],
        "sum_sq_diff_delta_array": state["sum_sq_diff_array"],
    }
