from __future__ import annotations

from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from ray.rllib.connectors.connector_v2 import ConnectorV2
from ray.rllib.connectors.env_to_module import FlattenObservations, MeanStdFilter
from ray.rllib.connectors.env_to_module.frame_stacking import FrameStackingEnvToModule
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from client_sdk.wire.batches import SpaceCodec
from tests.runner.support import OBSERVATIONS, HandOverUnderTest, Lane, ppo_config

NESTED = gym.spaces.Dict(
    {
        "position": gym.spaces.Box(-1, 1, (2, 2), np.float32),
        "gear": gym.spaces.Discrete(3),
        "switches": gym.spaces.MultiDiscrete([2, 4]),
        "pair": gym.spaces.Tuple((gym.spaces.MultiBinary(3), gym.spaces.Box(0, 1, (), np.float32))),
    }
)


def _through(space: gym.Space[Any], *make: Any) -> HandOverUnderTest:
    config = ppo_config(env_to_module_connector=lambda env, spaces, device: [m() for m in make])
    config.environment(observation_space=space)
    return HandOverUnderTest(config)


class Doubling(ConnectorV2):
    """Rewrites observations in a way nobody knows of."""

    def __call__(self, *, batch, episodes, **kwargs):
        for episode in self.single_agent_episode_iterator(episodes):
            episode.set_observations(at_indices=-1, new_data=2 * episode.get_observations(-1))
        return batch


class DiffersFromLast(ConnectorV2):
    """Looks back into the episode."""

    def __call__(self, *, batch, episodes, **kwargs):
        for episode in self.single_agent_episode_iterator(episodes):
            episode.set_observations(
                at_indices=-1, new_data=episode.get_observations(-1) + 100 * (episode.t > 0)
            )
        return batch


def test_without_connectors_the_learner_sees_what_was_observed():
    under_test = _through(OBSERVATIONS)
    columns = {"": np.arange(6, dtype=np.float32).reshape(3, 2)}
    assert under_test.policy().view.observations(columns) is columns[""]
    assert under_test.views.space == OBSERVATIONS


def test_connectors_that_only_fill_the_batch_leave_observations_alone():
    frames = gym.spaces.Box(0, 1, (2, 1), np.float32)
    under_test = _through(frames, partial(FrameStackingEnvToModule, num_frames=4))
    assert not under_test.views.replays
    columns = {"": np.zeros((3, 2, 1), np.float32)}
    assert under_test.policy().view.observations(columns) is columns[""]
    assert under_test.views.space == frames


@pytest.mark.parametrize("space", [NESTED, NESTED["gear"], NESTED["switches"], OBSERVATIONS])
def test_flattening_a_batch_gives_what_rllib_gives_one_by_one(space):
    under_test = _through(space, FlattenObservations)
    space.seed(3)
    values = [space.sample() for _ in range(6)]
    view = under_test.policy().view
    got = view.observations(SpaceCodec(space).columns_of_batch(values, 6))
    for row, value in enumerate(values):
        episode = SingleAgentEpisode(observation_space=space)
        episode.add_env_reset(value)
        under_test.pipeline.connectors[0](rl_module=None, batch={}, episodes=[episode])
        np.testing.assert_array_equal(got[row], episode.get_observations(-1))
    assert got.dtype == np.float32
    assert under_test.views.space.shape == got.shape[1:]


def test_nested_observations_without_flattening_keep_their_structure():
    under_test = _through(NESTED)
    NESTED.seed(1)
    values = [NESTED.sample() for _ in range(4)]
    got = under_test.policy().view.observations(SpaceCodec(NESTED).columns_of_batch(values, 4))
    np.testing.assert_array_equal(got["pair"][0][2], values[2]["pair"][0])
    np.testing.assert_array_equal(got["gear"], [value["gear"] for value in values])


def _chunk_observations(under_test, lane, *runs):
    """Hands over (policy, steps) one after another; the learner's observations of each."""
    episodes = []
    for policy, steps in runs:
        episodes += under_test.take(lane.chunk(policy, steps), version=policy.version).episodes
    return episodes


def test_observations_are_filtered_with_their_versions_statistics():
    under_test = _through(OBSERVATIONS, MeanStdFilter)
    lane = Lane()
    (first,) = _chunk_observations(under_test, lane, (under_test.policy(0), 10))
    # No statistics yet: nothing but the bound.
    np.testing.assert_array_equal(first.get_observations()[:, 0], np.arange(11).clip(-10, 10))
    policy = under_test.policy(1)
    (second,) = _chunk_observations(under_test, lane, (policy, 5))
    seen = np.stack([lane.observation(step) for step in range(11)]).astype(np.float64)
    now = np.stack([lane.observation(step) for step in range(10, 16)]).astype(np.float64)
    expected = (now - seen.mean(axis=0)) / (seen.std(axis=0, ddof=1) + 1e-8)
    np.testing.assert_allclose(second.get_observations(), expected, rtol=1e-5)


def test_running_statistics_equal_those_of_a_single_filter():
    under_test = _through(OBSERVATIONS, MeanStdFilter)
    single = _through(OBSERVATIONS, MeanStdFilter).pipeline.connectors[0]
    lanes = [Lane(), Lane(offset=50)]
    for version, steps in enumerate((3, 1, 4)):
        policy = under_test.policy(version)
        last = version == 2
        under_test.take(
            *(lane.chunk(policy, steps, terminated=last) for lane in lanes), version=version
        )
    for lane in lanes:
        for step in range(lane.step + 1):
            episode = SingleAgentEpisode(observation_space=OBSERVATIONS)
            episode.add_env_reset(lane.observation(step))
            single(rl_module=None, batch={}, episodes=[episode])
    (got,), (expected,) = under_test.pipeline.connectors[0].running(), single.running()
    assert got.num_pushes == expected.num_pushes == 18
    np.testing.assert_allclose(got.mean, expected.mean)
    np.testing.assert_allclose(got.std, expected.std, rtol=1e-6)


def test_a_terminal_observation_that_nobody_sent_is_not_counted():
    under_test = _through(OBSERVATIONS, MeanStdFilter)
    chunk = Lane().chunk(under_test.policy(), 3, terminated=True)
    batch, row = chunk.rows[-1]
    chunk.last_observation = {
        path: column[row : row + 1] for path, column in batch.observations.items()
    }
    under_test.take(chunk)
    (running,) = under_test.pipeline.connectors[0].running()
    assert running.num_pushes == 3


def test_discarded_experience_is_not_counted():
    under_test = _through(OBSERVATIONS, MeanStdFilter)
    under_test.take(Lane().chunk(under_test.policy(0), 3), version=5)
    assert under_test.pipeline.connectors[0].running()[0].num_pushes == 0


def test_a_filter_behind_flattening_counts_flat_observations():
    under_test = _through(NESTED, FlattenObservations, MeanStdFilter)
    assert not under_test.views.replays
    NESTED.seed(5)
    values = [NESTED.sample() for _ in range(40)]
    columns = SpaceCodec(NESTED).columns_of_batch(values, 40)
    under_test.views.count(columns)
    view = under_test.policy().view
    filtered = view.observations(columns)
    varying = filtered.std(axis=0) > 0
    np.testing.assert_allclose(filtered.mean(axis=0)[varying], 0, atol=1e-4)
    np.testing.assert_allclose(filtered.std(axis=0, ddof=1)[varying], 1, atol=1e-3)


def test_a_version_keeps_the_statistics_of_its_publication():
    under_test = _through(OBSERVATIONS, MeanStdFilter)
    under_test.views.count({"": np.array([[0, 0], [2, 4]], np.float32)})
    view = under_test.policy().view
    columns = {"": np.array([[1, 2]], np.float32)}
    before = view.observations(columns)
    under_test.views.count({"": np.full((50, 2), 1000, np.float32)})
    np.testing.assert_array_equal(view.observations(columns), before)


def test_joined_chunks_meet_in_the_same_number():
    config = ppo_config(env_to_module_connector=lambda env, spaces, device: MeanStdFilter())
    under_test = HandOverUnderTest(config, joins_chunks=True)
    lane = Lane()
    first, second = _chunk_observations(
        under_test, lane, (under_test.policy(0), 5), (under_test.policy(1), 5)
    )
    first.concat_episode(second)
    assert len(first) == 10


@pytest.mark.parametrize("stepwise", [False, True])
def test_each_step_is_seen_under_its_own_version(stepwise):
    config = ppo_config(env_to_module_connector=lambda env, spaces, device: MeanStdFilter())
    if stepwise:
        config.callbacks(on_episode_step=lambda **kwargs: None)
    under_test = HandOverUnderTest(config)
    under_test.views.count({"": np.random.default_rng(0).normal(size=(9, 2)).astype(np.float32)})
    old = under_test.policy(1)
    under_test.views.count({"": np.full((9, 2), 7, np.float32)})
    new = under_test.policy(2)
    lane = Lane()
    (episode,) = under_test.take(
        lane.chunk(None, 4, policies=[old, old, new, new], terminated=True), version=2
    ).episodes
    raw = {"": np.stack([lane.observation(step) for step in range(5)])}
    expected = np.concatenate([old.view.observations(raw)[:2], new.view.observations(raw)[2:]])
    np.testing.assert_array_equal(episode.get_observations(), expected)


def test_connectors_of_unknown_kind_see_the_episode_grow():
    under_test = _through(OBSERVATIONS, DiffersFromLast, Doubling)
    assert under_test.views.replays
    lane, policy = Lane(), under_test.policy()
    episodes = _chunk_observations(under_test, lane, (policy, 2), (policy, 2))
    assert episodes[0].get_observations()[:, 0].tolist() == [0, 202, 204]
    assert episodes[1].get_observations()[:, 0].tolist() == [204, 206, 208]
    episodes[0].concat_episode(episodes[1])


def test_a_filter_among_unknown_connectors_counts_once_and_is_replayed_as_published():
    under_test = _through(OBSERVATIONS, Doubling, MeanStdFilter)
    lane = Lane()
    _chunk_observations(under_test, lane, (under_test.policy(0), 4), (under_test.policy(1), 3))
    (running,) = under_test.pipeline.connectors[1].running()
    seen = np.stack([2 * lane.observation(step) for step in range(8)]).astype(np.float64)
    assert running.num_pushes == 8
    np.testing.assert_allclose(running.mean, seen.mean(axis=0))
    policy = under_test.policy(2)
    (episode,) = _chunk_observations(under_test, lane, (policy, 2))
    now = np.stack([2 * lane.observation(step) for step in range(7, 10)]).astype(np.float64)
    expected = (now - seen.mean(axis=0)) / (seen.std(axis=0, ddof=1) + 1e-8)
    np.testing.assert_allclose(episode.get_observations(), expected, rtol=1e-5)
