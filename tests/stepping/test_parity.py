"""A remote environment is the local one, bit for bit."""

import functools
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from client_sdk import RemoteEnv, RemoteVectorEnv
from tests.stepping.support import Mixed, Script, hosting

IDS = ["Acrobot-v1", "Blackjack-v1", "CartPole-v1", "FrozenLake-v1", "MountainCar-v0",
       "MountainCarContinuous-v0", "Pendulum-v1", "Taxi-v3"]  # fmt: skip
ENVS = [
    pytest.param(functools.partial(gym.make, name, max_episode_steps=20), id=name) for name in IDS
]
ENVS.append(pytest.param(Mixed, id="every space"))


def assert_same(here, there):
    """Of the same values, shapes and dtypes; a remote Discrete gives numpy's integers."""
    if isinstance(here, dict):
        assert here.keys() == there.keys()
        for key in here:
            assert_same(here[key], there[key])
    elif isinstance(here, tuple):
        assert len(here) == len(there)
        for left, right in zip(here, there, strict=True):
            assert_same(left, right)
    elif isinstance(here, np.ndarray):
        assert (here.dtype, here.shape) == (there.dtype, there.shape)
        assert here.tobytes() == there.tobytes()
    else:
        assert here == there


@pytest.mark.parametrize("make", ENVS)
def test_same_seed_and_actions_give_the_same_episodes(make):
    local = make()
    with hosting(make) as host, RemoteEnv(host.address) as remote:
        assert remote.observation_space == local.observation_space
        assert remote.action_space == local.action_space
        local.action_space.seed(5)
        for seed in (3, None, 7, None):
            observation, _ = remote.reset(seed=seed)
            assert_same(local.reset(seed=seed)[0], observation)
            assert remote.observation_space.contains(observation)
            ended = False
            for _ in range(60):
                action = local.action_space.sample()
                ours, theirs = remote.step(action), local.step(action)
                assert_same(theirs[0], ours[0])
                assert ours[1:4] == theirs[1:4]
                assert [type(each) for each in ours[1:4]] == [float, bool, bool]
                ended = ours[2] or ours[3]
                if ended:
                    break
    local.close()


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("make", ENVS)
def test_many_at_once_are_a_vector_environment_with_next_step_autoreset(make, n):
    local = SyncVectorEnv([make] * n, autoreset_mode=AutoresetMode.NEXT_STEP)
    with hosting(make) as host, RemoteVectorEnv(host.address, num_envs=n) as remote:
        assert remote.observation_space == local.observation_space
        assert remote.action_space == local.action_space
        assert remote.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
        local.action_space.seed(5)
        ends = 0
        for seed in (4, [10, 20, 30][:n], None):
            assert_same(local.reset(seed=seed)[0], remote.reset(seed=seed)[0])
            for _ in range(60):
                actions = local.action_space.sample()
                ours, theirs = remote.step(actions), local.step(actions)
                assert_same(theirs[:4], ours[:4])
                ends += int(np.sum(ours[2] | ours[3]))
        assert ends > 0
    local.close()


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1", "FrozenLake-v1", "Blackjack-v1"])
def test_gymnasium_finds_no_fault_with_it(name):
    with hosting(name) as host, RemoteEnv(host.address) as env, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of advice on spaces, which are not ours
        check_env(env)


def test_gymnasium_finds_no_fault_with_every_space_and_rendering():
    with (
        hosting(Mixed) as host,
        RemoteEnv(host.address, render_mode="rgb_array") as env,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        check_env(env)


@pytest.mark.parametrize("nothing", [{}, ()])
def test_an_observation_without_any_leaf_is_one(nothing):
    class Blind(Mixed):
        observation_space = spaces.Tuple(()) if nothing == () else spaces.Dict({})

        def _observe(self):
            return nothing, {}

    with hosting(Blind) as host, RemoteEnv(host.address) as env:
        assert env.reset() == (nothing, {})
        assert env.step(env.action_space.sample())[0] == nothing


def test_arrays_in_infos_of_a_vector_are_stacked_and_ragged_ones_stay_lists():
    local = SyncVectorEnv([functools.partial(gym.make, "Taxi-v3")] * 2)
    with hosting("Taxi-v3") as host, RemoteVectorEnv(host.address, num_envs=2) as remote:
        _, ours = remote.reset(seed=1)
        _, theirs = local.reset(seed=1)
        assert ours["action_mask"].tolist() == theirs["action_mask"].tolist()
        assert ours["_action_mask"].all()
    local.close()
    lengths = iter([1, 2, 3, 4])
    script = Script(reset=lambda: {"list": [1] * next(lengths), "inside": {"text": "a"}})
    with hosting(script.make) as host, RemoteVectorEnv(host.address, num_envs=2) as remote:
        _, infos = remote.reset()
        assert infos["list"].tolist() == [[1.0], [1.0, 1.0]]
        assert infos["inside"]["text"].tolist() == ["a", "a"]


def test_infos_of_a_vector_have_masks_as_gymnasium_has_them():
    def make():
        return gym.make("FrozenLake-v1", is_slippery=False)

    local = SyncVectorEnv([make] * 2)
    with hosting(make) as host, RemoteVectorEnv(host.address, num_envs=2) as remote:
        _, ours = remote.reset(seed=1)
        _, theirs = local.reset(seed=1)
        assert ours.keys() == theirs.keys() == {"prob", "_prob"}
        assert ours["prob"].tolist() == theirs["prob"].tolist()
        assert ours["_prob"].dtype == np.bool_
    local.close()
