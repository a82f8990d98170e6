"""Experience on its way to RLlib: full buffers, demands, and the cuts between versions."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import gymnasium as gym
import numpy as np
import pytest

from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.faults import Reason
from policy_server.buffer import _MAX_KEPT_ENDS
from tests.server.talk import (
    ABANDONED,
    TERMINATED,
    Talker,
    actions_of,
    eventually,
    refused,
    rows,
    seen,
)
from tests.servers import serving

MANY_ACTIONS = gym.spaces.Discrete(1_000_000)


@pytest.fixture
def actor():
    """RLlib's thread."""
    with ThreadPoolExecutor(1) as executor:
        yield executor


def waiting(server, requests: int = 1) -> None:
    """Until so many requests are held."""
    eventually(lambda: server.server.stats()["requests_waiting"] == requests)


# What one call takes.


@pytest.mark.parametrize(("more", "taken"), [(1, 11), (3, 10)], ids=["small rest", "large rest"])
def test_small_rest_goes_along_and_a_large_one_waits_for_the_next_call(more, taken):
    with serving() as server, Talker(server.address) as talker:
        talker.play(1, 10)
        talker.play(2, more)
        assert sum(chunk.steps for chunk in server.collect(10)) == taken
        assert server.ledger()["held"] == 10 + more - taken


# A full buffer.


def full_buffer(talker: Talker, episode: int = 1, steps: int = 4) -> int:
    """Fill a buffer of that many steps; the next step of the episode has to wait."""
    for step in range(steps):
        talker.step(episode, step, step, float(step > 0))
    return steps


def test_full_buffer_delays_answers_and_room_releases_them():
    with serving(capacity_steps=3) as server, Talker(server.address) as talker:
        step = full_buffer(talker, steps=3)
        call = talker.begin(rows([1], [step], seen(step), rewards=[1.0]))
        waiting(server)
        assert server.ledger()["held"] == 3
        assert sum(chunk.steps for chunk in server.collect(3)) == 3
        assert actions_of(call.result().groups[0]) == [0]


def test_answer_delayed_too_long_is_resource_exhausted_with_a_delay():
    with (
        serving(capacity_steps=3, wait_timeout_s=0.15) as server,
        Talker(server.address) as talker,
    ):
        step = full_buffer(talker, steps=3)
        group = rows([1], [step], seen(step), rewards=[1.0])
        for _ in range(2):
            with refused(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                Reason.LIMIT_EXCEEDED,
                "",
                "3 steps",
                "buffer_fragments",
                "wait_timeout_s=0.15",
            ) as found:
                talker.act(group)
            assert found[0].retry_after_s is not None
        server.collect(3)
        assert actions_of(talker.act(group).groups[0]) == [0]
        assert server.ledger()["received"] == 3


def test_full_buffer_delays_logged_actions_too():
    with (
        serving(capacity_steps=3, wait_timeout_s=0.15, hold=True) as server,
        Talker(server.address) as talker,
    ):

        def log(step: int) -> None:
            reward = float(step > 0)
            talker.act(
                rows(
                    [1], [step], seen(step), rewards=[reward],
                    logged=np.array([1]), logged_logps=[-0.5],
                )
            )  # fmt: skip

        for step in range(3):
            log(step)
        with refused(
            grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.LIMIT_EXCEEDED, "", "buffer_fragments"
        ):
            log(3)
        assert server.ledger()["held"] == 3
        server.collect(3)
        log(3)


def test_evaluation_goes_on_while_the_buffer_is_full():
    with serving(capacity_steps=3) as server, Talker(server.address) as talker:
        step = full_buffer(talker, steps=3)
        call = talker.begin(rows([1], [step], seen(step), rewards=[1.0]))
        waiting(server)
        talker.step(2, 0, starts=[pb.EpisodeStart(episode=2, evaluation=True)])
        talker.play(2, 10)
        assert not call.done()


def test_discarding_buffer_drops_the_oldest_counts_it_and_never_delays():
    with (
        serving(capacity_steps=10, when_full="discard") as server,
        Talker(server.address) as talker,
    ):
        for step in range(36):
            talker.step(1, step, step, float(step))
            assert server.ledger()["held"] <= 11
            assert server.unaccounted() == 0
        chunks = server.collect(10, timeout_s=0.05)
        steps = sum(chunk.steps for chunk in chunks)
        assert steps >= 8  # no more was dropped than had to be
        server.buffer.ledger.deliver(steps)
        assert server.ledger() == {
            "received": 35,
            "delivered": steps,
            "discarded_full": 35 - steps,
            "held": 0,
        }
        # What is left is the newest, and says where it begins.
        assert chunks[0].first_step == 35 - sum(chunk.steps for chunk in chunks)
        position = chunks[0].first_step
        for chunk in chunks:
            assert chunk.first_step == position
            assert chunk.rewards == [
                float(step + 1) for step in range(position, position + chunk.steps)
            ]
            position += chunk.steps
        assert position == 35


def test_return_of_an_episode_whose_steps_were_discarded_is_still_reported():
    with (
        serving(capacity_steps=4, when_full="discard") as server,
        Talker(server.address) as talker,
    ):
        talker.play(1, 5)
        talker.play(2, 3)
        ends = [chunk.end for chunk in server.collect(100, timeout_s=0.05) if chunk.end]
        assert [end.episode_return for end in ends] == [5.0, 3.0]
        assert server.ledger()["held"] == 0


# What a demand gets.


def test_demand_is_met_by_cutting_running_episodes(actor):
    with serving() as server, Talker(server.address) as talker:
        sample = actor.submit(server.collect, 6)
        for step in range(4):
            for episode in (1, 2):
                talker.step(episode, step, 10 * episode + step, float(step > 0))
        chunks = sample.result()
        assert {chunk.steps for chunk in chunks} == {3}
        for chunk in chunks:
            # The observation after the last step comes along, and is the next chunk's first.
            start = chunk.rows[0][0].observations[""][chunk.rows[0][1]][0]
            assert chunk.last_observation[""][0, 0] == start + 3
            assert (chunk.terminated, chunk.truncated, chunk.end) == (False, False, None)
        talker.step(1, 4, 14, 1.0)
        (chunk,) = server.collect(1)
        assert (chunk.first_step, chunk.steps) == (3, 1)
        assert chunk.rows[0][0].observations[""][chunk.rows[0][1]][0] == 13


def test_demand_that_waits_too_long_gets_what_there_is(actor):
    with serving() as server, Talker(server.address) as talker:
        talker.step(1, 0)
        talker.step(1, 1, 1.0, 1.0)
        chunks = server.collect(1000, timeout_s=0.05)
        assert [chunk.steps for chunk in chunks] == [1]
        assert server.collect(1000, timeout_s=0.05) == []


def test_demand_without_clients_does_not_wait_long():
    with serving() as server:
        assert server.buffer.collect(1, timeout_s=60.0, idle_timeout_s=0.02) == []
        with Talker(server.address) as talker:
            talker.close_session()
        assert server.buffer.collect(1, timeout_s=60.0, idle_timeout_s=0.02) == []


def test_closing_the_buffer_releases_a_waiting_demand(actor):
    with serving() as server, Talker(server.address) as talker:
        sample = actor.submit(server.collect, 1000, 60.0)
        talker.step(1, 0)
        server.server.stop()
        assert [chunk.steps for chunk in sample.result(5)] == [0]  # its end is still reported


def test_complete_episodes_are_never_cut(actor):
    with (
        serving(complete_episodes=True, capacity_steps=5) as server,
        Talker(server.address) as talker,
    ):
        sample = actor.submit(server.collect, 4)
        for step in range(10):  # beyond the demand, and the capacity
            talker.step(1, step, step, float(step > 0))
        server.publish(2)
        talker.step(1, 10, 10.0, 1.0, TERMINATED)
        (chunk,) = sample.result()
        assert (chunk.steps, chunk.first_step, chunk.terminated) == (10, 0, True)


def test_complete_episodes_that_are_there_already_are_taken_at_once(actor):
    with (
        serving(complete_episodes=True, capacity_steps=5) as server,
        Talker(server.address) as talker,
    ):
        talker.play(1, 6)
        assert sum(c.steps for c in actor.submit(server.collect, 5, 60.0).result(5)) == 6


# Versions.


def test_chunk_is_cut_where_the_policy_changes():
    with serving(action_space=MANY_ACTIONS) as server, Talker(server.address) as talker:
        for step in range(9):
            if step % 3 == 0:
                server.publish(10 + step, action=10 + step)
            talker.step(1, step, step, float(step > 0))
        talker.step(1, 9, 9.0, 1.0, TERMINATED)
        chunks = server.collect(9)
        assert [chunk.policy.version for chunk in chunks] == [10, 13, 16]
        assert [chunk.first_step for chunk in chunks] == [0, 3, 6]
        for chunk in chunks:
            assert {batch.policy for batch, _ in chunk.rows} == {chunk.policy}
            assert {int(b.actions[""][row]) for b, row in chunk.rows} == {chunk.policy.version}


def test_no_batch_mixes_two_versions():
    """Policies change as fast as they can while many streams act; actions tell their version."""
    streams_count, steps = 8, 60
    episodes = [list(range(1 + 8 * i, 9 + 8 * i)) for i in range(streams_count)]
    stop = threading.Event()

    def hammer(server) -> int:
        version = 1
        while not stop.is_set():
            version += 1
            server.publish(version, action=version)
        return version

    def play(talker: Talker, mine: list[int]) -> set[int]:
        stream = talker.stream(timeout=60)
        versions = set()
        for step in range(steps):
            rewards = [float(step > 0)] * len(mine)
            answer = stream.ask(rows(mine, [step] * 8, seen(*mine), rewards=rewards)).act.groups[0]
            assert set(actions_of(answer)) == {answer.policy_version}
            versions.add(answer.policy_version)
        return versions

    with serving(action_space=MANY_ACTIONS) as server, Talker(server.address) as talker:
        server.publish(1, action=1)
        with ThreadPoolExecutor(streams_count + 1) as pool:
            hammering = pool.submit(hammer, server)
            try:
                played = [pool.submit(play, talker, mine) for mine in episodes]
                versions = set().union(*(one.result() for one in played))
            finally:
                stop.set()
            assert hammering.result() > len(versions) > 10
        for chunk in server.collect(10**6, timeout_s=0.05):
            for batch, row in chunk.rows:
                assert batch.policy is chunk.policy
                assert batch.actions[""][row] == chunk.policy.version


def test_abandoned_episode_leaves_nothing_of_it_waiting_for_the_learner():
    with serving() as server, Talker(server.address) as talker:
        for step in range(4):
            talker.step(1, step, step, float(step > 0))
        talker.step(2, 0)
        server.publish(2)  # the next row of each cuts what there is
        talker.step(1, 4, 4.0, 1.0)
        talker.step(2, 1, 1.0, 1.0)
        talker.step(1, 5, 5.0, 1.0, ABANDONED)
        assert server.ledger() == {
            "received": 5, "delivered": 0, "discarded_abandoned": 4, "held": 1
        }  # fmt: skip
        (chunk,) = server.collect(1)
        assert (chunk.steps, chunk.end) == (1, None)


# While nobody calls sample().


@pytest.mark.parametrize("when_full", ["wait", "discard"])
def test_memory_is_bounded_while_nobody_learns(when_full):
    episodes = 3 * _MAX_KEPT_ENDS
    with (
        serving(capacity_steps=50, when_full=when_full) as server,
        Talker(server.address) as talker,
    ):
        for first in range(1, episodes, 500):
            numbers = list(range(first, first + 500))
            starts = [pb.EpisodeStart(episode=number, evaluation=True) for number in numbers]
            talker.act(rows(numbers, [0] * 500, seen(*[0] * 500)), starts=starts)
            ends = [TERMINATED] * 500
            talker.act(rows(numbers, [1] * 500, seen(*[1] * 500), statuses=ends))
        # Training fills the buffer but for one step, or goes on for as long as it discards.
        for step in range(50 if when_full == "wait" else 500):
            talker.step(episodes + 1, step, step, float(step > 0))
        assert server.buffer.held <= 51
        assert server.unaccounted() == 0
        assert len(server.buffer._chunks) <= 2 * _MAX_KEPT_ENDS + 50


# Short fragments.


def test_long_chunk_is_handed_over_in_fragments_that_join():
    with serving() as server, Talker(server.address) as talker:
        for step in range(10):
            talker.step(1, step, step, float(step > 0))
        talker.act(rows([1], [10], seen(10), rewards=[1.0], statuses=[TERMINATED]))
        chunks = [chunk for _ in range(2) for chunk in server.collect(4)]
        assert [(chunk.first_step, chunk.steps) for chunk in chunks] == [(0, 4), (4, 6)]
        first, last = chunks
        assert first.last_observation[""][0, 0] == 4
        assert (first.terminated, first.end) == (False, None)
        assert (last.terminated, last.end.length) == (True, 10)
        assert first.identity is last.identity
