"""Local inference: the policy acts here, and what it experiences is brought to the server."""

import subprocess
import sys
import threading
import time

import gymnasium as gym
import numpy as np
import pytest

from client_sdk import PolicyClient, PolicyTimeout, Timeouts
from client_sdk.errors import ClosedClientError, InvalidValueError, NoLocalInferenceError
from client_sdk.runner import run_gymnasium
from tests.client.acting_alone import serving_alone
from tests.client.support import LOCAL_KINDS, PATIENCE_S, QUICK, connect_once, connected, seen
from tests.server.talk import eventually
from tests.servers import CARTPOLE_ACTIONS, serving


@pytest.fixture(params=LOCAL_KINDS)
def kind(request):
    """Which client."""
    return request.param


@pytest.fixture
def server():
    """A server that clients may leave alone."""
    with serving_alone() as under_test:
        yield under_test


def play(client, steps, first=0, **options):
    """An episode of that many steps, observing ``first``, ``first + 1``, ..."""
    with client.episode(**options) as episode:
        for step in range(steps):
            episode.act(seen(first + step), float(step))
        episode.end(seen(first + steps), float(steps), terminated=True)


def rows_of(chunks):
    """First elements of the observations that actions were chosen for."""
    return [float(batch.observations[""][row, 0]) for chunk in chunks for batch, row in chunk.rows]


def versions_of(chunks):
    return [chunk.policy.version for chunk in chunks for _ in chunk.rows]


# -- experience ------------------------------------------------------------------------------------


def test_experience_arrives_with_what_the_policy_said(kind, server):
    server.publish(2, action=1)
    with connected(kind, server.address) as client:
        play(client, 5)
    (chunk,) = server.collect(5)
    assert rows_of([chunk]) == [0, 1, 2, 3, 4]
    assert chunk.rewards == [1, 2, 3, 4, 5]
    for batch, row in chunk.rows:
        assert batch.actions[""][row] == 1
        assert batch.outputs["action_logp"][row] == pytest.approx(0.0, abs=1e-5)
        assert batch.outputs["action_dist_inputs"][row].tolist() == [-20.0, 20.0]
    assert chunk.policy.version == 2


def test_episodes_one_after_the_other_keep_apart(kind, server):
    with connected(kind, server.address) as client:
        play(client, 2)
        play(client, 3, first=10, explore=False)
        play(client, 1, first=20, training_enabled=False)
        play(client, 40, first=30)
        play(client, 2, first=80)
    chunks = server.collect(44)
    assert [rows_of([chunk]) for chunk in chunks if chunk.training] == [
        [0, 1],
        [*range(30, 70)],
        [80, 81],
    ]
    assert [chunk.end.length for chunk in chunks if not chunk.training] == [3, 1]


def test_long_episodes_go_up_in_parts_of_the_size_the_server_likes(kind):
    with (
        serving_alone(steps_per_upload=10) as server,
        connected(kind, server.address) as client,
        client.episode() as episode,
    ):
        for step in range(35):
            episode.act(seen(step), float(step > 0))
        chunks = server.collect(30)
        assert rows_of(chunks) == list(range(30))
        assert [chunk.steps for chunk in chunks] == [10, 10, 10]


def test_a_box_action_is_executed_unsquashed_and_learnt_from_as_the_graph_gave_it(kind):
    from ray.rllib.algorithms.ppo import PPOConfig

    from tests.server.exporting import exporting

    space = gym.spaces.Box(-5.0, 5.0, (2,), np.float32)
    algorithm = PPOConfig().rl_module(model_config={"fcnet_hiddens": [8]})
    with (
        exporting(algorithm, action_space=space) as server,
        connected(kind, server.address) as client,
        client.episode() as episode,
    ):
        executed = [episode.act(seen(step), float(step > 0)) for step in range(6)]
        episode.end(seen(6), 1.0, terminated=True)
        (chunk,) = server.collect(6)
    assert all(action in space for action in executed)
    learnt = np.array([batch.actions[""][row] for batch, row in chunk.rows])
    np.testing.assert_allclose(np.clip(learnt, -1, 1) * 5.0, executed, rtol=1e-5, atol=1e-5)


def test_logged_actions_are_recorded_and_marked(kind, server):
    with connected(kind, server.address) as client:
        episode_id = client.start_episode()
        client.log_action(episode_id, seen(0), 1, logp=-0.7)
        client.log_returns(episode_id, 1.0)
        client.log_action(episode_id, seen(1), 0, logp=-0.3)
        client.log_returns(episode_id, 2.0)
        client.get_action(episode_id, seen(2))
        client.end_episode(episode_id, seen(3))
    chunks = server.collect(3)
    assert rows_of(chunks) == [0, 1, 2]
    assert [chunk.logged for chunk in chunks] == [[0, 1], []]
    assert [reward for chunk in chunks for reward in chunk.rewards] == [1.0, 2.0, 0.0]
    (batch, row), (_, _) = chunks[0].rows
    assert batch.outputs["action_logp"][row] == pytest.approx(-0.7)


def test_what_is_abandoned_is_not_learnt_from(kind):
    with (
        serving_alone(steps_per_upload=5) as server,
        connected(kind, server.address) as client,
    ):
        with client.episode() as episode:
            for step in range(8):
                episode.act(seen(step))
            eventually(lambda: server.ledger()["received"] > 0)
        with client.episode() as never_sent:
            never_sent.act(seen(0))
        client.close()
        ledger = server.ledger()
        assert ledger["received"] == ledger["discarded_abandoned"] > 0
        assert server.unaccounted() == 0


def test_closing_uploads_what_running_episodes_have_experienced(kind, server):
    with connected(kind, server.address) as client:
        episode_id = client.start_episode()
        for step in range(4):
            client.get_action(episode_id, seen(step))
    chunks = server.collect(3)
    assert rows_of(chunks) == [0, 1, 2]
    assert chunks[-1].truncated


def test_a_slow_application_is_heard_of_all_the_same(kind, monkeypatch):
    monkeypatch.setattr("client_sdk.local_steps.MAX_AGE_S", 0.0)
    with (
        serving_alone() as server,
        connected(kind, server.address) as client,
        client.episode() as episode,
    ):
        for step in range(3):
            episode.act(seen(step))
        assert rows_of(server.collect(2)) == [0, 1]


# -- the policy ------------------------------------------------------------------------------------


def test_another_policy_is_taken_as_soon_as_there_is_one(kind, server):
    with connected(kind, server.address) as client, client.episode() as episode:
        assert episode.act(seen(0)) == 0
        server.publish(2, action=1)
        steps = iter(range(1, 10**9))
        eventually(lambda: episode.act(seen(next(steps))) == 1)
        assert client.policy_version == 2


def test_chunks_are_cut_where_the_policy_changes(kind, server):
    with connected(kind, server.address) as client, client.episode() as episode:
        for step in range(3):
            episode.act(seen(step))
        server.publish(2, action=1)
        client.update_policy_weights()
        for step in range(3, 5):
            assert episode.act(seen(step)) == 1
        episode.end(seen(5), terminated=True)
        chunks = server.collect(5)
    assert versions_of(chunks) == [1, 1, 1, 2, 2]
    assert rows_of(chunks) == [0, 1, 2, 3, 4]


def test_updating_by_hand_only_acts_with_the_old_policy_until_told(kind, server):
    with (
        connected(kind, server.address, update_interval=None) as client,
        client.episode() as episode,
    ):
        assert episode.act(seen(0)) == 0
        server.publish(2, action=1)
        assert episode.act(seen(1)) == 0
        client.update_policy_weights()
        assert episode.act(seen(2)) == 1
        server.publish(3, action=0)
        client.update_policy_weights()
        assert episode.act(seen(3)) == 0
        client.update_policy_weights()  # nothing newer
        assert client.policy_version == 3


def test_an_interval_bounds_how_often_the_policy_is_fetched(kind, server):
    with connected(kind, server.address, update_interval=3600.0) as client:
        play(client, 1)
        server.publish(2, action=1)
        with client.episode() as episode:
            assert episode.act(seen(0)) == 0
            assert server.server.stats()["policy_downloads"] == 1
            client.update_policy_weights()
            assert episode.act(seen(1)) == 1
    with (
        connected(kind, server.address, update_interval=0.01) as client,
        client.episode() as episode,
    ):
        server.publish(3, action=0)
        steps = iter(range(10**9))
        eventually(lambda: episode.act(seen(next(steps))) == 0)


def test_the_first_action_waits_for_the_first_policy(kind):
    with (
        serving_alone(first_version=None) as server,
        connected(kind, server.address) as client,
        client.episode() as episode,
    ):
        later = threading.Timer(0.3, server.publish, [1])
        later.start()
        try:
            assert episode.act(seen(0)) == 0
        finally:
            later.join()


def test_without_a_policy_the_step_can_be_asked_for_again(kind):
    impatient = Timeouts(connect_s=3.0, action_s=0.3, close_s=2.0)
    with (
        serving_alone(first_version=None) as server,
        connected(kind, server.address, timeouts=impatient) as client,
        client.episode() as episode,
    ):
        with pytest.raises(PolicyTimeout, match="action_s"):
            episode.act(seen(0))
        server.publish(1)
        eventually(lambda: acts(episode, 99))
        episode.end(seen(1), 2.0, terminated=True)
        (chunk,) = server.collect(1)
        assert rows_of([chunk]) == [0]  # as it was asked first
        assert chunk.rewards == [2.0]


def acts(episode, observed):
    try:
        episode.act(seen(observed))
    except PolicyTimeout:
        return False
    return True


# -- holding ---------------------------------------------------------------------------------------


def test_after_an_upload_training_waits_for_the_next_policy_and_evaluation_does_not(kind):
    with (
        serving_alone(hold=True, steps_per_upload=5) as server,
        connected(kind, server.address) as client,
    ):
        collected, answers = [], []
        rounds = threading.Thread(target=lambda: collected.extend(server.collect(5)))
        rounds.start()
        episode = client.episode()
        for step in range(5):
            episode.act(seen(step))
        # The sixth observation completes the fifth step: all five go up, and RLlib learns.
        waiting = threading.Thread(target=lambda: answers.append(episode.act(seen(5))))
        waiting.start()
        rounds.join(10)
        assert rows_of(collected) == [0, 1, 2, 3, 4]
        if kind == "aio-local":  # tasks may share a client, threads may not
            play(client, 3, training_enabled=False)
        assert waiting.is_alive()
        server.publish(2, action=1)
        waiting.join(10)
        assert answers == [1]
        assert client.policy_version == 2
        assert episode.act(seen(6)) == 1


def test_a_hold_that_lasts_too_long_is_a_timeout_and_the_step_is_asked_for_again(kind):
    impatient = Timeouts(connect_s=3.0, action_s=0.5, close_s=1.0)
    with (
        serving_alone(hold=True, steps_per_upload=2) as server,
        connected(kind, server.address, timeouts=impatient) as client,
        client.episode() as episode,
    ):
        episode.act(seen(0))
        episode.act(seen(1))
        with pytest.raises(PolicyTimeout, match="action_s"):
            episode.act(seen(2))
        assert rows_of(server.collect(2)) == [0, 1]
        server.publish(2, action=1)
        eventually(lambda: acts(episode, 99))
        episode.end(seen(3), terminated=True)
        assert rows_of(server.collect(1)) == [2]


def test_a_fast_client_waits_where_the_server_has_enough(kind):
    with (
        serving_alone(capacity_steps=10, steps_per_upload=5, max_rows_per_request=50) as server,
        connected(kind, server.address) as client,
    ):
        done = threading.Event()

        def go_on():
            try:
                for _ in range(100_000):
                    play(client, 5)
            except ClosedClientError:
                done.set()

        acting = threading.Thread(target=go_on)
        acting.start()
        eventually(lambda: client._handshake.tracks and stands_still(client))
        ahead = client.stats.steps_uploaded
        # Of hundreds of thousands: what nearly fills the buffer, and what one request adds.
        assert ahead < 10 + 50
        server.collect(10_000, timeout_s=0.1)  # all there is
        eventually(lambda: client.stats.steps_uploaded > ahead)
        if kind == "aio-local":  # tasks may share a client, threads may not
            play(client, 3, training_enabled=False)
        client.close()
        acting.join(10)
        assert done.is_set()
        assert client.stats.steps_dropped == 0


def stands_still(client):
    """Nothing has been uploaded or acted on for a while."""
    before = (client.stats.requests, client._actor._steps._unsent)
    threading.Event().wait(0.3)
    return before == (client.stats.requests, client._actor._steps._unsent)


def test_closing_uploads_without_waiting_for_an_answer_that_is_held(kind, caplog):
    patient = Timeouts(connect_s=3.0, close_s=60.0)
    with serving_alone(hold=True) as server:
        start = time.monotonic()
        with connected(kind, server.address, timeouts=patient) as client:
            episode_id = client.start_episode()
            for step in range(3):
                client.get_action(episode_id, seen(step))
        assert time.monotonic() - start < PATIENCE_S
        assert rows_of(server.collect(2)) == [0, 1]
    assert "without knowing" not in caplog.text


def test_closing_does_not_wait_for_an_upload_that_is_held(kind, caplog):
    patient = Timeouts(connect_s=3.0, action_s=0.2, close_s=60.0)
    with serving_alone(hold=True, steps_per_upload=2) as server:
        with connected(kind, server.address, timeouts=patient) as client:
            episode_id = client.start_episode()
            for step in range(2):
                client.get_action(episode_id, seen(step))
            with pytest.raises(PolicyTimeout):
                client.get_action(episode_id, seen(2))
        assert rows_of(server.collect(2)) == [0, 1]
    assert "without knowing" not in caplog.text


# -- who can do that -------------------------------------------------------------------------------


def test_a_policy_without_a_file_is_refused_when_connecting(kind):
    with (
        serving() as server,
        pytest.raises(NoLocalInferenceError, match="remote"),
    ):
        connect_once(kind, server.address)


@pytest.mark.parametrize("setting", ["cache_dir", "spool_dir", "spool_bytes"])
def test_settings_of_local_inference_are_refused_with_remote_inference(setting):
    with pytest.raises(InvalidValueError, match=setting):
        PolicyClient("localhost:1", **{setting: 1})


@pytest.mark.parametrize("size", [0, -1])
def test_a_spool_needs_room(size):
    with pytest.raises(InvalidValueError, match="spool_bytes"):
        PolicyClient("localhost:1", "local", spool_bytes=size)


def test_without_onnxruntime_the_error_says_what_to_install():
    script = (
        "import sys\n"
        "sys.modules['onnxruntime'] = None\n"
        "from client_sdk import PolicyClient\n"
        "try:\n"
        "    PolicyClient('localhost:1', 'local')\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert 'pip install "policy-server[local]"' in done.stdout


# -- loops -----------------------------------------------------------------------------------------


class Ramp(gym.Env):
    """Ends after five steps."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (4,), np.float32)
    action_space = CARTPOLE_ACTIONS

    def reset(self, *, seed=None, options=None):
        self.step_ = 0
        return seen(0), {}

    def step(self, action):
        self.step_ += 1
        return seen(self.step_), 1.0, self.step_ == 5, False, {}


def test_a_gymnasium_environment_runs_on_a_policy_of_its_own(server):
    summary = run_gymnasium(
        Ramp,
        server.address,
        inference_mode="local",
        num_envs=4,
        episodes=8,
        timeouts=QUICK,
    )
    assert (summary.episodes, summary.mean_return) == (8, 5.0)
    chunks = server.collect(40)
    assert rows_of(chunks) == [0, 1, 2, 3, 4] * 8
    assert all(chunk.rewards == [1.0] * 5 for chunk in chunks)


@pytest.mark.parametrize("update_interval", [0.0, 3600.0, None])
def test_closing_is_not_reported_as_a_loss(kind, server, caplog, update_interval):
    with connected(kind, server.address, update_interval=update_interval) as client:
        play(client, 3)
    assert caplog.text == ""
    assert client.stats.reconnects == 0
