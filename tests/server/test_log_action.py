"""The application's own actions: put into the policy's terms, marked, and checked."""

from __future__ import annotations

import grpc
import gymnasium as gym
import numpy as np
import pytest
from ray.rllib.utils.spaces.space_utils import normalize_action

from client_sdk.wire.faults import Reason
from tests.server.talk import (
    TERMINATED,
    Talker,
    actions_of,
    check_fault,
    faults_of,
    refused,
    rows,
    seen,
)
from tests.servers import serving

ACTIONS = "groups[0].logged_actions"
LOGPS = "groups[0].logged_logps"
CAR = gym.spaces.Box(
    np.array([-1.0, 0.0, 10.0], np.float32), np.array([1.0, 4.0, 20.0], np.float32)
)


def log(talker: Talker, step: int, actions, logps=(-0.5,), value: float = 0.0, episode: int = 1):
    """One logged row; the answered group."""
    group = rows(
        [episode], [step], seen(value),
        rewards=[float(step > 0)], logged=np.asarray(actions), logged_logps=logps,
    )  # fmt: skip
    return talker.act(group).groups[0]


def test_box_action_is_normalised_as_rllib_does_and_its_density_scaled():
    actions = np.array([[-1.0, 0.0, 10.0], [0.5, 3.0, 12.5], [1.0, 4.0, 20.0]], np.float32)
    with serving(action_space=CAR) as server, Talker(server.address) as talker:
        for step, action in enumerate(actions):
            log(talker, step, action[None], [-1.25])
        talker.step(1, 3, 0.0, 1.0, TERMINATED)
        (chunk,) = server.collect(3)
        for action, (batch, row) in zip(actions, chunk.rows, strict=True):
            normalised = normalize_action(action, CAR)
            np.testing.assert_allclose(batch.actions[""][row], normalised, atol=1e-6)
            assert batch.actions[""].dtype == np.float32
            # d(action) / d(normalised) is (high - low) / 2 in each dimension.
            expected = -1.25 + np.log([1.0, 2.0, 5.0]).sum()
            np.testing.assert_allclose(batch.outputs["action_logp"][row], expected, atol=1e-6)


@pytest.mark.parametrize(
    "space",
    [
        gym.spaces.Box(-np.inf, np.inf, (2,), np.float32),
        gym.spaces.Box(0.0, np.inf, (2,), np.float32),
        gym.spaces.Box(0, 10, (2,), np.int32),
    ],
    ids=["unbounded", "half bounded", "integers"],
)
def test_box_action_that_rllib_does_not_normalise_stays_as_it_is(space):
    action = np.array([[3, 4]], space.dtype)
    with serving(action_space=space) as server, Talker(server.address) as talker:
        log(talker, 0, action)
        log(talker, 1, action)
        (chunk,) = server.collect(1)
        ((batch, row),) = chunk.rows
        assert batch.actions[""][row].tolist() == [3, 4]
        assert batch.outputs["action_logp"][row] == -0.5


def test_discrete_action_is_counted_from_zero():
    space = gym.spaces.Discrete(3, start=5)
    with serving(action_space=space) as server, Talker(server.address) as talker:
        server.publish(2, action=5)
        log(talker, 0, [7])
        log(talker, 1, [5])
        log(talker, 2, [6])
        (chunk,) = server.collect(2)
        assert [batch.actions[""][row] for batch, row in chunk.rows] == [2, 0]
        # As it was executed, and as a repeat of the row is answered.
        assert [batch.env_actions[""][row] for batch, row in chunk.rows] == [7, 5]


def test_multi_discrete_action_is_counted_from_its_starts():
    space = gym.spaces.MultiDiscrete([3, 4], start=[1, -2])
    with serving(action_space=space) as server, Talker(server.address) as talker:
        server.publish(2, action=np.array([1, -2]))
        log(talker, 0, [[3, 1]])
        log(talker, 1, [[1, -2]])
        (chunk,) = server.collect(1)
        ((batch, row),) = chunk.rows
        assert batch.actions[""][row].tolist() == [2, 3]


def test_logged_steps_are_marked_and_keep_what_the_policy_says_of_them():
    with serving() as server, Talker(server.address) as talker:
        server.publish(3, action=0)
        for step in range(6):
            if step in (1, 2, 4):
                assert not log(talker, step, [1], [-0.25]).HasField("actions")
            else:
                talker.step(1, step, 0.0, float(step > 0))
        (chunk,) = server.collect(5)
        assert chunk.logged == [1, 2, 4]
        assert [int(batch.actions[""][row]) for batch, row in chunk.rows] == [0, 1, 1, 0, 1]
        logps = [float(batch.outputs["action_logp"][row]) for batch, row in chunk.rows]
        assert logps == [-0.5, -0.25, -0.25, -0.5, -0.25]
        inputs = [batch.outputs["action_dist_inputs"][row].tolist() for batch, row in chunk.rows]
        assert inputs == [[3.0, 3.0]] * 5


def test_marks_move_along_when_a_chunk_is_cut():
    with serving() as server, Talker(server.address) as talker:
        for step in range(4):
            log(talker, step, [1])
        server.collect(3)
        talker.step(1, 4, 0.0, 1.0)
        log(talker, 5, [1])
        talker.step(1, 6, 0.0, 1.0)
        (chunk,) = server.collect(3)
        assert (chunk.first_step, chunk.logged) == (3, [0, 2])


def test_repeated_logged_step_counts_once():
    with serving() as server, Talker(server.address) as talker:
        for step in (0, 0, 1, 1, 1, 2):
            assert not log(talker, step, [1]).faults
        assert server.ledger()["received"] == 2
        (chunk,) = server.collect(2)
        assert chunk.logged == [0, 1]


def test_logged_and_asked_rows_share_a_message():
    with serving() as server, Talker(server.address) as talker:
        answer = talker.act(
            rows([1], [0], seen(1), logged=np.array([1]), logged_logps=[-0.5]),
            rows([2], [0], seen(2)),
        )
        assert not answer.groups[0].HasField("actions")
        assert actions_of(answer.groups[1]) == [0]
        assert {tuple(asked[""][:, 0]) for asked in server.policies.current.asked} == {(1,), (2,)}


def test_missing_logp_is_refused_where_the_algorithm_needs_it():
    with serving(need_logp=True) as server, Talker(server.address) as talker:
        code = grpc.StatusCode.FAILED_PRECONDITION
        with refused(code, Reason.LOGP_REQUIRED, LOGPS, "log_action needs logp="):
            log(talker, 0, [1], [])
        assert server.server.stats()["episodes_open"] == 0
        assert not log(talker, 0, [1]).faults


def test_missing_logp_is_fine_where_the_algorithm_does_not_need_it():
    with serving(need_logp=False) as server, Talker(server.address) as talker:
        log(talker, 0, [1], [])
        log(talker, 1, [1], [-0.25])
        log(talker, 2, [1], [])
        (chunk,) = server.collect(2)
        assert [float(b.outputs["action_logp"][row]) for b, row in chunk.rows] == [-0.5, -0.25]


BAD_ACTIONS = {
    "NaN": ([np.nan, 1, 15], Reason.NOT_FINITE, ("finite", "got nan")),
    "infinite": ([0, np.inf, 15], Reason.NOT_FINITE, ("finite", "got inf")),
    "above": ([0, 4.5, 15], Reason.SPACE_MISMATCH, ("expected 0.0 to 4.0 at [1]", "got 4.5")),
    "below": ([0, 1, 9], Reason.SPACE_MISMATCH, ("expected 10.0 to 20.0 at [2]", "got 9.0")),
}


@pytest.mark.parametrize("case", BAD_ACTIONS)
def test_logged_action_outside_its_space_is_refused_alone(case):
    bad, reason, says = BAD_ACTIONS[case]
    good = [0, 1, 15]
    with serving(action_space=CAR) as server, Talker(server.address) as talker:
        actions = np.array([good, bad, good], np.float32)
        answer = talker.act(
            rows([1, 2, 3], [0] * 3, seen(1, 2, 3), logged=actions, logged_logps=[-1.0] * 3)
        ).groups[0]
        assert set(faults_of(answer)) == {1}
        assert answer.faults[0].error.status_code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
        check_fault(faults_of(answer)[1], reason, ACTIONS, *says)
        assert server.server.stats()["episodes_open"] == 2
        assert not log(talker, 0, np.array([good], np.float32), episode=2).faults


@pytest.mark.parametrize("action", [-1, 2, 2**40])
def test_logged_discrete_action_out_of_range_is_refused(action):
    with serving() as server, Talker(server.address) as talker:
        fault = faults_of(log(talker, 0, [action]))[0]
        check_fault(fault, Reason.SPACE_MISMATCH, ACTIONS, "expected 0 to 1", f"got {action}")
        assert server.server.stats()["episodes_open"] == 0


@pytest.mark.parametrize("logp", [np.nan, np.inf, -np.inf, 1e300])
def test_logp_that_is_not_finite_is_refused_alone(logp):
    with serving() as server, Talker(server.address) as talker:
        incidents = server.server.stats()["incidents"]
        answer = talker.act(
            rows([1, 2], [0, 0], seen(1, 2), logged=np.array([1, 1]), logged_logps=[-1.0, logp])
        ).groups[0]
        check_fault(faults_of(answer)[1], Reason.NOT_FINITE, f"{LOGPS}[1]", "log-density", "got")
        assert set(faults_of(answer)) == {1}
        assert server.server.stats()["episodes_open"] == 1
        assert server.server.stats()["incidents"] == incidents
