"""Clients that act alone, against a whole runner."""

from __future__ import annotations

import itertools
import threading

import grpc
import numpy as np
import pytest
from ray.rllib.algorithms.dqn import DQNConfig
from ray.rllib.connectors.env_to_module import MeanStdFilter

from client_sdk.onnx_policy import OnnxPolicy
from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.faults import Fault, Reason
from client_sdk.wire.tensors import tensor_to_proto
from policy_server import PolicyServerConfig, PolicyServerEnvRunner
from tests.runner.support import ACTIONS, OBSERVATIONS, ppo_config, running
from tests.server.talk import (
    TERMINATED,
    TRUNCATED,
    Talker,
    batch,
    check_fault,
    refused,
    rows,
)
from tests.server.uploading import Uploader


def dqn_config():
    return (
        DQNConfig()
        .environment(
            observation_space=OBSERVATIONS,
            action_space=ACTIONS,
            env_config=PolicyServerConfig(port=0, drain_s=0.2).to_env_config(),
        )
        .env_runners(env_runner_cls=PolicyServerEnvRunner)
        .rl_module(model_config={"fcnet_hiddens": [8]})
    )


@pytest.mark.parametrize("make_config", [ppo_config, dqn_config], ids=["PPO", "DQN"])
def test_weights_that_the_learner_sends_reach_the_clients_that_wait(make_config):
    with running(make_config()) as runner, Uploader(runner.address) as client:
        first = client.download().check()
        assert OnnxPolicy(first.model).version == first.header.policy_version == 0
        call = client.asking(first.header.sha256, wait_s=15)
        weights = {name: array * 2 for name, array in runner.module.get_state().items()}
        runner.set_state({"rl_module": weights, "weights_seq_no": 4})
        header = next(call).header
        assert header.policy_version == 4
        model = b"".join(part.piece for part in call)
        assert model == runner._policies.current.model != first.model


def test_session_is_told_what_the_algorithm_needs():
    with running(ppo_config()) as runner, Uploader(runner.address, connect=False) as client:
        told = client.open()
        assert (told.steps_per_upload, told.holds) == (2, True)
    with running(dqn_config()) as runner, Uploader(runner.address, connect=False) as client:
        told = client.open()
        assert (told.steps_per_upload, told.holds) == (16, False)


def test_policy_that_cannot_be_exported_is_for_remote_clients_only():
    config = ppo_config().rl_module(model_config={"use_lstm": True, "lstm_cell_size": 8})
    code = grpc.StatusCode.FAILED_PRECONDITION
    with (
        running(config) as runner,
        Uploader(runner.address, connect=False) as client,
        refused(code, Reason.NO_LOCAL_INFERENCE, "inference_mode", "recurrent"),
    ):
        client.open()


# Experience comes back.


def filtered(**server):
    return ppo_config(
        {"while_learning": "serve", **server},
        env_to_module_connector=lambda env, spaces, device: MeanStdFilter(),
    )


def counted(runner):
    """What the filter has counted: how many, and their mean."""
    (statistics,) = runner._env_to_module.connectors[0].running()
    return statistics.num_pushes, statistics.mean


def publish(runner, seq_no):
    runner.set_state({"rl_module": runner.module.get_state(), "weights_seq_no": seq_no})


def observed(rng, steps):
    """Raw observations of an episode, ``[T+1, 2]``."""
    return rng.normal(3, 10, (steps + 1, 2)).astype(np.float32)


def play(remote, episode, observations, status):
    """The same as rows."""
    last = len(observations) - 1
    for step, value in enumerate(observations):
        remote.act(
            rows(
                [episode],
                [step],
                value[None],
                rewards=[float(step)],
                statuses=[status if step == last else pb.STEP_STATUS_RUNNING],
            )
        )


def replayed(client, number, episode, observations, status):
    """The chunk that makes the same episode."""
    chunk = client.chunk(number, 0, observations, np.arange(1, len(observations)), status)
    chunk.actions.CopyFrom(batch(np.asarray(episode.get_actions(), np.int64)))
    for name in chunk.outputs:
        tensor_to_proto(np.asarray(episode.get_extra_model_outputs(name)), chunk.outputs[name])
    return chunk


def everything(episode):
    """All that a learner sees of an episode, but for its id."""
    state = {
        "observations": episode.get_observations(),
        "actions": episode.get_actions(),
        "rewards": episode.get_rewards(),
        "infos": episode.get_infos(),
        "end": (episode.is_terminated, episode.is_truncated),
        "start": (episode.t_started, episode.t),
    }
    for name in episode.extra_model_outputs:
        state[name] = episode.get_extra_model_outputs(name)
    return state


@pytest.mark.parametrize("make_config", [filtered, dqn_config], ids=["PPO, filtered", "DQN"])
def test_the_same_episode_reaches_the_learner_by_rows_and_by_uploads(make_config):
    rng = np.random.default_rng(5)
    with (
        running(make_config()) as runner,
        Talker(runner.address) as remote,
        Uploader(runner.address) as client,
    ):
        # Some statistics first, so that the filter does something.
        play(remote, 1, observed(rng, 30), TERMINATED)
        runner.sample(num_timesteps=30)
        publish(runner, 1)
        client.fly()
        for number, status in ((2, TERMINATED), (3, TRUNCATED)):
            observations = observed(rng, 12)
            play(remote, number, observations, status)
            (by_rows,) = runner.sample(num_timesteps=12)
            client.deliver(replayed(client, number, by_rows, observations, status))
            (by_upload,) = runner.sample(num_timesteps=12)
            assert len(by_upload) == 12
            expected, got = everything(by_rows), everything(by_upload)
            assert list(got) == list(expected)
            for name, value in expected.items():
                np.testing.assert_array_equal(got[name], value, err_msg=name)
                if isinstance(value, np.ndarray):
                    assert got[name].dtype == value.dtype, name


def test_observations_of_remote_and_local_clients_are_each_counted_once():
    rng = np.random.default_rng(6)
    everyone = []
    with (
        running(filtered()) as runner,
        Talker(runner.address) as remote,
        Uploader(runner.address) as one,
        Uploader(runner.address) as two,
    ):
        for number in range(1, 5):
            publish(runner, number)
            for client in (one, two):
                client.fly()
                observations = observed(rng, 11)
                everyone.append(observations)
                # In two chunks: where they meet there is one observation, not two.
                client.deliver(
                    client.chunk(number, 0, observations[:6]),
                    client.chunk(number, 5, observations[5:], status=TERMINATED),
                )
            observations = observed(rng, 7)
            everyone.append(observations)
            play(remote, number, observations, TERMINATED)
            runner.sample(num_timesteps=29)
        expected = np.concatenate(everyone).astype(np.float64)
        count, mean = counted(runner)
        assert count == len(expected)
        np.testing.assert_allclose(mean, expected.mean(axis=0), rtol=1e-9)


def test_chunks_are_filtered_with_the_statistics_of_their_own_file():
    rng = np.random.default_rng(7)
    with running(filtered()) as runner, Uploader(runner.address) as client:
        client.fly()
        client.deliver(client.chunk(1, 0, observed(rng, 20), status=TERMINATED))
        runner.sample(num_timesteps=20)
        publish(runner, 1)
        client.fly()
        observations = observed(rng, 20)
        chunk = client.chunk(2, 0, observations, status=TERMINATED)
        count, mean = counted(runner)
        divisor = runner._env_to_module.connectors[0].applied()[1]
        # Statistics and versions go on before it arrives.
        with Talker(runner.address) as remote:
            play(remote, 1, observed(rng, 20) * 50, TERMINATED)
            runner.sample(num_timesteps=20)
        publish(runner, 2)
        client.deliver(chunk)
        (episode,) = runner.sample(num_timesteps=20)
        np.testing.assert_allclose(
            episode.get_observations(), (observations - mean) / divisor, rtol=1e-4, atol=1e-5
        )
        assert set(episode.get_extra_model_outputs("weights_seq_no")) == {1}
        assert counted(runner)[0] == count + 42


def test_chunks_of_an_episode_join_in_a_replay_buffer():
    rng = np.random.default_rng(8)
    with running(dqn_config()) as runner, Uploader(runner.address) as client:
        observations = observed(rng, 20)
        parts = []
        for number, start in enumerate((0, 7, 12)):
            publish(runner, number + 1)
            client.fly()
            stop = (7, 12, 20)[number]
            status = TERMINATED if stop == 20 else pb.STEP_STATUS_RUNNING
            client.deliver(client.chunk(1, start, observations[start : stop + 1], status=status))
            parts += runner.sample(num_timesteps=stop - start)
        whole = parts[0]
        for part in parts[1:]:
            whole.concat_episode(part)
        assert (len(whole), whole.is_terminated) == (20, True)
        np.testing.assert_array_equal(whole.get_observations(), observations)


def test_experience_that_is_too_old_is_discarded_and_need_not_come_again():
    with running(ppo_config({"max_policy_lag": 1})) as runner, Uploader(runner.address) as client:
        client.fly()
        old = client.chunk(1, 0, np.zeros((6, 2), np.float32), status=TERMINATED)
        for seq_no in (1, 2):
            publish(runner, seq_no)
        client.fly()
        young = client.chunk(2, 0, np.zeros((4, 2), np.float32), status=TERMINATED)
        call = client.begin_upload(old, young)
        episodes = runner.sample(num_timesteps=8)
        publish(runner, 3)
        assert not call.result().faults
        assert sum(len(episode) for episode in episodes) == 3
        assert runner._buffer.ledger.snapshot()["discarded_stale"] == 5
        assert client.deliver().delivered_sequence == 2


@pytest.mark.parametrize("option", ["evaluation", "greedy"])
def test_returns_of_evaluation_are_reported_apart(option):
    with running(ppo_config()) as runner, Uploader(runner.address) as client:
        client.fly()
        client.deliver(
            client.chunk(1, 0, np.zeros((6, 2), np.float32), status=TERMINATED, greedy=True),
            starts=[pb.EpisodeStart(episode=1, **{option: True})],
        )
        assert runner.sample() == []
        metrics = runner.get_metrics()
        assert metrics["evaluation"]["episode_return_mean"].peek() == 5.0
        assert metrics["policy_server"]["ledger"]["discarded_evaluation"].peek() == 5
        assert metrics["policy_server"]["chunks"].peek() == 1


def test_client_of_a_server_that_was_restarted_sends_again_what_was_not_delivered():
    observations = observed(np.random.default_rng(9), 30)
    with running(filtered()) as runner, Uploader(runner.address) as client:
        publish(runner, 3)
        client.fly()
        client.deliver(client.chunk(1, 0, observations[:11]))
        client.deliver(client.chunk(1, 10, observations[10:21]))
        runner.sample(num_timesteps=10)
        answer = client.deliver()
        assert (answer.accepted_sequence, answer.delivered_sequence) == (2, 1)
        checkpoint = runner.get_state()
        session_id, sha256, policy = client.session_id, client.sha256, client.policy
    with running(filtered()) as runner, Uploader(runner.address, connect=False) as client:
        runner.set_state(checkpoint)
        told = client.open(session_id=session_id)
        assert told.session_id != session_id
        assert told.delivered_sequence == 0
        client.session_id = told.session_id
        # The checkpoint's file has counted more than the one before it: it is another one.
        client.fly()
        again = client.chunk(1, 10, observations[10:21])
        client.deliver(again, starts=[pb.EpisodeStart(episode=1, resumed=True)])
        (episode,) = runner.sample(num_timesteps=10)
        assert len(episode) == 10
        client.policy, client.sha256 = policy, sha256
        foreign = client.chunk(2, 0, observations[:3])
        (fault,) = client.upload(foreign).faults
        check_fault(
            Fault.from_detail(fault.error),
            Reason.UNKNOWN_POLICY,
            "chunks[0].policy_sha256",
            "from before a restart",
        )


def test_learner_that_holds_gets_its_batches_from_a_client_that_waits():
    """On-policy, many rounds: nobody waits for the other for ever."""
    with running(ppo_config({"sample_wait_s": 20.0})) as runner, Uploader(runner.address) as client:
        client.fly()
        zeros = np.zeros((11, 2), np.float32)
        stop = threading.Event()
        failures = []

        def fly():
            try:
                for number in itertools.count(1):
                    answer = client.deliver(client.chunk(number, 0, zeros, status=TERMINATED))
                    if stop.is_set():
                        return
                    while client.policy.version < answer.policy_version:
                        client.fly()
            except Exception as error:
                failures.append(error)

        thread = threading.Thread(target=fly)
        thread.start()
        try:
            for seq_no in range(1, 21):
                episodes = runner.sample()
                versions = {
                    int(version)
                    for episode in episodes
                    for version in episode.get_extra_model_outputs("weights_seq_no")
                }
                assert sum(map(len, episodes)) == 20
                assert versions == {seq_no - 1}
                publish(runner, seq_no)
        finally:
            stop.set()
            publish(runner, 100)
            thread.join(20)
        assert not failures, failures
