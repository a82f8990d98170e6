"""What the engine makes of a row stays with that row: neighbours are served, weights stay sound."""

from __future__ import annotations

import grpc
import gymnasium as gym
import numpy as np
import pytest

from client_sdk.wire.faults import Reason
from tests.server.talk import (
    TERMINATED,
    Talker,
    actions_of,
    check_fault,
    eventually,
    faults_of,
    refused,
    rows,
    seen,
)
from tests.servers import CountingPolicy, serving

POISON = 666.0


class PoisonedPolicy(CountingPolicy):
    """Raises at a poisoned observation, or rates it with NaN."""

    def __init__(self, raises: bool) -> None:
        super().__init__(1, gym.spaces.Discrete(2), np.int64(0))
        self.raises = raises

    def infer(self, observations, greedy, contexts):
        poisoned = observations[""][:, 0] == POISON
        if self.raises and poisoned.any():
            raise ValueError("a connector refuses this observation")
        batch = super().infer(observations, greedy, contexts)
        batch.outputs["action_logp"][poisoned] = np.nan
        return batch


@pytest.fixture
def server():
    with serving(first_version=None, hold=True) as server:
        yield server


def held_together(server, talker, *values):
    """One request per value, all of them released into one inference."""
    calls = [
        talker.begin(rows([episode], [0], seen(value)))
        for episode, value in enumerate(values, start=1)
    ]
    eventually(lambda: server.server.stats()["requests_waiting"] == len(values))
    return calls


def test_a_row_that_the_engine_cannot_take_costs_its_neighbours_nothing(server):
    server.policies.publish(PoisonedPolicy(raises=True))
    with Talker(server.address) as talker:
        first, poisoned, last = held_together(server, talker, 1.0, POISON, 2.0)
        server.policies.publish(PoisonedPolicy(raises=True))
        assert actions_of(first.result().groups[0]) == [0]
        assert actions_of(last.result().groups[0]) == [0]
        with refused(grpc.StatusCode.INTERNAL, Reason.INTERNAL):
            poisoned.result()
        assert server.server.stats()["incidents"] >= 1


def test_an_answer_that_is_not_finite_abandons_its_episode_alone(server):
    server.policies.publish(PoisonedPolicy(raises=False))
    with Talker(server.address) as talker:
        first, poisoned = held_together(server, talker, 1.0, POISON)
        server.policies.publish(PoisonedPolicy(raises=False))
        assert actions_of(first.result().groups[0]) == [0]
        check_fault(faults_of(poisoned.result().groups[0])[0], Reason.NOT_FINITE, "", "abandoned")
        assert server.server.stats()["episodes_open"] == 1
        again = talker.act(rows([2], [1], seen(0), statuses=[TERMINATED])).groups[0]
        assert faults_of(again)[0].reason is Reason.EPISODE_ENDED


def test_steps_that_led_to_it_are_accounted_for():
    with serving(first_version=None) as server, Talker(server.address) as talker:
        server.policies.publish(PoisonedPolicy(raises=False))
        for step in range(3):
            talker.step(1, step, step, float(step > 0))
        answer = talker.act(rows([1, 2], [3, 0], seen(POISON, 0.0), rewards=[1.0, 0.0]))
        (group,) = answer.groups
        assert list(faults_of(group)) == [0]
        assert actions_of(group) == [0, 0]
        assert server.ledger() == {
            "received": 3,
            "delivered": 0,
            "discarded_abandoned": 3,
            "held": 0,
        }
