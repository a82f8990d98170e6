"""What experience comes to: rewards, ends, options, metrics, and the handshake."""

from __future__ import annotations

import grpc
import numpy as np
import pytest

from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.faults import Reason
from tests.server.talk import (
    ABANDONED,
    TERMINATED,
    TRUNCATED,
    Talker,
    eventually,
    refused,
    rows,
    seen,
)
from tests.servers import serving

PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION


@pytest.fixture
def server():
    with serving() as server:
        yield server


@pytest.fixture
def talker(server):
    with Talker(server.address) as talker:
        yield talker


# Rewards.


def test_reward_belongs_to_the_action_before_it(server, talker):
    for step, reward in enumerate([0.0, 0.5, -2.0, 0.25]):
        talker.step(1, step, step, reward)
    talker.step(1, 4, 4.0, 8.0, TERMINATED)
    (chunk,) = server.collect(4)
    assert chunk.rewards == [0.5, -2.0, 0.25, 8.0]
    assert [batch.observations[""][row][0] for batch, row in chunk.rows] == [0, 1, 2, 3]
    assert chunk.last_observation[""].tolist() == [[4.0] * 4]
    assert chunk.end.episode_return == 6.75
    assert chunk.end.length == 4
    assert chunk.end.duration_s > 0


def test_no_rewards_at_all_are_zeros(server, talker):
    for step in range(3):
        talker.act(rows([1], [step], seen(step)))
    talker.act(rows([1], [3], seen(3), statuses=[TERMINATED]))
    (chunk,) = server.collect(3)
    assert chunk.rewards == [0.0, 0.0, 0.0]


def test_return_spans_chunks(server, talker):
    for step in range(4):
        talker.step(1, step, step, float(step))
        server.publish(10 + step)
    talker.step(1, 4, 4.0, 4.0, TERMINATED)
    chunks = server.collect(4)
    assert len(chunks) == 4
    assert [chunk.end is None for chunk in chunks] == [True, True, True, False]
    assert chunks[-1].end.episode_return == 10.0
    assert len({id(chunk.identity) for chunk in chunks}) == 1


# Ends.


@pytest.mark.parametrize(
    ("status", "flags"), [(TERMINATED, (True, False)), (TRUNCATED, (False, True))]
)
def test_terminated_and_truncated_are_different_things(server, talker, status, flags):
    talker.play(1, 3, end=status)
    (chunk,) = server.collect(3)
    assert (chunk.terminated, chunk.truncated) == flags
    assert chunk.last_observation[""].tolist() == [[3.0] * 4]
    assert chunk.end.reported


def test_terminated_without_observation_keeps_the_last_one(server, talker):
    talker.step(1, 0, 5.0)
    talker.step(1, 1, 6.0, 1.0)
    answer = talker.act(rows([1], [2], rewards=[3.0], statuses=[TERMINATED])).groups[0]
    assert not answer.faults
    (chunk,) = server.collect(2)
    assert (chunk.terminated, chunk.steps) == (True, 2)
    assert chunk.last_observation[""].tolist() == [[6.0] * 4]
    assert chunk.end.episode_return == 4.0


def test_group_without_observations_may_only_end(server, talker):
    talker.act(rows([1, 2], [0, 0], seen(0, 0)))
    group = rows([1, 2], [1, 1], statuses=[TERMINATED, ABANDONED])
    assert not talker.act(group).groups[0].faults
    assert server.server.stats()["episodes_open"] == 0


def test_end_that_overtakes_its_last_action_is_truncated_where_the_actions_stopped():
    """The client gave up waiting: no action was taken at the last row, so no step either."""
    with serving(hold=True, hold_timeout_s=0.1) as server, Talker(server.address) as talker:
        first = talker.begin(rows([1], [0], seen(0)))
        eventually(lambda: server.server.stats()["requests_waiting"] == 1)
        server.publish(2)
        first.result()
        with refused(grpc.StatusCode.UNAVAILABLE, Reason.NOT_READY, "", "ask again"):
            talker.act(rows([1], [1], seen(1), rewards=[1.0]))
        assert talker.step(1, 2, 2.0, 1.0, TERMINATED) is None
        (chunk,) = server.collect(1)
        assert (chunk.steps, chunk.terminated, chunk.truncated) == (1, False, True)
        assert chunk.last_observation[""].tolist() == [[1.0] * 4]
        assert chunk.rewards == [1.0]
        assert server.ledger()["received"] == 1


# Options.


@pytest.mark.parametrize("evaluation", [False, True])
@pytest.mark.parametrize("greedy", [False, True])
def test_options_of_an_episode_decide_how_it_acts_and_whether_it_trains(
    server, talker, evaluation, greedy
):
    start = pb.EpisodeStart(episode=1, evaluation=evaluation, greedy=greedy, label="mine")
    talker.step(1, 0, starts=[start])
    talker.step(1, 1, 0.0, 1.0, TERMINATED)
    assert [rows_.tolist() for rows_ in server.policies.current.greedy] == [[greedy]]
    (chunk,) = server.collect(1, timeout_s=0.05)
    trains = not (evaluation or greedy)
    assert (chunk.training, chunk.steps) == (trains, int(trains))
    assert chunk.identity.label == "mine"
    assert (chunk.end.episode_return, chunk.end.length, chunk.end.reported) == (1.0, 1, True)


def test_greedy_and_exploring_rows_share_a_message(server, talker):
    starts = [pb.EpisodeStart(episode=2, greedy=True)]
    talker.act(rows([1, 2, 3], [0, 0, 0], seen(0, 0, 0)), starts=starts)
    assert [rows_.tolist() for rows_ in server.policies.current.greedy] == [[False, True, False]]


def test_resumed_episode_is_learnt_from_and_its_return_is_not_reported(server, talker):
    talker.step(1, 0, starts=[pb.EpisodeStart(episode=1, resumed=True)])
    talker.step(1, 1, 0.0, 1.0, TERMINATED)
    (chunk,) = server.collect(1)
    assert (chunk.steps, chunk.training, chunk.end.reported) == (1, True, False)


def test_episode_that_was_never_announced_trains_and_explores(server, talker):
    talker.play(1, 1)
    (chunk,) = server.collect(1)
    assert chunk.training
    assert not server.policies.current.greedy[0][0]


# Metrics.


def test_metrics_travel_with_the_end_and_the_last_value_counts(server, talker):
    def note(**values: float) -> list[pb.EpisodeMetrics]:
        return [pb.EpisodeMetrics(episode=1, values=values)]

    # With the first row, alone, and with the row that ends the episode.
    talker.step(1, 0, metrics=note(goals=1.0, early=5.0))
    talker.act(metrics=note(goals=2.0, crashes=0.0))
    talker.step(1, 1, 1.0, 1.0, TERMINATED, metrics=note(goals=3.0))
    (chunk,) = server.collect(1)
    assert chunk.end.metrics == {"goals": 3.0, "early": 5.0, "crashes": 0.0}


def test_metrics_of_an_unknown_episode_are_ignored(server, talker):
    talker.act(metrics=[pb.EpisodeMetrics(episode=77, values={"goals": 1.0})])
    talker.play(1, 1)
    assert server.collect(1)[0].end.metrics == {}


def test_observation_and_action_of_a_chunk_survive_the_message_they_came_in(server, talker):
    """Columns are views of a message's bytes, and must outlive it."""
    for step in range(20):
        talker.step(1, step, step, float(step > 0))
    chunks = server.collect(19)
    observed = [batch.observations[""][row][0] for chunk in chunks for batch, row in chunk.rows]
    assert observed == list(np.arange(19.0))
