"""Lives of sessions and episodes: retries, repeats, ends, and clients that vanish."""

from __future__ import annotations

import grpc
import gymnasium as gym
import pytest

from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.faults import Reason
from tests.server.talk import (
    ABANDONED,
    RUNNING,
    TERMINATED,
    TRUNCATED,
    Talker,
    actions_of,
    check_fault,
    eventually,
    faults_of,
    refuse_row,
    rows,
    seen,
)
from tests.servers import CountingPolicy, EchoPolicy, serving

MANY_ACTIONS = gym.spaces.Discrete(1_000_000)
STEPS = "groups[0].steps[0]"
NOT_FOUND = grpc.StatusCode.NOT_FOUND


# Retries and repeats.


def test_repeated_step_gets_the_same_action_and_counts_once():
    with serving(action_space=MANY_ACTIONS) as server, Talker(server.address) as talker:
        server.publish(1, action=11)
        assert talker.step(1, 0) == 11
        server.publish(2, action=22)
        assert talker.step(1, 0) == 11
        assert talker.step(1, 1, reward=1.0) == 22
        server.publish(3, action=33)
        for _ in range(3):
            assert talker.step(1, 1, reward=1.0) == 22
        assert server.ledger()["received"] == 1
        talker.step(1, 2, 0.0, 1.0, TERMINATED)
        chunks = server.collect(2)
        assert sum(chunk.steps for chunk in chunks) == 2
        assert chunks[-1].end.episode_return == 2.0
        assert chunks[-1].end.length == 2


def test_repeated_first_step_starts_no_second_episode():
    with serving() as server, Talker(server.address) as talker:
        start = pb.EpisodeStart(episode=1, label="level 3")
        for _ in range(3):
            talker.step(1, 0, starts=[start])
        assert server.server.stats()["episodes_open"] == 1


def test_repeated_message_of_many_rows_gets_the_same_answer():
    with serving(action_space=MANY_ACTIONS) as server, Talker(server.address) as talker:
        server.policies.publish(EchoPolicy())
        episodes = list(range(1, 65))
        for step in range(4):
            group = rows(episodes, [step] * 64, seen(*episodes), rewards=[float(step > 0)] * 64)
            first = talker.act(group)
            assert talker.act(group) == first
            assert actions_of(first.groups[0]) == [100 * episode + step for episode in episodes]
        assert server.ledger()["received"] == 3 * 64


def test_repeat_beside_new_rows_gets_its_old_action():
    with serving(action_space=MANY_ACTIONS) as server, Talker(server.address) as talker:
        server.publish(1, action=11)
        talker.step(1, 0)
        server.publish(2, action=22)
        answer = talker.act(rows([2, 1, 3], [0, 0, 0], seen(0, 0, 0))).groups[0]
        assert actions_of(answer) == [22, 11, 22]


def test_start_is_repeated_at_the_cap_without_harm():
    with (
        serving(max_open_episodes_per_session=1) as server,
        Talker(server.address) as talker,
    ):
        for _ in range(2):
            assert talker.step(1, 0, starts=[pb.EpisodeStart(episode=1)]) == 0


def test_two_requests_in_flight_for_one_step_get_one_action():
    with serving(action_space=MANY_ACTIONS, hold=True) as server, Talker(server.address) as talker:
        server.policies.publish(EchoPolicy())
        group = rows([1], [0], seen(5))
        calls = [talker.begin(group) for _ in range(3)]
        eventually(lambda: server.server.stats()["requests"] == 3)
        server.policies.publish(EchoPolicy(version=2))
        assert [actions_of(call.result().groups[0]) for call in calls] == [[500]] * 3
        assert server.server.stats()["actions"] == 1


def test_second_step_while_the_first_waits_is_out_of_order():
    with serving(hold=True) as server, Talker(server.address) as talker:
        first = talker.begin(rows([1], [0], seen(0)))
        eventually(lambda: server.server.stats()["requests_waiting"] == 1)
        fault = refuse_row(talker, 1, 1, 0.0, 1.0)
        assert fault.status is grpc.StatusCode.FAILED_PRECONDITION
        check_fault(
            fault,
            Reason.STEP_OUT_OF_ORDER,
            STEPS,
            "not answered yet",
            "that one again",
            "got step 1",
        )
        server.publish(2)
        assert actions_of(first.result().groups[0]) == [0]
        assert talker.step(1, 0) == 0
        assert server.ledger()["received"] == 0


def test_answer_of_a_repeat_is_not_a_later_steps_action():
    """The repeat waits beside another episode's held row, and meanwhile its own goes on."""
    with serving(action_space=MANY_ACTIONS, hold=True) as server, Talker(server.address) as talker:
        evaluated = [pb.EpisodeStart(episode=1, evaluation=True)]  # never held
        server.publish(1, action=11)
        assert talker.step(1, 0, starts=evaluated) == 11
        slow = talker.begin(rows([1, 2], [0, 0], seen(0, 0)))
        eventually(lambda: server.server.stats()["requests_waiting"] == 1)
        server.policies._current = CountingPolicy(2, MANY_ACTIONS, 22)  # releases nothing
        assert talker.step(1, 1) == 22
        server.publish(3, action=33)
        assert actions_of(slow.result().groups[0]) == [11, 33]


@pytest.mark.parametrize("step", [0, 2, 4, 2**63])
def test_step_out_of_order_is_refused_naming_the_next_one(step):
    with serving() as server, Talker(server.address) as talker:
        talker.step(1, 0)
        talker.step(1, 1)
        if step == 2:
            talker.step(1, 2)
            step = 1
        fault = refuse_row(talker, 1, step)
        assert fault.status is grpc.StatusCode.FAILED_PRECONDITION
        check_fault(fault, Reason.STEP_OUT_OF_ORDER, STEPS, "expected", f"got step {step}")


def test_rows_of_one_episode_twice_in_one_message_get_one_action():
    with serving(action_space=MANY_ACTIONS) as server, Talker(server.address) as talker:
        server.policies.publish(EchoPolicy())
        answer = talker.act(rows([1, 1], [0, 0], seen(4, 4))).groups[0]
        assert actions_of(answer) == [400, 400]
        answer = talker.act(rows([1, 1], [1, 2], seen(4, 4))).groups[0]
        assert actions_of(answer) == [401, 0]
        check_fault(
            faults_of(answer)[1], Reason.STEP_OUT_OF_ORDER, "groups[0].steps[1]", "not answered yet"
        )


def test_reward_at_the_first_step_is_refused():
    with serving() as server, Talker(server.address) as talker:
        fault = refuse_row(talker, 1, 0, 0.0, 1.0)
        check_fault(fault, Reason.STEP_OUT_OF_ORDER, "groups[0].rewards[0]", "expected reward 0")
        assert server.server.stats()["episodes_open"] == 0


# Ends.


@pytest.mark.parametrize("end", [TERMINATED, TRUNCATED, ABANDONED])
def test_repeat_of_an_end_is_acknowledged_and_trained_once(end):
    with serving() as server, Talker(server.address) as talker:
        talker.step(1, 0)
        talker.step(1, 1, 0.0, 1.0)
        for _ in range(3):
            assert talker.step(1, 2, 0.0, 1.0, end) is None
        ledger = server.ledger()
        assert ledger["received"] == (1 if end == ABANDONED else 2)
        assert server.unaccounted() == 0
        chunks = server.collect(2, timeout_s=0.1)
        assert sum(chunk.steps for chunk in chunks) == (0 if end == ABANDONED else 2)


SECOND_ENDS = {
    "other status": (2, TRUNCATED),
    "later": (3, TERMINATED),
    "earlier": (1, TERMINATED),
    "abandoned": (2, ABANDONED),
    "acting on": (3, RUNNING),
    "acting at the end": (2, RUNNING),
    "acting before it": (1, RUNNING),
    "starting anew": (0, RUNNING),
}


@pytest.mark.parametrize("case", SECOND_ENDS)
def test_anything_else_after_the_end_is_a_failed_precondition(case):
    step, status = SECOND_ENDS[case]
    with serving() as server, Talker(server.address) as talker:
        talker.play(1, 2)
        before = server.ledger()
        fault = refuse_row(talker, 1, step, 0.0, 1.0 if step else 0.0, status)
        assert fault.status is grpc.StatusCode.FAILED_PRECONDITION
        check_fault(fault, Reason.EPISODE_ENDED, STEPS, "episode 1 has ended", "new number")
        assert server.ledger() == before


def test_end_out_of_order_is_refused_and_the_episode_goes_on():
    with serving() as server, Talker(server.address) as talker:
        talker.step(1, 0)
        for step in (0, 2):
            fault = refuse_row(talker, 1, step, status=TERMINATED)
            check_fault(fault, Reason.STEP_OUT_OF_ORDER, STEPS, "its end at step 1", f"step {step}")
        talker.step(1, 1)
        assert server.server.stats()["episodes_open"] == 1


def test_episode_that_ends_before_its_first_action_leaves_nothing():
    with serving() as server, Talker(server.address) as talker:
        for episode, end in enumerate((TERMINATED, TRUNCATED, ABANDONED), start=1):
            assert talker.step(episode, 0, status=end) is None
        assert server.ledger() == {"received": 0, "delivered": 0, "held": 0}
        assert server.server.stats()["episodes_open"] == 0


def test_unknown_episode_is_not_found_with_the_likely_causes():
    with serving() as server, Talker(server.address) as talker:
        for status in (RUNNING, TERMINATED, TRUNCATED, ABANDONED):
            fault = refuse_row(talker, 9, 3, status=status)
            assert fault.status is NOT_FOUND
            check_fault(
                fault, Reason.UNKNOWN_EPISODE, STEPS, "9", "never started", "expired", "restarted"
            )
        assert server.server.stats()["episodes_open"] == 0


def test_abandoned_episode_teaches_nothing_and_reports_nothing():
    with serving() as server, Talker(server.address) as talker:
        talker.play(1, 3, end=ABANDONED)
        assert server.ledger() == {
            "received": 2, "delivered": 0, "discarded_abandoned": 2, "held": 0
        }  # fmt: skip
        assert server.collect(timeout_s=0.05) == []
