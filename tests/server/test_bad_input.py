"""Values that are not what the server asks for: told where, what and how to mend it; nothing kept."""

from __future__ import annotations

import grpc
import gymnasium as gym
import numpy as np
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
    faults_of,
    refused,
    rows,
    seen,
)
from tests.servers import serving

INVALID = grpc.StatusCode.INVALID_ARGUMENT
OBSERVATIONS = "groups[0].observations"

CAR = gym.spaces.Dict(
    {
        "camera": gym.spaces.Box(0, 255, (2, 2, 3), np.uint8),
        "speed": gym.spaces.Box(-np.inf, np.inf, (2,), np.float32),
        "gear": gym.spaces.Discrete(3),
    }
)


def car(n: int, **leaves) -> dict[str, np.ndarray]:
    """n good observations, with some leaves replaced."""
    good = {
        "camera": np.zeros((n, 2, 2, 3), np.uint8),
        "speed": np.zeros((n, 2), np.float32),
        "gear": np.zeros(n, np.int64),
    }
    return {path: leaf for path, leaf in {**good, **leaves}.items() if leaf is not None}


@pytest.fixture(scope="module")
def car_server():
    with serving(CAR, first_version=1) as server:
        yield server


@pytest.fixture(scope="module")
def server():
    with serving() as server:
        yield server


def tensor(dtype: int, shape: list[int], size_bytes: int) -> pb.Tensor:
    return pb.Tensor(dtype=dtype, shape=shape, data=bytes(size_bytes))


MALFORMED_REQUESTS = {
    "too few elements": (
        rows([1], [0], np.zeros((1, 3), np.float32)),
        (Reason.SPACE_MISMATCH, OBSERVATIONS, "expected [4], got [3]", "Reshape"),
    ),
    "another rank": (
        rows([1], [0], np.zeros((1, 2, 2), np.float32)),
        (Reason.SPACE_MISMATCH, OBSERVATIONS, "expected [4], got [2, 2]", "Reshape"),
    ),
    "fewer rows than episodes": (
        rows([1, 2], [0, 0], np.zeros((1, 4), np.float32)),
        (Reason.SPACE_MISMATCH, OBSERVATIONS, "expected 2 rows, got 1", "one value per row"),
    ),
    "no row dimension": (
        rows([1], [0], np.zeros((4,), np.float32)),
        (Reason.SPACE_MISMATCH, OBSERVATIONS, "expected", "got"),
    ),
    "bytes missing": (
        rows([1], [0], {"": tensor(pb.DATA_TYPE_FLOAT32, [1, 4], 15)}),
        (Reason.MALFORMED_TENSOR, OBSERVATIONS, "expected 16 bytes", "got 15", "little-endian"),
    ),
    "bytes too many": (
        rows([1], [0], {"": tensor(pb.DATA_TYPE_FLOAT32, [1, 4], 17)}),
        (Reason.MALFORMED_TENSOR, OBSERVATIONS, "expected 16 bytes", "got 17"),
    ),
    "no dtype": (
        rows([1], [0], {"": tensor(pb.DATA_TYPE_UNSPECIFIED, [1, 4], 16)}),
        (Reason.MALFORMED_TENSOR, OBSERVATIONS, "expected a DataType", "got 0"),
    ),
    "unknown dtype": (
        rows([1], [0], {"": pb.Tensor(dtype=99, shape=[1, 4], data=bytes(16))}),
        (Reason.MALFORMED_TENSOR, OBSERVATIONS, "expected a DataType", "got 99"),
    ),
    "negative dimension": (
        rows([1], [0], {"": tensor(pb.DATA_TYPE_FLOAT32, [-1, 4], 16)}),
        (Reason.MALFORMED_TENSOR, OBSERVATIONS, "expected dimensions from 0 up", "[-1, 4]"),
    ),
    "absurd dimensions": (
        rows([1], [0], {"": tensor(pb.DATA_TYPE_FLOAT32, [2**62, 2**62], 16)}),
        (Reason.MALFORMED_TENSOR, OBSERVATIONS, "expected", "got 16"),
    ),
    "leaf under another name": (
        rows([1], [0], {"pixels": np.zeros((1, 4), np.float32)}),
        (Reason.SPACE_MISMATCH, OBSERVATIONS, "unknown leaf 'pixels'", "Expected exactly ''"),
    ),
    "no leaf at all": (
        rows([1], [0], {}),
        (Reason.SPACE_MISMATCH, OBSERVATIONS, "missing leaf ''"),
    ),
    "no observation": (
        rows([1], [0]),
        (Reason.SPACE_MISMATCH, OBSERVATIONS, "RUNNING", "needs an observation"),
    ),
    "truncated without observation": (
        rows([1], [1], statuses=[TRUNCATED]),
        (Reason.SPACE_MISMATCH, OBSERVATIONS, "TRUNCATED", "needs an observation"),
    ),
    "steps missing": (
        rows([1, 2], [0], seen(0, 0)),
        (Reason.MALFORMED_TENSOR, "groups[0].steps", "expected 2 entries", "got 1"),
    ),
    "rewards missing": (
        rows([1, 2], [0, 0], seen(0, 0), rewards=[0.0]),
        (Reason.MALFORMED_TENSOR, "groups[0].rewards", "expected 2 entries", "got 1"),
    ),
    "statuses too many": (
        rows([1], [0], seen(0), statuses=[RUNNING, RUNNING]),
        (Reason.MALFORMED_TENSOR, "groups[0].statuses", "expected 1 entries", "got 2"),
    ),
    "agents too many": (
        rows([1], [0], seen(0), agents=["", ""]),
        (Reason.MALFORMED_TENSOR, "groups[0].agents", "expected 1 entries", "got 2"),
    ),
    "unknown status": (
        rows([1], [0], seen(0), statuses=[17]),
        (Reason.MALFORMED_TENSOR, "groups[0].statuses[0]", "from 0 to 4", "got 17"),
    ),
    "negative status": (
        rows([1], [0], seen(0), statuses=[-1]),
        (Reason.MALFORMED_TENSOR, "groups[0].statuses[0]", "from 0 to 4", "got -1"),
    ),
    "logps without actions": (
        rows([1], [0], seen(0), logged_logps=[-0.5]),
        (Reason.MALFORMED_TENSOR, "groups[0].logged_logps", "without logged_actions", "got 1"),
    ),
    "logps too many": (
        rows([1], [0], seen(0), logged=np.zeros(1, np.int64), logged_logps=[-0.5, -0.5]),
        (Reason.MALFORMED_TENSOR, "groups[0].logged_logps", "expected 1 entries", "got 2"),
    ),
    "logged action of another shape": (
        rows([1], [0], seen(0), logged=np.zeros((1, 2), np.int64), logged_logps=[-0.5]),
        (Reason.SPACE_MISMATCH, "groups[0].logged_actions", "expected", "got"),
    ),
    "fractional logged action": (
        rows([1], [0], seen(0), logged=np.zeros(1, np.float32), logged_logps=[-0.5]),
        (Reason.SPACE_MISMATCH, "groups[0].logged_actions", "expected int64", "got float32"),
    ),
}


@pytest.mark.parametrize("case", MALFORMED_REQUESTS)
def test_malformed_request_is_refused_whole_and_leaves_no_trace(server, case):
    group, (reason, field, *says) = MALFORMED_REQUESTS[case]
    good = rows([7], [0], seen(0))
    before = server.ledger(), server.server.stats()
    asked = len(server.policies.current.asked)
    with Talker(server.address) as talker:
        with refused(INVALID, reason, field, *says):
            talker.act(group)
        # Not even a good group of the same request is recorded: its start would say so.
        with refused(INVALID, reason, field.replace("[0]", "[1]", 1), *says):
            talker.act(good, _second(group))
        after = server.server.stats()
        assert server.ledger() == before[0]
        assert after["episodes_open"] == before[1]["episodes_open"]
        assert after["incidents"] == before[1]["incidents"]
        assert len(server.policies.current.asked) == asked
        # The session and the numbers in it are as good as before.
        assert actions_of(talker.act(good).groups[0]) == [0]
        talker.close_session()


def _second(group: pb.StepRows) -> pb.StepRows:
    """A copy."""
    copy = pb.StepRows()
    copy.CopyFrom(group)
    return copy


@pytest.mark.parametrize("case", MALFORMED_REQUESTS)
def test_malformed_request_on_a_stream_is_told_in_band(server, case):
    group, (reason, field, *says) = MALFORMED_REQUESTS[case]
    with Talker(server.address) as talker:
        stream = talker.stream()
        answer = stream.ask(group)
        assert answer.WhichOneof("outcome") == "error"
        assert answer.error.status_code == INVALID.value[0]
        check_fault(_fault(answer.error), reason, field, *says)
        assert actions_of(stream.ask(rows([1], [0], seen(0))).act.groups[0]) == [0]
        talker.close_session()


def _fault(detail):
    from client_sdk.wire.faults import Fault

    return Fault.from_detail(detail)


ROW_FAULTS = {
    "NaN observation": (
        {"values": [0, np.nan, 0]},
        (Reason.NOT_FINITE, OBSERVATIONS, "expected a finite number", "got nan"),
    ),
    "infinite observation": (
        {"values": [0, -np.inf, 0]},
        (Reason.NOT_FINITE, OBSERVATIONS, "expected a finite number", "got -inf"),
    ),
    "NaN reward": (
        {"rewards": [1, np.nan, 1]},
        (Reason.NOT_FINITE, "groups[0].rewards[1]", "expected a", "finite", "got nan"),
    ),
    "infinite reward": (
        {"rewards": [1, np.inf, 1]},
        (Reason.NOT_FINITE, "groups[0].rewards[1]", "expected a", "finite", "got inf"),
    ),
    "reward beyond float32": (
        {"rewards": [1, 1e300, 1]},
        (Reason.NOT_FINITE, "groups[0].rewards[1]", "finite in float32", "got 1e+300"),
    ),
    "unknown agent": (
        {"agents": ["", "blue", ""]},
        (Reason.UNKNOWN_AGENT, "groups[0].agents[1]", "'blue'", 'one agent, ""'),
    ),
}


@pytest.mark.parametrize("status", [RUNNING, TERMINATED], ids=["running", "last"])
@pytest.mark.parametrize("case", ROW_FAULTS)
def test_bad_row_is_refused_alone_and_its_neighbours_are_served(case, status):
    columns, (reason, field, *says) = ROW_FAULTS[case]
    columns = {"rewards": [1, 1, 1], "statuses": [RUNNING, status, RUNNING], **columns}
    values = columns.pop("values", [0, 0, 0])
    with serving() as server, Talker(server.address) as talker:
        policy = server.publish(2, action=1)
        episodes = [1, 2, 3]
        talker.act(rows(episodes, [0, 0, 0], seen(0, 0, 0)))
        answer = talker.act(rows(episodes, [1, 1, 1], seen(*values), **columns)).groups[0]
        faults = faults_of(answer)
        assert set(faults) == {1}
        assert answer.faults[0].error.status_code == INVALID.value[0]
        check_fault(faults[1], reason, field, *says)
        assert actions_of(answer) == [1, 0, 1]
        # The policy never saw it, and only the neighbours' steps count.
        assert all(np.isfinite(asked[""]).all() for asked in policy.asked)
        assert [len(asked[""]) for asked in policy.asked] == [3, 2]
        assert server.ledger()["received"] == 2
        # The episode goes on where it was, once the row is mended.
        assert talker.step(2, 1, 0.0, 1.0) == 1
        assert server.ledger()["received"] == 3
        assert server.server.stats()["episodes_open"] == 3
        returns = {}
        for episode in episodes:
            talker.step(episode, 2, 0.0, 1.0, TERMINATED)
        for chunk in server.collect(6):
            assert np.isfinite(chunk.rewards).all()
            assert chunk.steps == 2
            returns[chunk.end.episode_return] = chunk
        assert set(returns) == {2.0}


def test_observation_outside_its_box_is_served_for_only_nan_is_refused():
    space = gym.spaces.Box(-1.0, 1.0, (4,), np.float32)
    with serving(space) as server, Talker(server.address) as talker:
        assert talker.step(1, 0, 100.0) == 0


@pytest.mark.parametrize("value", [3, -1, 2**40])
def test_discrete_observation_out_of_range_is_refused_with_the_range(car_server, value):
    group = rows([1, 2], [0, 0], car(2, gear=np.array([0, value])))
    with Talker(car_server.address) as talker:
        answer = talker.act(group).groups[0]
        assert set(faults_of(answer)) == {1}
        check_fault(
            faults_of(answer)[1],
            Reason.SPACE_MISMATCH,
            f'{OBSERVATIONS}["gear"]',
            f"expected 0 to 2, got {value}",
        )
        assert actions_of(answer) == [0, 0]
        talker.close_session()


WRONG_LEAVES = {
    "missing": (car(1, speed=None), ("missing leaf 'speed'", "'camera'", "'gear'")),
    "extra": (car(1, radar=np.zeros(1)), ("unknown leaf 'radar'", "'speed'")),
    "renamed": (
        car(1, speed=None, velocity=np.zeros((1, 2), np.float32)),
        ("missing leaf 'speed'", "unknown leaf 'velocity'"),
    ),
}


@pytest.mark.parametrize("case", WRONG_LEAVES)
def test_dict_observation_with_other_keys_is_refused_by_name(car_server, case):
    observation, says = WRONG_LEAVES[case]
    with (
        Talker(car_server.address) as talker,
        refused(INVALID, Reason.SPACE_MISMATCH, OBSERVATIONS, *says),
    ):
        talker.act(rows([1], [0], observation))


@pytest.mark.parametrize("dtype", [np.float32, np.int16, np.int64])
def test_lossy_cast_is_refused_with_both_dtypes(car_server, dtype):
    observation = car(1, camera=np.zeros((1, 2, 2, 3), dtype))
    with (
        Talker(car_server.address) as talker,
        refused(
            INVALID,
            Reason.SPACE_MISMATCH,
            f'{OBSERVATIONS}["camera"]',
            "expected uint8 [2, 2, 3]",
            f"got {np.dtype(dtype)} [2, 2, 3]",
            "convert before sending",
        ),
    ):
        talker.act(rows([1], [0], observation))


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int32, np.uint8, np.int64])
def test_safe_cast_is_done(dtype):
    with serving() as server, Talker(server.address) as talker:
        talker.act(rows([1], [0], np.full((1, 4), 3, dtype)))
        (asked,) = server.policies.current.asked
        assert asked[""].dtype == np.float32
        assert asked[""].tolist() == [[3, 3, 3, 3]]


def test_cast_that_overflows_is_a_fault_of_its_row():
    with serving() as server, Talker(server.address) as talker:
        observations = np.array([[0.0] * 4, [1e300] * 4])
        answer = talker.act(rows([1, 2], [0, 0], observations)).groups[0]
        check_fault(faults_of(answer)[1], Reason.NOT_FINITE, OBSERVATIONS, "got inf")
        assert actions_of(answer) == [0, 0]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_metric_that_is_not_finite_is_refused_with_its_name(value):
    with serving() as server, Talker(server.address) as talker:
        metrics = pb.EpisodeMetrics(episode=1, values={"goals": value})
        with refused(INVALID, Reason.NOT_FINITE, "metrics[0].values['goals']", "finite", "got"):
            talker.act(rows([1], [0], seen(0)), metrics=[metrics])
        assert server.server.stats()["episodes_open"] == 0


def test_two_agents_rows_are_refused_naming_the_known_agent(server):
    with Talker(server.address) as talker:
        answer = talker.act(rows([1, 1], [0, 0], seen(0, 0), agents=["red", "blue"])).groups[0]
        for index, name in enumerate(["red", "blue"]):
            fault = faults_of(answer)[index]
            check_fault(fault, Reason.UNKNOWN_AGENT, f"groups[0].agents[{index}]", name)
        assert not answer.HasField("actions")


def test_abandoned_row_needs_no_observation(server):
    with Talker(server.address) as talker:
        talker.step(1, 0)
        answer = talker.act(rows([1], [1], statuses=[ABANDONED])).groups[0]
        assert not answer.faults
        talker.close_session()


# Action masks, by RLlib's convention.

MASKED = gym.spaces.Dict(
    {
        "action_mask": gym.spaces.MultiBinary(3),
        "observations": gym.spaces.Box(-np.inf, np.inf, (2,), np.float32),
    }
)


def masked(*masks: list[int]) -> dict[str, np.ndarray]:
    return {
        "action_mask": np.array(masks, np.int8),
        "observations": np.zeros((len(masks), 2), np.float32),
    }


def test_a_mask_that_allows_nothing_is_refused_and_its_neighbour_served():
    with serving(MASKED, gym.spaces.Discrete(3)) as server, Talker(server.address) as talker:
        answer = talker.act(rows([1, 2], [0, 0], masked([0, 0, 0], [0, 1, 0]))).groups[0]
        (row, fault), *others = faults_of(answer).items()
        assert (row, others) == (0, [])
        check_fault(
            fault,
            Reason.SPACE_MISMATCH,
            'groups[0].observations["action_mask"][0]',
            "expected at least one action",
        )
        assert server.server.stats()["episodes_open"] == 1


def test_a_mask_of_the_wrong_length_is_refused():
    with serving(MASKED, gym.spaces.Discrete(3)) as server, Talker(server.address) as talker:
        with refused(
            INVALID, Reason.SPACE_MISMATCH, 'groups[0].observations["action_mask"]', "[3]", "[2]"
        ):
            talker.act(rows([1], [0], masked([1, 1])))
        assert server.server.stats()["episodes_open"] == 0


def test_a_leaf_named_like_a_mask_is_an_observation_where_actions_are_not_counted():
    with serving(MASKED, gym.spaces.Discrete(5)) as server, Talker(server.address) as talker:
        assert not faults_of(talker.act(rows([1], [0], masked([0, 0, 0]))).groups[0])


def test_what_float32_cannot_hold_is_refused_in_a_float64_space():
    wide = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    with serving(wide) as server, Talker(server.address) as talker:
        values = np.array([[1e300, 0.0], [3e38, -3e38]])
        faults = faults_of(talker.act(rows([1, 2], [0, 0], values)).groups[0])
        assert [fault.reason for fault in faults.values()] == [Reason.NOT_FINITE]
        assert list(faults) == [0]
