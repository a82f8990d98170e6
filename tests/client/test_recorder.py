"""Steps become columns, and columns chunks: nothing is lost or doubled at a cut."""

from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest

from client_sdk.errors import LimitExceededError
from client_sdk.recorder import ChunkFormat, Recording
from client_sdk.rows import EpisodeOptions, Status
from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.batches import SpaceCodec
from client_sdk.wire.tensors import tensor_from_proto

SPACE = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
CODEC = SpaceCodec(SPACE)
OLD = SimpleNamespace(policy_id="p", version=1, sha256=b"old")
NEW = SimpleNamespace(policy_id="p", version=2, sha256=b"new")


def recording(n=1, max_message_bytes=0, max_request_steps=0):
    return Recording(ChunkFormat(CODEC, max_message_bytes, max_request_steps), n, EpisodeOptions())


def observe(steps, *values, rewards=0.0):
    steps.observe({"": np.repeat(np.array(values, np.float32)[:, None], 2, axis=1)}, rewards)


def act(steps, *actions, policy=OLD):
    logps = {"action_logp": -np.array(actions, np.float32)}
    steps.acted(policy, {"": np.array(actions, np.int64)}, logps)


def told(cut):
    """What a chunk says, in numbers."""
    chunk = pb.Chunk.FromString(cut.data)
    if not cut.steps:
        return [], [], []
    columns = CODEC.decode(chunk.observations, cut.steps + 1, "observations")
    actions = tensor_from_proto(chunk.actions.leaves[""])
    rewards = tensor_from_proto(chunk.rewards)
    logps = tensor_from_proto(chunk.outputs["action_logp"])
    assert logps.tolist() == (-actions).tolist()
    assert len(actions) == len(rewards) == cut.steps
    return columns[""][:, 0].tolist(), actions.tolist(), rewards.tolist()


def test_an_episode_is_one_chunk_with_its_final_observation():
    steps = recording()
    for step in range(3):
        observe(steps, step, rewards=10 * step)
        act(steps, step)
    observe(steps, 3, rewards=30)
    chunk = steps.end(0, Status.TERMINATED)
    assert told(chunk) == ([0, 1, 2, 3], [0, 1, 2], [10, 20, 30])
    message = pb.Chunk.FromString(chunk.data)
    assert (message.first_step, message.status) == (0, pb.STEP_STATUS_TERMINATED)
    assert (message.policy_id, message.policy_version, message.policy_sha256) == ("p", 1, b"old")


def test_chunks_join_where_they_were_cut():
    steps = recording()
    cut = []
    for step in range(100):
        observe(steps, step, rewards=step)
        if step % 7 == 0:
            cut += steps.cut()
        act(steps, step)
        if step % 11 == 0:
            cut += steps.cut()
    observe(steps, 100, rewards=100)
    cut.append(steps.end(0, Status.TRUNCATED))
    next_step = 0
    actions, rewards = [], []
    for chunk in cut:
        assert chunk.first_step == next_step
        observations, more_actions, more_rewards = told(chunk)
        assert observations == list(range(next_step, next_step + chunk.steps + 1))
        next_step += chunk.steps
        actions += more_actions
        rewards += more_rewards
    assert actions == list(range(100))
    assert rewards == list(range(1, 101))


def test_a_step_whose_outcome_is_not_known_is_not_cut():
    steps = recording()
    assert steps.cut() == []
    observe(steps, 0)
    assert steps.cut() == []
    act(steps, 5)
    assert steps.cut() == []
    observe(steps, 1, rewards=1)
    (chunk,) = steps.cut()
    assert told(chunk) == ([0, 1], [5], [1])


def test_each_chunk_names_the_policy_that_chose_its_actions():
    steps = recording()
    observe(steps, 0)
    act(steps, 0)
    observe(steps, 1)
    assert steps.continues(OLD, logged=False)
    assert not steps.continues(NEW, logged=False)
    (first,) = steps.cut()
    act(steps, 1, policy=NEW)
    observe(steps, 2)
    second = steps.end(0, Status.TERMINATED)
    named = [pb.Chunk.FromString(chunk.data).policy_sha256 for chunk in (first, second)]
    assert named == [b"old", b"new"]


def test_rows_of_a_vector_step_are_episodes_of_their_own():
    steps = recording(2)
    observe(steps, 0, 100)
    act(steps, 0, 0)
    observe(steps, 1, 101, rewards=[1, 2])
    ended = steps.end(0, Status.TERMINATED)
    assert steps.begins.tolist() == [True, False]
    act(steps, 77, 1)  # the first of them means nothing
    observe(steps, 50, 102, rewards=[99, 3])
    act(steps, 2, 2)
    observe(steps, 51, 103, rewards=[4, 5])
    rest = steps.cut()
    assert told(ended) == ([0, 1], [0], [1])
    assert [told(chunk) for chunk in rest] == [
        ([50, 51], [2], [4]),
        ([100, 101, 102, 103], [0, 1, 2], [2, 3, 5]),
    ]
    assert rest[0].lineage is not ended.lineage
    assert [chunk.first_step for chunk in rest] == [0, 0]


def test_a_row_that_ended_when_all_are_cut_begins_anew_behind_it():
    steps = recording(2)
    observe(steps, 0, 100)
    act(steps, 0, 0)
    observe(steps, 1, 101)
    steps.end(0, Status.TERMINATED)
    steps.cut()
    act(steps, 77, 1)
    observe(steps, 50, 102)
    act(steps, 2, 2)
    observe(steps, 51, 103)
    assert [(chunk.first_step, told(chunk)[0]) for chunk in steps.cut()] == [
        (0, [50, 51]),
        (1, [101, 102, 103]),
    ]


def test_an_episode_without_a_step_is_no_chunk():
    steps = recording()
    observe(steps, 0)
    assert steps.end(0, Status.TERMINATED) is None


def test_a_cleared_recording_begins_anew():
    steps = recording()
    for step in range(40):
        observe(steps, step, rewards=1)
        act(steps, step)
    steps.cut()
    observe(steps, 40, rewards=1)
    before = steps.end(0, Status.TERMINATED)
    steps.clear()
    observe(steps, 7, rewards=100)
    assert steps.begins.tolist() == [False]
    act(steps, 3, policy=NEW)
    observe(steps, 8, rewards=5)
    after = steps.end(0, Status.TRUNCATED)
    assert told(after) == ([7, 8], [3], [5])
    assert after.lineage is not before.lineage
    message = pb.Chunk.FromString(after.data)
    assert (message.first_step, message.policy_version) == (0, 2)


def test_only_what_a_server_may_know_is_taken_back():
    steps = recording()
    observe(steps, 0)
    act(steps, 0)
    observe(steps, 1)
    assert steps.abandon(0) is None
    act(steps, 1)
    observe(steps, 10)
    act(steps, 2)
    observe(steps, 11)
    (sent,) = steps.cut()
    assert told(sent)[0] == [10, 11]
    act(steps, 3)
    back = steps.abandon(0)
    assert (back.steps, back.first_step, back.status) == (0, 1, Status.ABANDONED)
    assert back.lineage is sent.lineage


def test_a_missing_final_observation_is_the_last_one_again():
    steps = recording()
    observe(steps, 4)
    act(steps, 0)
    steps.observe_again(1.0)
    assert told(steps.end(0, Status.TERMINATED)) == ([4, 4], [0], [1])


def test_chunks_stay_within_the_servers_limits():
    steps = recording(max_request_steps=5)
    for step in range(6):
        assert not steps.full
        observe(steps, step)
        act(steps, step)
    assert steps.full
    (chunk,) = steps.cut()
    assert chunk.steps == 5

    limit = 20_000
    steps = recording(max_message_bytes=limit)
    step = 0
    while not steps.full:
        observe(steps, step)
        act(steps, step)
        step += 1
    (chunk,) = steps.cut()
    assert chunk.steps > 1
    assert len(chunk.data) < limit


def test_an_observation_over_the_limit_is_refused_with_the_setting():
    with pytest.raises(LimitExceededError, match="max_message_bytes"):
        recording(max_message_bytes=4100)
