"""The ready loop over Gymnasium environments."""

import gc

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from client_sdk.errors import InvalidValueError, SpaceMismatchError
from client_sdk.runner import RunSummary, run_gymnasium
from tests.client.support import QUICK
from tests.servers import CARTPOLE_ACTIONS, CARTPOLE_OBSERVATIONS, serving


class Ramp(gym.Env):
    """Earns 1, 2, 3 ... and is truncated after three steps."""

    observation_space = CARTPOLE_OBSERVATIONS
    action_space = CARTPOLE_ACTIONS
    closed = False
    step_count = 0

    def reset(self, *, seed=None, options=None):
        self.step_count = 0
        return np.zeros(4, np.float32), {}

    def step(self, action):
        self.step_count += 1
        over = self.step_count == 3
        return np.full(4, self.step_count, np.float32), float(self.step_count), False, over, {}

    def close(self):
        self.closed = True


def run(server, env, **settings):
    return run_gymnasium(env, server.address, timeouts=QUICK, **settings)


def ended(server):
    chunks = server.collect(10_000, timeout_s=0.1)
    return [chunk for chunk in chunks if chunk.end is not None and chunk.steps]


def test_it_ends_after_so_many_episodes_and_says_what_they_came_to(server):
    summary = run(server, Ramp, num_envs=2, episodes=6)
    assert (summary.episodes, summary.steps) == (6, 18)
    assert (summary.mean_return, summary.mean_length) == (6.0, 3.0)
    assert summary.policy_version == 1
    assert summary.steps_per_s > 0
    assert [chunk.rewards for chunk in ended(server)] == [[1.0, 2.0, 3.0]] * 6


def test_an_id_makes_as_many_environments_as_asked_for(server):
    summary = run(server, "CartPole-v1", num_envs=4, episodes=8, seed=3)
    assert summary.episodes >= 8
    assert len(ended(server)) == summary.episodes


def test_one_environment_is_run_and_left_open(server):
    env = Ramp()
    assert run(server, env, episodes=2).steps == 6
    gc.collect()
    assert not env.closed


def test_environments_that_it_made_are_closed(server):
    made = []

    def make():
        made.append(Ramp())
        return made[-1]

    run(server, make, episodes=1)
    assert made[0].closed


def test_a_vector_environment_is_taken_as_it_is(server):
    envs = SyncVectorEnv([Ramp] * 3, autoreset_mode=AutoresetMode.NEXT_STEP)
    assert run(server, envs, episodes=3).episodes == 3
    assert not envs.closed
    envs.close()


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.DISABLED])
def test_another_autoreset_is_refused(server, mode):
    envs = SyncVectorEnv([Ramp], autoreset_mode=mode)
    with pytest.raises(InvalidValueError, match="NEXT_STEP"):
        run(server, envs, episodes=1)
    envs.close()


@pytest.mark.parametrize(
    ("env", "settings", "says"),
    [
        (Ramp(), {"num_envs": 2}, "num_envs"),
        (Ramp, {"num_envs": 0}, "num_envs"),
        (Ramp, {"num_envs": "2"}, "num_envs: expected a whole number of at least 1, got '2'"),
        (Ramp, {"episodes": 0}, "episodes"),
        (Ramp, {"episodes": 1.5}, "episodes: expected a whole number of at least 1, got 1.5"),
        (Ramp, {"inference_mode": "both"}, "remote"),
    ],
)
def test_what_cannot_be_run_is_refused(server, env, settings, says):
    with pytest.raises(InvalidValueError, match=says):
        run(server, env, **settings)


def test_an_environment_of_another_shape_is_refused_by_the_first_message(server):
    class Wider(Ramp):
        observation_space = gym.spaces.Box(-1, 1, (5,), np.float32)

        def reset(self, *, seed=None, options=None):
            return np.zeros(5, np.float32), {}

    with pytest.raises(SpaceMismatchError, match=r"expected \[4\], got \[5\]"):
        run(server, Wider, episodes=1)


def test_an_environment_of_other_actions_is_refused_by_the_handshake():
    refused = pytest.raises(SpaceMismatchError, match="action_space")
    with serving(gym.spaces.Box(-2, 2, (2,), np.float32)) as server, refused:
        run(server, "MountainCar-v0", episodes=1)


def test_evaluation_trains_nothing(server):
    run(server, Ramp, episodes=2, training_enabled=False)
    assert not ended(server)
    assert server.ledger()["discarded_evaluation"] == 6


def test_progress_is_reported(server):
    seen = []
    run(server, Ramp, episodes=3, on_progress=seen.append, progress_every_s=0.0)
    assert isinstance(seen[0], RunSummary)
    assert [summary.episodes for summary in seen] == sorted(summary.episodes for summary in seen)
    assert np.isnan(seen[0].mean_return)


def test_an_exception_of_the_environment_ends_the_session_cleanly(server):
    class Broken(Ramp):
        def step(self, action):
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        run(server, Broken, episodes=1)
    assert server.server.sessions == 0
