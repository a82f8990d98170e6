from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from ray.rllib.connectors.env_to_module.mean_std_filter import MeanStdFilter as RLlibMeanStdFilter
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.filter import RunningStat

from policy_server.filters import MeanStdFilter, merge, statistics_of

SPACE = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)


def _rllibs_own(space=SPACE):
    connector = RLlibMeanStdFilter()
    connector.input_action_space = gym.spaces.Discrete(2)
    connector.input_observation_space = space
    return connector


def _filter(space=SPACE, *, reports=True):
    connector = MeanStdFilter.replacing(_rllibs_own(space))
    connector.reports = reports
    return connector


def _rows(rng, n):
    return (rng.normal(size=(n, 3)) * [1, 10, 0.1] + [5, -100, 0]).astype(np.float32)


def _expect(connector, rows):
    (statistics,) = connector.running()
    assert statistics.num_pushes == len(rows)
    np.testing.assert_allclose(statistics.mean, rows.astype(np.float64).mean(axis=0), rtol=1e-9)
    expected = rows.astype(np.float64).std(axis=0, ddof=1)
    np.testing.assert_allclose(statistics.std, expected, rtol=1e-5)


def test_counting_a_batch_is_counting_its_rows_one_by_one(rng):
    rows = _rows(rng, 50)
    one_by_one = RunningStat((3,))
    for row in rows:
        one_by_one.push(row.astype(np.float64))
    batched = statistics_of(rows[:20])
    merge(batched, statistics_of(rows[20:]))
    assert batched.num_pushes == one_by_one.num_pushes
    np.testing.assert_allclose(batched.mean, one_by_one.mean)
    np.testing.assert_allclose(batched.sum_sq_diff_array, one_by_one.sum_sq_diff_array, rtol=1e-9)


def test_filtering_is_as_rllib_does_it(rng):
    ours, theirs = _filter(), _rllibs_own()
    for row in _rows(rng, 20):
        filtered = []
        for connector in (ours, theirs):
            episode = SingleAgentEpisode(observation_space=SPACE)
            episode.add_env_reset(row)
            connector(rl_module=None, batch={}, episodes=[episode])
            filtered.append(episode.get_observations(-1))
        if ours.running()[0].num_pushes > 1:
            np.testing.assert_allclose(*filtered, rtol=1e-4, atol=1e-5)
            assert filtered[0].dtype == filtered[1].dtype


def test_without_statistics_observations_stay_as_they_are():
    connector = _filter()
    mean, divisor = connector.applied()
    assert (mean == 0).all()
    assert (divisor == 1).all()


def test_merging_nothing_changes_nothing():
    empty = statistics_of(np.zeros((0, 3)))
    merge(empty, statistics_of(np.zeros((0, 3))))
    assert empty.num_pushes == 0
    assert np.isfinite(empty.mean).all()


def _report(runner):
    runner.close_segment()
    return runner.get_state()


def _round(driver, runners, *, lost=()):
    merged = driver.merge_states([_report(runner) for runner in runners])
    driver.set_state(merged)
    for i, runner in enumerate(runners):
        if i not in lost:
            runner.set_state(merged)


def test_two_runners_end_with_the_statistics_of_a_single_filter(rng):
    driver, runners, rows = _filter(), [_filter(), _filter()], []
    for _ in range(4):
        for runner in runners:
            rows.append(_rows(rng, 30))
            runner.count(rows[-1])
        _round(driver, runners)
    for connector in (driver, *runners):
        _expect(connector, np.concatenate(rows))


def test_a_lost_set_state_is_made_up_for_and_nothing_is_counted_twice(rng):
    driver, runners, rows = _filter(), [_filter(), _filter()], []
    for lost in ((0,), (0, 1), (), (1,), ()):
        for runner in runners:
            rows.append(_rows(rng, 10))
            runner.count(rows[-1])
        _round(driver, runners, lost=lost)
    for connector in (driver, *runners):
        _expect(connector, np.concatenate(rows))


def test_a_lost_answer_to_get_state_is_made_up_for(rng):
    driver, runner = _filter(), _filter()
    first, second = _rows(rng, 10), _rows(rng, 20)
    runner.count(first)
    _report(runner)  # never arrives
    runner.count(second)
    _round(driver, [runner])
    _expect(driver, np.concatenate([first, second]))
    _expect(runner, np.concatenate([first, second]))


def test_what_is_counted_before_a_late_set_state_stays_counted(rng):
    driver, runner = _filter(), _filter()
    first, second = _rows(rng, 10), _rows(rng, 20)
    runner.count(first)
    merged = driver.merge_states([_report(runner)])
    runner.count(second)
    runner.set_state(merged)
    _expect(runner, np.concatenate([first, second]))
    _round(driver, [runner])
    _expect(driver, np.concatenate([first, second]))


def test_a_restarted_runner_starts_from_what_all_have_counted(rng):
    driver, runner, rows = _filter(), _filter(), [_rows(rng, 10), _rows(rng, 10)]
    runner.count(rows[0])
    _round(driver, [runner])
    runner = _filter()
    runner.set_state(driver.get_state())
    runner.count(rows[1])
    _round(driver, [runner])
    _expect(driver, np.concatenate(rows))
    _expect(runner, np.concatenate(rows))


def test_rllibs_own_driver_gets_the_mean_right_as_well(rng):
    driver, runner = _rllibs_own(), _filter()
    rows = _rows(rng, 60)
    for start in (0, 20, 40):
        runner.count(rows[start : start + 20])
        runner.set_state(driver.merge_states([_report(runner)]))
    (statistics,) = runner.running()
    assert statistics.num_pushes == 60
    np.testing.assert_allclose(statistics.mean, rows.astype(np.float64).mean(axis=0), rtol=1e-6)


def test_looking_at_the_state_reports_nothing(rng):
    driver, runner = _filter(), _filter()
    rows = _rows(rng, 10)
    runner.count(rows[:5])
    runner.set_state(driver.merge_states([runner.get_state()]))
    runner.count(rows[5:])
    _round(driver, [runner])
    _expect(driver, rows)
    _expect(runner, rows)


def test_restoring_a_checkpoint_takes_back_what_came_after_it(rng):
    connector = _filter(reports=False)
    before = _rows(rng, 10)
    connector.count(before)
    checkpoint = connector.get_state()
    connector.count(_rows(rng, 30))
    connector.set_state(checkpoint)
    _expect(connector, before)


def test_rllibs_own_filter_reads_our_checkpoint(rng):
    ours, rows = _filter(), _rows(rng, 10)
    ours.count(rows)
    theirs = _rllibs_own()
    theirs.set_state(ours.get_state())
    assert theirs._filters[None].running_stats.num_pushes == 10


def test_memory_stays_bounded_where_nobody_answers(rng):
    runner = _filter()
    for _ in range(300):
        runner.count(_rows(rng, 1))
        runner.close_segment()
    assert len(runner.get_state()[None]["segments"]) <= 128


@pytest.fixture
def rng():
    return np.random.default_rng(7)
