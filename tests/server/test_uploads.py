"""Experience of clients that act alone: taken once, in order, and brought to the learner."""

from __future__ import annotations

import grpc
import gymnasium as gym
import numpy as np
import pytest
from ray.rllib.algorithms.dqn import DQNConfig
from ray.rllib.algorithms.sac import SACConfig

from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.faults import Fault, Reason
from client_sdk.wire.tensors import tensor_to_proto
from tests.server.exporting import exporting
from tests.server.talk import (
    ABANDONED,
    TERMINATED,
    TRUNCATED,
    Talker,
    batch,
    check_fault,
    eventually,
    refused,
    rows,
    seen,
)
from tests.server.uploading import Uploader

EVALUATION = {"evaluation": True}
GREEDY = {"greedy": True}


def faults_in(answer) -> dict[int, Fault]:
    """By chunk."""
    return {fault.index: Fault.from_detail(fault.error) for fault in answer.faults}


def observations_of(chunk) -> list[float]:
    return [float(batch.observations[""][row][0]) for batch, row in chunk.rows]


@pytest.fixture
def server():
    with exporting() as server:
        yield server


@pytest.fixture
def client(server):
    with Uploader(server.address) as client:
        yield client.fly()


def settle(server, chunks):
    """What the hand-over does with chunks."""
    for chunk in chunks:
        server.buffer.ledger.deliver(chunk.steps)
        chunk.settle()


# To the learner.


def test_uploaded_steps_reach_the_learner_as_they_were_made(server, client):
    first = client.chunk(7, 0, seen(0, 1, 2, 3), [0.5, 1.5, 2.5])
    last = client.chunk(7, 3, seen(3, 4, 5), [3.5, 4.5], TERMINATED)
    answer = client.deliver(first, last)
    assert (answer.accepted_sequence, answer.policy_version) == (2, 1)
    one, two = server.collect(5)
    assert one.identity is two.identity
    assert (one.first_step, two.first_step) == (0, 3)
    assert (one.rewards, two.rewards) == ([0.5, 1.5, 2.5], [3.5, 4.5])
    assert observations_of(one) == [0, 1, 2]
    assert one.last_observation[""].tolist() == seen(3).tolist()
    assert two.last_observation[""].tolist() == seen(5).tolist()
    assert (one.terminated, two.terminated, two.truncated) == (False, True, False)
    assert one.end is None
    assert (two.end.episode_return, two.end.length, two.end.reported) == (12.5, 5, True)
    for chunk, sent in ((one, first), (two, last)):
        ((made, _), *_) = chunk.rows
        assert made.policy.version == 1
        assert made.policy.view is server.policies.current.view
        assert made.actions[""].tobytes() == sent.actions.leaves[""].data
        assert set(made.outputs) == set(sent.outputs)
        for name, values in made.outputs.items():
            assert values.tobytes() == sent.outputs[name].data
    settle(server, [one, two])
    assert server.unaccounted() == 0


def test_truncated_episode_is_truncated(server, client):
    client.deliver(client.chunk(1, 0, seen(0, 1), status=TRUNCATED))
    (chunk,) = server.collect(1)
    assert (chunk.terminated, chunk.truncated, chunk.end.length) == (False, True, 1)


def test_episodes_of_two_sessions_with_the_same_number_are_apart(server, client):
    with Uploader(server.address) as other:
        other.fly()
        client.deliver(client.chunk(1, 0, seen(0, 1)))
        other.deliver(other.chunk(1, 0, seen(10, 11)))
        client.deliver(client.chunk(1, 1, seen(1, 2)))
        chunks = server.collect(3)
        assert len({id(chunk.identity) for chunk in chunks}) == 2


def test_chunks_of_two_versions_keep_their_own(server, client):
    old = client.chunk(1, 0, seen(0, 1))
    server.publish(2)
    client.fly()
    client.deliver(old, client.chunk(1, 1, seen(1, 2), status=TERMINATED))
    assert [chunk.policy.version for chunk in server.collect(2)] == [1, 2]


def test_whole_episodes_are_handed_over_where_they_may_not_be_cut():
    with exporting(complete_episodes=True) as server, Uploader(server.address) as client:
        client.fly()
        client.deliver(client.chunk(1, 0, seen(0, 1, 2)))
        assert server.ledger()["held"] == 2
        server.publish(2)
        client.fly()
        answer = client.deliver(client.chunk(1, 2, seen(2, 3), status=TERMINATED))
        assert answer.delivered_sequence == 0
        (chunk,) = server.collect(3)
        assert observations_of(chunk) == [0, 1, 2]
        assert [batch.policy.version for batch, _ in chunk.rows] == [1, 1, 2]
        settle(server, [chunk])
        assert client.deliver().delivered_sequence == 2


def test_whole_episode_that_is_abandoned_or_broken_off_is_settled_too():
    with exporting(complete_episodes=True) as server, Uploader(server.address) as client:
        client.fly()
        client.deliver(client.chunk(1, 0, seen(0, 1, 2)), client.chunk(2, 0, seen(0, 1)))
        answer = client.deliver(client.chunk(1, 2, seen(2, 3), status=ABANDONED))
        assert server.ledger() == {
            "received": 4, "delivered": 0, "discarded_abandoned": 3, "held": 1
        }  # fmt: skip
        assert answer.delivered_sequence == 1
        assert client.upload(client.chunk(2, 5, seen(5, 6))).faults
        (chunk,) = server.collect(1)
        assert (chunk.steps, chunk.truncated, chunk.end.reported) == (1, True, False)
        settle(server, [chunk])
        assert client.deliver().delivered_sequence == 4
        assert server.unaccounted() == 0


@pytest.mark.parametrize("option", [EVALUATION, GREEDY], ids=["evaluation", "greedy"])
def test_evaluation_is_reported_and_never_learnt_from(server, client, option):
    answer = client.deliver(
        client.chunk(1, 0, seen(0, 1, 2), greedy=True),
        client.chunk(1, 2, seen(2, 3), [5.0], TERMINATED),
        starts=[pb.EpisodeStart(episode=1, **option)],
    )
    assert answer.delivered_sequence == 2
    (chunk,) = server.collect(timeout_s=0.05)
    assert (chunk.steps, chunk.training, chunk.terminated) == (0, False, True)
    assert (chunk.end.episode_return, chunk.end.length, chunk.end.reported) == (7.0, 3, True)
    assert server.ledger() == {
        "received": 3, "delivered": 0, "discarded_evaluation": 3, "held": 0
    }  # fmt: skip


def test_resumed_episode_starts_at_any_step_and_its_return_is_not_reported(server, client):
    client.deliver(
        client.chunk(1, 40, seen(0, 1)),
        client.chunk(1, 41, seen(1, 2), status=TERMINATED),
        starts=[pb.EpisodeStart(episode=1, resumed=True)],
    )
    one, two = server.collect(2)
    assert (one.first_step, two.first_step) == (40, 41)
    assert not two.end.reported


def test_options_may_come_before_the_first_chunk(server, client):
    client.deliver(starts=[pb.EpisodeStart(episode=1, evaluation=True)])
    client.deliver(client.chunk(1, 0, seen(0, 1), status=TERMINATED))
    assert server.ledger()["discarded_evaluation"] == 1


def test_numbers_of_the_application_are_reported_with_the_episode(server, client):
    client.deliver(
        client.chunk(1, 0, seen(0, 1), status=TERMINATED),
        metrics=[pb.EpisodeMetrics(episode=1, values={"goals": 3})],
    )
    client.deliver(client.chunk(2, 0, seen(0, 1)))
    client.deliver(metrics=[pb.EpisodeMetrics(episode=2, values={"goals": 4})])
    client.deliver(client.chunk(2, 1, seen(1, 2), status=TERMINATED))
    ends = [chunk.end for chunk in server.collect(3) if chunk.end]
    assert [end.metrics for end in ends] == [{"goals": 3}, {"goals": 4}]


def test_abandoned_episode_leaves_nothing_that_was_not_delivered(server, client):
    client.deliver(client.chunk(1, 0, seen(0, 1, 2)))
    (delivered,) = server.collect(2)
    settle(server, [delivered])
    client.deliver(client.chunk(1, 2, seen(2, 3)), client.chunk(2, 0, seen(0, 1)))
    abandoned = client.chunk(1, 3, seen(3, 4, 5), status=ABANDONED)
    answer = client.deliver(abandoned)
    assert server.ledger() == {
        "received": 6, "delivered": 2, "discarded_abandoned": 3, "held": 1
    }  # fmt: skip
    (kept,) = server.collect(1)
    assert kept.end is None
    settle(server, [kept])
    assert answer.delivered_sequence == 2
    assert client.deliver().delivered_sequence == 4


def test_abandoned_chunk_may_be_empty(server, client):
    client.deliver(client.chunk(1, 0, seen(0, 1)))
    client.sequence += 1
    client.deliver(pb.Chunk(sequence=client.sequence, episode=1, first_step=1, status=ABANDONED))
    assert server.ledger()["discarded_abandoned"] == 1
    assert server.server.stats()["episodes_open"] == 0


# Numbers.


def test_chunk_taken_before_is_acknowledged_and_not_stored_again(server, client):
    first, second = client.chunk(1, 0, seen(0, 1)), client.chunk(1, 1, seen(1, 2))
    for _ in range(2):
        assert client.deliver(first).accepted_sequence == 1
    for _ in range(2):
        assert client.deliver(first, second, second).accepted_sequence == 2
    assert server.ledger()["received"] == 2
    assert server.server.stats()["chunks"] == 2


def test_gap_is_refused_and_filling_it_mends_it(server, client):
    one, two, three = (client.chunk(1, i, seen(i, i + 1)) for i in range(3))
    answer = client.upload(one, three)
    assert answer.accepted_sequence == 1
    says = ("expected chunk 2 next, got 3", "not taken")
    check_fault(faults_in(answer)[1], Reason.STEP_OUT_OF_ORDER, "chunks[1].sequence", *says)
    assert server.ledger()["received"] == 1
    assert client.deliver(two, three).accepted_sequence == 3
    assert observations_of(server.collect(3)[2]) == [2]


def test_what_comes_in_the_wrong_order_is_taken_as_far_as_it_fits(server, client):
    one, two, three = (client.chunk(1, i, seen(i, i + 1)) for i in range(3))
    answer = client.upload(two, one, three)
    assert answer.accepted_sequence == 1
    assert set(faults_in(answer)) == {0, 2}
    assert client.deliver(two, three).accepted_sequence == 3
    assert [observations_of(chunk)[0] for chunk in server.collect(3)] == [0, 1, 2]


def test_client_is_told_what_has_reached_the_learner(server, client):
    for number in range(1, 4):
        client.deliver(client.chunk(number, 0, seen(0, 1, 2), status=TERMINATED))
    assert client.deliver().delivered_sequence == 0
    one, two, three = server.collect(6)
    settle(server, [two])
    assert client.deliver().delivered_sequence == 0
    settle(server, [one])
    assert client.deliver().delivered_sequence == 2
    settle(server, [three])
    assert client.deliver().delivered_sequence == 3


def test_split_chunk_is_delivered_with_its_last_part(server, client):
    client.deliver(client.chunk(1, 0, seen(*range(11))))
    (first,) = server.collect(4)
    assert first.steps == 4
    settle(server, [first])
    assert client.deliver().delivered_sequence == 0
    settle(server, server.collect(6))
    answer = client.deliver()
    assert (answer.accepted_sequence, answer.delivered_sequence) == (1, 1)


def test_session_that_cannot_be_resumed_is_told_what_need_not_come_again(server, client):
    client.deliver(client.chunk(1, 0, seen(0, 1)), client.chunk(1, 1, seen(1, 2)))
    old = client.session_id
    client.close_session()
    told = client.open(session_id=old)
    assert told.session_id != old
    assert told.delivered_sequence == 2
    assert client.open(session_id="unheard of").delivered_sequence == 0
    # All of it is on its way to the learner here.
    assert sum(chunk.steps for chunk in server.collect(2)) == 2


def test_resumed_session_goes_on_where_it_was(server, client):
    client.deliver(client.chunk(1, 0, seen(0, 1)))
    told = client.open(session_id=client.session_id)
    assert (told.session_id, told.delivered_sequence) == (client.session_id, 0)
    assert client.deliver(client.chunk(1, 1, seen(1, 2))).accepted_sequence == 2
    assert len({id(chunk.identity) for chunk in server.collect(2)}) == 1


# Ends that nobody reported.


def test_open_episodes_of_a_lost_client_are_truncated_at_their_last_step():
    with exporting(lease_s=0.3) as server, Uploader(server.address) as client:
        client.fly()
        client.deliver(client.chunk(1, 0, seen(0, 1, 2)), client.chunk(2, 0, seen(5, 6)))
        eventually(lambda: server.server.sessions == 0)
        chunks = server.collect(3)
        ends = [chunk for chunk in chunks if chunk.end is not None]
        assert [chunk.steps for chunk in chunks] == [2, 1, 0, 0]
        assert all(chunk.truncated and not chunk.end.reported for chunk in ends)
        assert {id(chunk.identity) for chunk in ends} == {id(c.identity) for c in chunks[:2]}
        settle(server, chunks)
        assert server.unaccounted() == 0


# Logged actions.

CAR = gym.spaces.Box(
    np.array([-1.0, 0.0, 10.0], np.float32), np.array([1.0, 4.0, 20.0], np.float32)
)


def logged(client, actions, logps=None, sha256=None, **fields):
    """A chunk of the application's own actions."""
    steps = len(actions)
    client.sequence += 1
    chunk = pb.Chunk(
        sequence=client.sequence,
        episode=1,
        logged=True,
        policy_sha256=client.sha256 if sha256 is None else sha256,
        rewards=tensor_to_proto(np.ones(steps)),
        status=TERMINATED,
        **fields,
    )
    chunk.observations.CopyFrom(batch(seen(*range(steps + 1))))
    chunk.actions.CopyFrom(batch(np.asarray(actions)))
    if logps is not None:
        chunk.outputs["action_logp"].CopyFrom(tensor_to_proto(np.asarray(logps)))
    return chunk


@pytest.mark.parametrize("named", [True, False], ids=["its policy", "the newest policy"])
def test_logged_actions_are_put_into_the_policys_terms_and_marked(named):
    with exporting(None, action_space=CAR) as server, Uploader(server.address) as client:
        client.fly()
        actions = np.array([[-1.0, 0.0, 10.0], [0.5, 3.0, 12.5]], np.float32)
        client.deliver(logged(client, actions, [-1.25, -0.5], None if named else b""))
        (chunk,) = server.collect(2)
        assert chunk.logged == [0, 1]
        ((made, _), _) = chunk.rows
        np.testing.assert_allclose(made.actions[""], [[-1, -1, -1], [0.5, 0.5, -0.5]], atol=1e-6)
        scale = np.log([1.0, 2.0, 5.0]).sum()
        np.testing.assert_allclose(
            made.outputs["action_logp"], [-1.25 + scale, -0.5 + scale], rtol=1e-6
        )
        greedy = np.ones(2, np.bool_)
        _, _, outputs = client.policy.act({"": seen(0, 1)}, greedy)
        np.testing.assert_allclose(
            made.outputs["action_dist_inputs"], outputs["action_dist_inputs"], atol=1e-6
        )
        assert made.outputs["action_logp"].dtype == np.float32


def test_logged_actions_without_logp_are_refused_where_the_algorithm_needs_it(server, client):
    fault = faults_in(client.upload(logged(client, [1, 0])))[0]
    field = 'chunks[0].outputs["action_logp"]'
    check_fault(fault, Reason.LOGP_REQUIRED, field, "log_action needs logp=")


def test_logged_actions_without_logp_are_fine_where_nobody_corrects_for_it():
    with exporting(DQNConfig(), need_logp=False) as server, Uploader(server.address) as client:
        client.fly()
        client.deliver(logged(client, [1, 0, 1]))
        (chunk,) = server.collect(3)
        ((made, _), *_) = chunk.rows
        assert (made.actions[""].tolist(), made.outputs) == ([1, 0, 1], {})


def test_logged_action_outside_its_space_is_refused():
    with exporting(None, action_space=CAR) as server, Uploader(server.address) as client:
        client.fly()
        answer = client.upload(logged(client, np.array([[0, 5, 15]], np.float32), [-1.0]))
        check_fault(faults_in(answer)[0], Reason.SPACE_MISMATCH, "chunks[0].actions", "got 5.0")


# Every kind of action.

SPACES = {
    "discrete": gym.spaces.Discrete(5, start=3),
    "multi discrete": gym.spaces.MultiDiscrete([3, 2, 4], start=[1, 0, -2]),
    "box": CAR,
    "unbounded box": gym.spaces.Box(-np.inf, np.inf, (2,), np.float32),
    "double box": gym.spaces.Box(-1, 2, (2,), np.float64),
}


@pytest.mark.parametrize("name", SPACES)
def test_what_the_graph_gives_passes_the_check_in_every_action_space(name):
    with exporting(None, action_space=SPACES[name]) as server, Uploader(server.address) as client:
        client.fly()
        observations = np.random.default_rng(1).normal(0, 5, (301, 4)).astype(np.float32)
        client.deliver(client.chunk(1, 0, observations, status=TERMINATED))
        (chunk,) = server.collect(300)
        assert chunk.steps == 300


def test_episodes_of_an_algorithm_without_densities_are_taken():
    with exporting(DQNConfig(), need_logp=False) as server, Uploader(server.address) as client:
        client.fly()
        client.deliver(client.chunk(1, 0, seen(0, 1, 2), status=TERMINATED))
        (chunk,) = server.collect(2)
        assert chunk.rows[0][0].outputs == {}


def sac():
    return SACConfig().rl_module(model_config={"fcnet_hiddens": [8], "head_fcnet_hiddens": [8]})


def test_actions_of_sac_are_looked_at_though_it_records_no_densities():
    observations = np.random.default_rng(1).normal(0, 5, (301, 4)).astype(np.float32)
    with (
        exporting(sac(), action_space=CAR, need_logp=False) as server,
        Uploader(server.address) as client,
    ):
        client.fly()
        client.deliver(client.chunk(1, 0, observations))
        (chunk,) = server.collect(300)
        assert chunk.rows[0][0].outputs == {}
        wrong = client.chunk(2, 0, observations)
        wrong.actions.CopyFrom(batch(client.executed))
        fault = faults_in(client.upload(wrong))[0]
        says = ("between -1 and 1", '"actions", not "env_actions"')
        check_fault(fault, Reason.POLICY_MISMATCH, "chunks[0].actions", *says)


def test_actions_of_sac_may_go_beyond_one_by_the_rounding_of_a_tangent():
    beyond = np.float32(1.0) + 2 * np.finfo(np.float32).eps
    with (
        exporting(sac(), action_space=CAR, need_logp=False) as server,
        Uploader(server.address) as client,
    ):
        client.fly()
        chunk = client.chunk(1, 0, seen(0, 1, 2))
        chunk.actions.CopyFrom(batch(np.array([[beyond] * 3, [-beyond] * 3], np.float32)))
        client.deliver(chunk)
        assert server.collect(2)[0].steps == 2
        wrong = client.chunk(2, 0, seen(0, 1, 2))
        wrong.actions.CopyFrom(batch(np.array([[1.0] * 3, [1.001] * 3], np.float32)))
        fault = faults_in(client.upload(wrong))[0]
        check_fault(fault, Reason.POLICY_MISMATCH, "chunks[0].actions", "1.001")


# Together with rows.


def test_rows_of_remote_clients_meet_a_demand_together_with_uploads(server, client):
    with Talker(server.address) as remote:
        for step in range(6):
            remote.act(rows([1], [step], seen(step), rewards=[float(step > 0)]))
        client.deliver(client.chunk(1, 0, seen(0, 1, 2, 3)))
        assert sum(chunk.steps for chunk in server.collect(8)) == 8


def test_answer_names_the_newest_policy(server, client):
    server.publish(9)
    assert client.deliver().policy_version == 9


def test_whole_request_is_refused_where_it_is_malformed(server, client):
    code = grpc.StatusCode.INVALID_ARGUMENT
    good = client.chunk(1, 0, seen(0, 1))
    with refused(code, Reason.MALFORMED_TENSOR, "chunks[1].sequence", "from 1 up"):
        client.upload(good, client.chunk(1, 1, seen(1, 2), sequence=0))
    with refused(code, Reason.NOT_FINITE, "metrics[0].values['a']"):
        client.upload(good, metrics=[pb.EpisodeMetrics(episode=1, values={"a": np.nan})])
    assert server.ledger()["received"] == 0
    client.deliver(good)
