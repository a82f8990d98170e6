from __future__ import annotations

import math

import pytest
from ray.rllib.utils.metrics.metrics_logger import MetricsLogger

from policy_server.episode_metrics import EpisodeMetrics
from policy_server.experience import EpisodeEnd
from tests.runner.support import ppo_config


class _Runner:
    def __init__(self):
        self.config = ppo_config()
        self.metrics = MetricsLogger(root=True)


@pytest.fixture
def logged():
    runner = _Runner()
    metrics = EpisodeMetrics(runner)

    def log(training=(), evaluation=()):
        metrics.log(training, evaluation)
        return runner.metrics.reduce(compile=True)

    return log


def _end(episode_return=1.0, reported=True, **numbers):
    return EpisodeEnd(episode_return, 10, 0.5, numbers, reported)


def test_returns_and_the_applications_numbers_are_means_over_episodes(logged):
    result = logged([_end(1.0, goals=2.0), _end(3.0, goals=4.0)])
    assert result["episode_return_mean"] == 2.0
    assert result["episode_return_max"] == 3.0
    assert result["episode_len_mean"] == 10
    assert result["goals"] == 3.0


def test_evaluation_has_keys_of_its_own(logged):
    result = logged([_end(1.0)], [_end(9.0, goals=5.0)])
    assert result["episode_return_mean"] == 1.0
    assert result["evaluation"]["episode_return_mean"] == 9.0
    assert result["evaluation"]["num_episodes"] == 1
    assert result["evaluation"]["goals"] == 5.0
    assert "goals" not in result


def test_no_evaluation_episode_is_counted_as_none(logged):
    assert "evaluation" not in logged([_end(1.0)])
    logged([], [_end(9.0), _end(9.0, reported=False)])
    result = logged([_end(1.0)])
    assert result["evaluation"]["num_episodes"] == 0
    assert result["evaluation"]["num_episodes_lifetime"] == 1


def test_an_episode_whose_beginning_is_unknown_reports_no_return(logged):
    assert "episode_return_mean" not in logged([_end(7.0, reported=False)])


def test_names_of_rllibs_own_results_are_refused_once(logged, caplog):
    end = _end(1.0, num_env_steps_sampled=5.0, weights_seq_no=1.0)
    result = logged([end, end])
    assert "num_env_steps_sampled" not in result
    assert caplog.text.count("'num_env_steps_sampled' is not reported") == 1


def test_a_name_in_use_by_a_callback_costs_only_that_number(logged, caplog):
    runner = _Runner()
    runner.metrics.log_value(("mine", "nested"), 1.0, window=1)
    EpisodeMetrics(runner).log([_end(1.0, mine=5.0, goals=1.0)], [])
    result = runner.metrics.reduce(compile=True)
    assert result["goals"] == 1.0
    assert result["mine"] == {"nested": 1.0}
    assert "'mine' is not reported" in caplog.text


def test_numbers_that_are_none_are_left_out(logged):
    result = logged([_end(1.0, a=math.nan, b=math.inf, c=1.0)])
    assert "a" not in result
    assert "b" not in result
    assert result["c"] == 1.0


def test_a_flood_of_names_is_bounded(logged, caplog):
    result = logged([_end(1.0, **{f"n{i}": 1.0 for i in range(2000)})])
    assert sum(name.startswith("n") and name[1:].isdigit() for name in result) == 256
    assert len(caplog.records) <= 300
