"""The next step of an episode that runs alone is answered before it is recorded; nobody can tell.

Everything here happens in both ways, with the shortcut and without, and comes out the same.
"""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest

from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.faults import Fault, Reason
from policy_server.batcher import Batcher
from policy_server.lockstep import Lockstep
from policy_server.tracks import AgentTrack
from tests.server.talk import (
    TERMINATED,
    Talker,
    actions_of,
    eventually,
    faults_of,
    rows,
    seen,
    waiting,
)
from tests.servers import CountingPolicy, EchoPolicy, serving

MANY_ACTIONS = gym.spaces.Discrete(1_000_000)


class Way:
    """Which of the two it is, and the answers that came before their rows were recorded."""

    def __init__(self, *, short: bool) -> None:
        self.short = short
        self.answered_first = 0

    def expect(self, answers: int) -> None:
        """That many came first, where that is possible."""
        assert self.answered_first == (answers if self.short else 0)


@pytest.fixture(params=["first", "usual"])
def way(request, monkeypatch):
    way = Way(short=request.param == "first")
    original = Batcher.answer_first

    def answer_first(*arguments):
        answered = way.short and original(*arguments)
        way.answered_first += answered
        return answered

    monkeypatch.setattr(Batcher, "answer_first", answer_first)
    return way


class Player:
    """One episode over one stream."""

    def __init__(self, talker: Talker, **start) -> None:
        self.stream = talker.stream()
        self.step = 0
        self._starts = [pb.EpisodeStart(episode=1, **start)] if start else []

    def send(self, value: float = 0.0, **fields) -> None:
        """The next row, with its number as the reward of the step before it."""
        group = rows([1], [self.step], seen(value), rewards=[float(self.step)], **fields)
        more = {"starts": self._starts} if self.step == 0 else {}
        self.stream.send(group, **more)
        self.step += 1

    def act(self, value: float = 0.0) -> int:
        """The action at the next row."""
        self.send(value)
        answer = self.stream.receive()
        if answer.HasField("error"):
            raise Fault.from_detail(answer.error)
        (group,) = answer.act.groups
        for fault in faults_of(group).values():
            raise fault
        (action,) = actions_of(group)
        return action


def test_an_episode_is_delivered_as_it_was_played(way):
    with serving(action_space=MANY_ACTIONS) as server, Talker(server.address) as talker:
        server.policies.publish(EchoPolicy())
        player = Player(talker)
        assert [player.act(step) for step in range(10)] == [101 * step for step in range(10)]
        player.send(10.0, statuses=[TERMINATED])
        player.stream.receive()
        assert server.unaccounted() == 0
        (chunk,) = server.collect(10)
        way.expect(9)  # all but the row that begins it
        assert chunk.terminated
        assert chunk.rewards == [float(step) for step in range(1, 11)]
        taken = [
            (batch.observations[""][row, 0], batch.actions[""][row]) for batch, row in chunk.rows
        ]
        assert taken == [(step, 101 * step) for step in range(10)]
        assert chunk.last_observation[""].tolist() == [[10.0] * 4]
        assert (chunk.end.length, chunk.end.episode_return) == (10, 55.0)
        assert server.ledger()["received"] == 10
        stats = server.server.stats()
        assert (stats["requests"], stats["actions"], stats["batches"]) == (11, 10, 10)


def test_a_chunk_ends_where_a_newer_policy_acts(way):
    with serving() as server, Talker(server.address) as talker:
        player = Player(talker)
        for step in range(8):
            if step == 5:
                server.publish(2, 1)
            assert player.act() == int(step >= 5)
        chunks = server.collect(7)
        way.expect(7)
        assert [(chunk.policy.version, chunk.rewards) for chunk in chunks] == [
            (1, [1.0, 2.0, 3.0, 4.0, 5.0]),
            (2, [6.0, 7.0]),
        ]


@pytest.mark.parametrize("complete_episodes", [False, True])
def test_in_hold_mode_no_action_comes_after_what_was_asked_for(way, complete_episodes):
    hold = {"hold": True, "hold_timeout_s": 20.0, "complete_episodes": complete_episodes}
    with serving(**hold) as server, Talker(server.address) as talker:
        player = Player(talker)
        player.send()
        eventually(lambda: waiting(server) == 1)
        demand = server.asking(6)
        player.stream.receive()
        for _ in range(5):
            player.act()
        player.send()  # completes the sixth step
        if complete_episodes:  # which is no episode yet
            player.stream.receive()
            player.send(statuses=[TERMINATED])
            player.stream.receive()
        else:
            eventually(lambda: waiting(server) == 1)
        assert sum(chunk.steps for chunk in demand.result(10)) == 6 + complete_episodes
        way.expect(5 + complete_episodes)


def test_a_full_buffer_holds_the_row_that_fills_it(way):
    with serving(capacity_steps=5) as server, Talker(server.address) as talker:
        player = Player(talker)
        for _ in range(5):
            player.act()
        player.send()  # completes the fifth step
        eventually(lambda: waiting(server) == 1)
        way.expect(4)
        assert server.unaccounted() == 0
        assert sum(chunk.steps for chunk in server.collect(5)) == 5
        assert not player.stream.receive().HasField("error")


def test_a_full_buffer_may_discard_instead(way):
    with serving(capacity_steps=5, when_full="discard") as server, Talker(server.address) as talker:
        player = Player(talker)
        for _ in range(20):
            player.act()
        way.expect(19)
        assert server.ledger()["discarded_full"] >= 10
        assert server.unaccounted() == 0


@pytest.mark.parametrize("greedy", [False, True])
def test_an_episode_that_is_not_learnt_from_acts_as_it_was_announced(way, greedy):
    with serving(capacity_steps=5) as server, Talker(server.address) as talker:
        player = Player(talker, greedy=greedy, evaluation=not greedy)
        for _ in range(10):
            player.act()
        way.expect(9)
        assert [each.tolist() for each in server.policies.current.greedy] == [[greedy]] * 10
        assert server.ledger()["discarded_evaluation"] == 9
        assert server.unaccounted() == 0


class RewardedPolicy(CountingPolicy):
    """Acts with the reward that it is told of."""

    def infer(self, observations, greedy, contexts):
        batch = super().infer(observations, greedy, contexts)
        batch.env_actions = {"": np.array([int(context.reward) for context in contexts])}
        return batch


def test_the_engine_knows_what_the_last_action_earned(way):
    with serving(action_space=MANY_ACTIONS) as server, Talker(server.address) as talker:
        server.policies.publish(RewardedPolicy(1, MANY_ACTIONS, np.int64(0)))
        player = Player(talker)
        assert [player.act() for _ in range(6)] == [0, 1, 2, 3, 4, 5]
        way.expect(5)


class PoisonedPolicy(CountingPolicy):
    """Raises at a negative observation, and rates 666 with NaN."""

    def infer(self, observations, greedy, contexts):
        if observations[""][0, 0] < 0.0:
            raise ValueError("a connector refuses this observation")
        batch = super().infer(observations, greedy, contexts)
        if observations[""][0, 0] == 666.0:
            batch.outputs["action_logp"][:] = np.nan
        return batch


@pytest.fixture
def poisoned():
    with serving() as server, Talker(server.address) as talker:
        server.policies.publish(PoisonedPolicy(1, gym.spaces.Discrete(2), np.int64(1)))
        yield server, Player(talker)


def test_an_engine_that_fails_is_told_and_the_step_may_be_asked_again(poisoned, way):
    server, player = poisoned
    for _ in range(4):
        player.act()
    before = server.server.stats()["incidents"]
    with pytest.raises(Fault) as caught:
        player.act(-1.0)
    assert caught.value.reason is Reason.INTERNAL
    assert server.server.stats()["incidents"] == before + 1
    way.expect(3)
    server.publish(2, 0)
    player.step -= 1
    assert player.act(-1.0) == 0
    assert player.act() == 0
    way.expect(4)
    assert server.ledger()["received"] == 5
    assert server.unaccounted() == 0


def test_an_answer_that_is_not_finite_abandons_the_episode(poisoned, way):
    server, player = poisoned
    for _ in range(4):
        player.act()
    with pytest.raises(Fault) as caught:
        player.act(666.0)
    assert caught.value.reason is Reason.NOT_FINITE
    way.expect(3)
    assert server.server.stats()["episodes_open"] == 0
    assert server.ledger()["discarded_abandoned"] == 4
    assert server.unaccounted() == 0


class OnceNotFinitePolicy(EchoPolicy):
    """Rates one answer with NaN, and no other."""

    answers = 0

    def infer(self, observations, greedy, contexts):
        batch = super().infer(observations, greedy, contexts)
        self.answers += 1
        if self.answers == 5:
            batch.outputs["action_logp"] = np.full(1, np.nan, np.float32)
        return batch


def test_an_answer_that_is_not_finite_is_not_drawn_again(way):
    with serving(action_space=MANY_ACTIONS) as server, Talker(server.address) as talker:
        policy = OnceNotFinitePolicy()
        server.policies.publish(policy)
        player = Player(talker)
        assert [player.act() for _ in range(4)] == [0, 1, 2, 3]
        with pytest.raises(Fault) as caught:
            player.act()
        assert caught.value.reason is Reason.NOT_FINITE
        assert policy.answers == 5
        way.expect(3)


def test_the_answer_is_under_way_before_the_step_is_recorded(way, monkeypatch):
    happened = []
    answer, observe = Lockstep.answer, AgentTrack.observe

    def seen_answer(self, *arguments):
        happened.append("answer")
        answer(self, *arguments)

    def seen_observe(self, *arguments):
        happened.append("record")
        observe(self, *arguments)

    monkeypatch.setattr(Lockstep, "answer", seen_answer)
    monkeypatch.setattr(AgentTrack, "observe", seen_observe)
    with serving() as server, Talker(server.address) as talker:
        player = Player(talker)
        for _ in range(6):
            player.act()
    way.expect(5)
    # gRPC's first message goes alone, and the stream goes in lockstep from the second one on.
    if way.short:
        assert happened == ["record", "answer", *["answer", "record"] * 4]
    else:
        assert happened == ["answer"] * 5


def test_rows_that_are_not_in_order_are_refused_and_change_nothing(way):
    with serving() as server, Talker(server.address) as talker:
        player = Player(talker)
        for _ in range(4):
            player.act()
        for broken, reason in ((np.nan, Reason.NOT_FINITE), (0.0, Reason.STEP_OUT_OF_ORDER)):
            player.step += reason is Reason.STEP_OUT_OF_ORDER
            with pytest.raises(Fault) as caught:
                player.act(broken)
            assert caught.value.reason is reason
            player.step -= 1 + (reason is Reason.STEP_OUT_OF_ORDER)
        way.expect(3)
        assert player.act() == 0
        way.expect(4)
        assert server.ledger()["received"] == 4


def test_another_episode_is_waited_for(way):
    with serving() as server, Talker(server.address) as talker, Talker(server.address) as other:
        neighbour = Player(other)
        neighbour.act()
        player = Player(talker)
        for _ in range(5):
            player.act()
        way.expect(0)
        neighbour.send(statuses=[TERMINATED])
        neighbour.stream.receive()
        player.act()
        way.expect(1)
