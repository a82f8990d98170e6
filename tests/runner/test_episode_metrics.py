from __future__ import annotations

import math
import pickle

import pytest
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from ray.rllib.utils.metrics.metrics_logger import MetricsLogger

from policy_server.episode_metrics import EpisodeMetrics
from policy_server.experience import EpisodeEnd
from policy_server.lasting_stats import forget_restored
from tests.runner.support import ppo_config


class _Runner:
    def __init__(self, *, root=True):
        self.config = ppo_config()
        self.metrics = MetricsLogger(root=root)


class _Driver:
    """RLlib's side of a runner's metrics: collected with each sample(), compiled by iteration."""

    def __init__(self):
        self.metrics = MetricsLogger(root=True)
        self._runner = _Runner(root=False)
        self._ends = EpisodeMetrics(self._runner)

    def iterate(self, *samples):
        for training, evaluation in samples:
            self._ends.log(training, evaluation)
            report = pickle.loads(pickle.dumps(self._runner.metrics.reduce()))
            self.metrics.aggregate([report], key="env_runners")
        return self.metrics.compile()["env_runners"]


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


def test_names_and_values_are_those_of_rllibs_own_env_runner(logged):
    own = _Runner()
    for end in (_end(1.0), _end(4.0)):
        SingleAgentEnvRunner._log_episode_metrics(
            own, end.length, end.episode_return, end.duration_s
        )
    assert logged([_end(1.0), _end(4.0)]) == own.metrics.reduce(compile=True)


_NOBODY = ([], [])


def test_the_latest_values_last_and_are_not_weighed_again():
    driver = _Driver()
    first = driver.iterate(([_end(1.0, goals=2.0)], [_end(9.0)]), _NOBODY, ([_end(3.0)], []))
    assert (first["episode_return_mean"], first["evaluation"]["episode_return_mean"]) == (2.0, 9.0)
    second = driver.iterate(_NOBODY, _NOBODY)
    assert second == first | {
        "evaluation": first["evaluation"] | {"num_episodes": 0},
    }
    third = driver.iterate(_NOBODY, ([_end(7.0)], []), _NOBODY)
    assert third["episode_return_mean"] == third["episode_return_min"] == 7.0
    assert third["goals"] == 2.0


def test_a_checkpoint_of_them_loads_anywhere_and_they_last_again_afterwards():
    driver, resumed = _Driver(), _Driver()
    driver.iterate(([_end(1.0)], []))
    resumed.metrics.set_state(driver.metrics.get_state())
    forget_restored(resumed.metrics)
    assert "episode_return_mean" not in resumed.iterate(_NOBODY)
    resumed.iterate(([_end(5.0)], []))
    assert resumed.iterate(_NOBODY)["episode_return_mean"] == 5.0


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
