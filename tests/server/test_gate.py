"""When actions of training episodes are given: holding while RLlib learns, and a full buffer."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import grpc
import gymnasium as gym
import numpy as np
import pytest

from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.faults import Reason
from tests.server.talk import (
    ABANDONED,
    TERMINATED,
    Talker,
    actions_of,
    check_fault,
    eventually,
    fault_in,
    refused,
    rows,
    seen,
)
from tests.servers import serving

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
FIRST = rows([1], [0], seen(0))
MANY_ACTIONS = gym.spaces.Discrete(1_000_000)


@pytest.fixture
def actor():
    """RLlib's thread."""
    with ThreadPoolExecutor(1) as executor:
        yield executor


@pytest.fixture
def holding():
    with serving(hold=True, action_space=MANY_ACTIONS) as server:
        yield server


def waiting(server, requests: int = 1) -> None:
    """Until so many requests are held."""
    eventually(lambda: server.server.stats()["requests_waiting"] == requests)


# Hold.


def test_held_action_is_released_when_rllib_asks_for_experience(holding, actor):
    with Talker(holding.address) as talker:
        call = talker.begin(FIRST)
        waiting(holding)
        sample = actor.submit(holding.collect, 2)
        assert actions_of(call.result().groups[0]) == [0]
        # Until it has what it wants, actions flow.
        assert talker.step(1, 1, 1.0, 1.0) == 0
        call = talker.begin(rows([1], [2], seen(2), rewards=[1.0]))
        assert sum(chunk.steps for chunk in sample.result()) == 2
        # And then no more.
        waiting(holding)
        assert not call.done()


def test_held_action_is_released_by_a_newer_policy_and_comes_from_it(holding):
    with Talker(holding.address) as talker:
        call = talker.begin(FIRST)
        waiting(holding)
        holding.publish(2, action=22)
        answer = call.result().groups[0]
        assert actions_of(answer) == [22]
        assert answer.policy_version == 2
        # One action each: the gate did not stay open.
        call = talker.begin(rows([1], [1], seen(1)))
        waiting(holding)


def test_held_action_is_released_with_an_error_when_the_server_stops():
    with serving(hold=True) as server, Talker(server.address) as talker:
        stream = talker.stream()
        stream.send(rows([2], [0], seen(0)))
        call = talker.begin(FIRST)
        waiting(server, 2)
        server.server.stop()
        error = call.exception()
        assert error.code() is UNAVAILABLE
        check_fault(fault_in(error), Reason.DRAINING, "", "stopping", "connect again")
        assert Reason(stream.receive().error.reason) is Reason.DRAINING
        with pytest.raises(grpc.RpcError) as caught:
            stream.receive()
        assert caught.value.code() is UNAVAILABLE


def test_held_action_is_released_with_an_error_when_learning_fails(holding):
    with Talker(holding.address) as talker:
        call = talker.begin(FIRST)
        waiting(holding)
        holding.server.set_degraded("loss is NaN")
        error = call.exception()
        assert error.code() is UNAVAILABLE
        check_fault(fault_in(error), Reason.NOT_READY, "", "loss is NaN", "ask again")


def test_action_held_too_long_is_not_ready_and_asking_again_is_safe():
    with serving(hold=True, hold_timeout_s=0.15) as server, Talker(server.address) as talker:
        server.policies.publish(server.policies.current)
        for _ in range(2):
            with refused(UNAVAILABLE, Reason.NOT_READY, "", "held back", "ask again") as found:
                talker.act(FIRST)
            assert found[0].retry_after_s is not None
        call = talker.begin(FIRST)
        waiting(server)
        server.publish(2)
        assert actions_of(call.result().groups[0]) == [0]
        assert server.server.stats()["actions"] == 1
        assert server.ledger()["received"] == 0


def test_episode_taken_back_while_its_row_is_held_teaches_nothing_under_a_newer_policy(holding):
    with Talker(holding.address) as talker:
        call = talker.begin(FIRST)
        waiting(holding)
        holding.publish(2)
        call.result()
        call = talker.begin(rows([1], [1], seen(1), rewards=[1.0]))
        waiting(holding)
        talker.act(rows([1], [2], statuses=[ABANDONED]))
        holding.publish(3)
        call.result()
        assert holding.collect(timeout_s=0.05) == []
        assert holding.ledger() == {
            "received": 1, "delivered": 0, "discarded_abandoned": 1, "held": 0
        }  # fmt: skip


def test_ends_are_never_held(holding, actor):
    with Talker(holding.address) as talker:
        call = talker.begin(FIRST)
        waiting(holding)
        holding.publish(2)
        call.result()
        assert talker.step(1, 1, 1.0, 1.0, TERMINATED) is None
        assert holding.ledger()["held"] == 1


def test_logged_actions_are_never_held(holding):
    with Talker(holding.address) as talker:
        for step in range(3):
            talker.act(
                rows([1], [step], seen(step), logged=np.array([7]), logged_logps=[-0.1]), timeout=5
            )
        assert holding.ledger()["held"] == 2


@pytest.mark.parametrize("option", ["evaluation", "greedy"])
def test_evaluation_is_never_held_and_never_learnt_from(holding, option):
    with Talker(holding.address) as talker:
        talker.act(FIRST, starts=[pb.EpisodeStart(episode=1, **{option: True})], timeout=5)
        talker.play(1, 5)
        (greedy,) = {bool(row) for rows_ in holding.policies.current.greedy for row in rows_}
        assert greedy is (option == "greedy")
        assert holding.ledger() == {
            "received": 5, "delivered": 0, "discarded_evaluation": 5, "held": 0
        }  # fmt: skip
        (chunk,) = holding.collect(timeout_s=0.05)
        assert (chunk.steps, chunk.training, chunk.terminated) == (0, False, True)
        assert (chunk.end.episode_return, chunk.end.length) == (5.0, 5)


# The first policy.


def test_nothing_is_served_before_the_first_policy():
    with serving(first_version=None) as server, Talker(server.address) as talker:
        with refused(UNAVAILABLE, Reason.NOT_READY, "", "no policy yet", "ask again"):
            talker.act(FIRST)
        server.publish(5, action=1)
        answer = talker.act(FIRST).groups[0]
        assert (actions_of(answer), answer.policy_version) == ([1], 5)


def test_policy_that_fails_is_an_incident_and_asking_again_is_safe(caplog):
    class Broken:
        version = 2

        def infer(self, observations, greedy, contexts):
            raise ZeroDivisionError("secret detail")

    with serving() as server, Talker(server.address) as talker:
        good = server.policies.current
        server.policies.publish(Broken())
        with refused(grpc.StatusCode.INTERNAL, Reason.INTERNAL, "", "internal error") as found:
            talker.act(FIRST)
        assert "secret" not in found[0].message
        incident = found[0].message.split()[-1]
        assert any(incident in record.message for record in caplog.records)
        assert "secret detail" in caplog.text
        server.policies.publish(good)
        assert talker.step(1, 0) == 0


def test_policy_whose_actions_do_not_fit_the_space_is_an_incident_for_all_it_answered():
    class Misfit:
        version = 2

        def infer(self, observations, greedy, contexts):
            batch = good.infer(observations, greedy, contexts)
            batch.env_actions = {"": np.zeros((len(contexts), 3), np.float64)}
            return batch

    with serving(hold=True) as server, Talker(server.address) as talker:
        good = server.policies.current
        stream = talker.stream()
        stream.send(rows([1], [0], seen(0)))
        stream.send(rows([2], [0], seen(0)))
        call = talker.begin(rows([3], [0], seen(0)))
        waiting(server, 3)
        server.policies.publish(Misfit())
        for _ in range(2):
            assert Reason(stream.receive().error.reason) is Reason.INTERNAL
        assert call.exception().code() is grpc.StatusCode.INTERNAL
