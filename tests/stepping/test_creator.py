"""``RemoteEnvCreator``: a host for each env runner, which is there when needed and gone afterwards."""

import contextlib
import os
import pickle
import signal
import sys

import numpy as np
import psutil
import pytest
from ray import tune
from ray.rllib.algorithms.ppo import PPOConfig

from client_sdk import RemoteEnv, RemoteVectorEnv
from client_sdk.errors import EnvironmentLostError
from policy_server.stepping import HostError, RemoteEnvCreator
from tests.stepping.support import wait_for

CREATOR = RemoteEnvCreator("CartPole-v1")


def hosts_of(pid):
    """The host processes that this process has started."""
    return [child for child in psutil.Process(pid).children() if "host" in child.cmdline()]


@pytest.fixture(autouse=True)
def nothing_left():
    yield
    assert hosts_of(os.getpid()) == []


def test_environments_of_a_process_share_one_host_which_ends_with_the_last():
    creator = pickle.loads(pickle.dumps(CREATOR))
    single, vector = creator({}), creator({"num_envs": 3})
    assert isinstance(single, RemoteEnv)
    assert isinstance(vector, RemoteVectorEnv)
    (host,) = hosts_of(os.getpid())
    single.reset(seed=1)
    assert vector.reset(seed=1)[0].shape == (3, 4)
    single.close()
    single.close()
    assert hosts_of(os.getpid()) == [host]
    assert vector.step(np.zeros(3, np.int64))[1].tolist() == [1.0] * 3
    vector.close()
    assert not host.is_running()


def test_arguments_reach_the_environment_with_their_types():
    creator = RemoteEnvCreator("CartPole-v1", {"max_episode_steps": 9})
    with contextlib.closing(creator({"max_episode_steps": 3})) as env:
        env.reset(seed=1)
        assert [env.step(step % 2)[3] for step in range(3)] == [False, False, True]
    with pytest.raises(ValueError, match="expected JSON values as arguments of 'CartPole-v1'"):
        creator({"callback": print})


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"host_command": "simulator --fast"}, r"host_command: .*got 'simulator --fast'"),
        ({"host_command": []}, r"host_command: expected a list of words"),
        ({"start_timeout_s": 0}, "start_timeout_s: expected a positive number"),
        ({"env": print}, "env: expected a Gymnasium id or 'module:function'"),
        ({"env": ""}, "env: expected a Gymnasium id"),
    ],
)
def test_settings_that_cannot_be_right_are_refused_by_name(settings, says):
    with pytest.raises(ValueError, match=says):
        RemoteEnvCreator(**{"env": "CartPole-v1", **settings})


def test_environments_are_as_many_as_asked_for_and_have_as_long_as_their_host():
    creator = RemoteEnvCreator("CartPole-v1", start_timeout_s=31.0)
    with contextlib.closing(creator({"num_envs": 300})) as envs:
        assert envs.reset(seed=1)[0].shape == (300, 4)
        assert envs._lease.connection()["connect_timeout"] == 31.0


def test_what_can_be_imported_here_can_be_hosted(tmp_path, monkeypatch):
    (tmp_path / "my_robot.py").write_text(
        "import gymnasium\ndef make(): return gymnasium.make('Acrobot-v1')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with contextlib.closing(RemoteEnvCreator("my_robot:make")({})) as env:
        assert env.reset(seed=1)[0].shape == (6,)


def test_a_simulator_with_a_python_of_its_own_keeps_its_modules(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/theirs")
    creator = RemoteEnvCreator("x", host_command=["/bin/sh", "-c", 'echo "at $PYTHONPATH."'])
    with pytest.raises(HostError, match=r"at /theirs\."):
        creator({})


@pytest.mark.parametrize("arguments", [{}, {"num_envs": 2}])
def test_a_host_that_dies_is_started_again_at_the_next_reset(arguments):
    with contextlib.closing(CREATOR(arguments)) as env, contextlib.closing(CREATOR({})) as other:
        env.reset(seed=1)
        other.reset(seed=1)
        (host,) = hosts_of(os.getpid())
        host.kill()
        action = np.zeros(2, np.int64) if arguments else 0
        with pytest.raises(EnvironmentLostError, match="reset"):
            env.step(action)
        first, _ = env.reset(seed=1)
        again, _ = other.reset(seed=1)
        assert np.array_equal(np.atleast_2d(first)[0], again)
        env.step(action)
        (successor,) = hosts_of(os.getpid())
        assert successor != host


def test_nobody_else_on_the_machine_can_use_the_host():
    with contextlib.closing(CREATOR({})) as env:
        (host,) = hosts_of(os.getpid())
        with pytest.raises(Exception, match="token"):
            RemoteEnv(env._lease._at)
        assert not [word for word in host.cmdline() if word == env._lease._host.token]


@pytest.mark.parametrize(
    ("creator", "says"),
    [
        (RemoteEnvCreator("NoSuchEnv-v3"), r"(?s)did not start .*exit code 2.*NoSuchEnv"),
        (RemoteEnvCreator("x", host_command=["/no/such/simulator"]), "cannot start '/no/such"),
        (
            RemoteEnvCreator("x", host_command=[sys.executable, "-c", "print('my last words')"]),
            r"(?s)did not start .*exit code 0.*my last words",
        ),
        (
            RemoteEnvCreator(
                "x",
                host_command=[sys.executable, "-c", "import time; time.sleep(60)"],
                start_timeout_s=0.2,
            ),
            r"did not answer within 0\.2 s",
        ),
    ],
)
def test_a_host_that_cannot_start_is_one_error_with_its_last_words(creator, says):
    with pytest.raises(HostError, match=says):
        creator({})


# In RLlib.


# Its name is registered by each env runner of a process.
in_rllib = pytest.mark.filterwarnings("ignore:.*Overriding environment rllib-single-agent-env-v0")


@contextlib.contextmanager
def algorithm(creator=CREATOR, *, replace_runners=True, **env_runners):
    """A small PPO over hosted environments; stopped at the end, and every host with it."""
    tune.register_env("hosted-cartpole", creator)
    config = (
        PPOConfig()
        .environment("hosted-cartpole")
        .env_runners(**env_runners)
        .training(train_batch_size=200, minibatch_size=100, num_epochs=1)
        .rl_module(model_config={"fcnet_hiddens": [8]})
        .fault_tolerance(
            restart_failed_sub_environments=True, restart_failed_env_runners=replace_runners
        )
    )
    algo = config.build_algo()
    try:
        yield algo
    finally:
        hosts = [host for pid in pids(algo) for host in hosts_of(pid)]
        algo.stop()
        wait_for(lambda: not any(map(psutil.Process.is_running, hosts)))


def pids(algo):
    return algo.env_runner_group.foreach_env_runner(
        lambda _: os.getpid(), local_env_runner=algo.config.num_env_runners == 0
    )


@in_rllib
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("runners", "vectorize"), [(0, "vector_entry_point"), (1, "sync"), (2, "vector_entry_point")]
)
def test_ppo_steps_several_environments_in_each_env_runner(ray_session, runners, vectorize):
    with algorithm(
        num_env_runners=runners, num_envs_per_env_runner=3, gym_env_vectorize_mode=vectorize
    ) as algo:
        for _ in range(2):
            result = algo.train()["env_runners"]
        assert result["num_env_steps_sampled_lifetime"] >= 400
        assert result["episode_return_mean"] > 5
        assert [len(hosts_of(pid)) for pid in pids(algo)] == [1] * max(runners, 1)


@in_rllib
@pytest.mark.timeout(240)
def test_training_survives_its_host_and_the_host_does_not_survive_its_runner(ray_session):
    with algorithm(num_env_runners=1, num_envs_per_env_runner=2) as algo:
        algo.train()
        (runner,) = pids(algo)
        (host,) = hosts_of(runner)
        host.kill()
        algo.train()
        (successor,) = hosts_of(runner)
        assert successor != host
        os.kill(runner, signal.SIGKILL)
        wait_for(lambda: not successor.is_running())


@in_rllib
@pytest.mark.timeout(240)
@pytest.mark.parametrize("runners", [0, 1])
def test_an_algorithm_whose_host_cannot_start_says_why(ray_session, runners):
    with (
        pytest.raises(Exception, match=r"(?s)host of environments did not start.*NoSuchEnv"),
        algorithm(RemoteEnvCreator("NoSuchEnv-v3"), replace_runners=False, num_env_runners=runners),
    ):
        pass
