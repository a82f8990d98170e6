"""Uploads that are wrong, too many, or from a client that dies: refused clearly, nothing lost."""

from __future__ import annotations

import contextlib
import random

import grpc
import gymnasium as gym
import numpy as np
import pytest
import torch
from ray.rllib.connectors.env_to_module import FlattenObservations

from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.faults import Reason
from client_sdk.wire.tensors import tensor_from_proto, tensor_to_proto
from tests.server.exporting import exporting
from tests.server.talk import TERMINATED, batch, check_fault, eventually, program, refused, seen
from tests.server.test_ledger import check_trained_once_and_in_order
from tests.server.test_uploads import faults_in, logged
from tests.server.uploading import Uploader

EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
BOX = gym.spaces.Box(-2, 3, (2,), np.float32)


def put(tensor: pb.Tensor, index, value) -> None:
    """Change one number of a message."""
    array = tensor_from_proto(tensor).copy()
    array[index] = value
    tensor_to_proto(array, tensor)


def cast(tensor: pb.Tensor, dtype) -> None:
    tensor_to_proto(tensor_from_proto(tensor).astype(dtype), tensor)


def drop_row(tensor: pb.Tensor) -> None:
    tensor_to_proto(tensor_from_proto(tensor)[:-1], tensor)


def shorten(tensor: pb.Tensor) -> None:
    tensor.data = tensor.data[:-1]


LOGP = 'outputs["action_logp"]'
INPUTS = 'outputs["action_dist_inputs"]'
MALFORMED, MISMATCH = Reason.MALFORMED_TENSOR, Reason.SPACE_MISMATCH
NOT_FINITE, POLICY = Reason.NOT_FINITE, Reason.POLICY_MISMATCH

# What is done to a good chunk of 10 steps; the fault, where, and its words.
DAMAGES = {
    "observations cut short": (
        lambda c: shorten(c.observations.leaves[""]), MALFORMED, "observations", "bytes"),
    "actions cut short": (lambda c: shorten(c.actions.leaves[""]), MALFORMED, "actions", "bytes"),
    "rewards cut short": (lambda c: shorten(c.rewards), MALFORMED, "rewards", "bytes"),
    "no last observation": (
        lambda c: drop_row(c.observations.leaves[""]), MISMATCH, "observations", "expected 11 rows"),
    "too few actions": (
        lambda c: drop_row(c.actions.leaves[""]), MISMATCH, "actions", "expected 10 rows"),
    "too few logps": (
        lambda c: drop_row(c.outputs["action_logp"]), MISMATCH, LOGP, "expected 10 rows"),
    "no observations": (lambda c: c.ClearField("observations"), MISMATCH, "observations", "leaf"),
    "no actions": (lambda c: c.ClearField("actions"), MISMATCH, "actions", "leaf"),
    "no rewards": (lambda c: c.ClearField("rewards"), MALFORMED, "rewards", "DataType"),
    "no steps": (lambda c: tensor_to_proto(np.zeros(0), c.rewards), MALFORMED, "rewards",
                 "at least one step"),
    "no logps": (lambda c: c.outputs.pop("action_logp"), MISMATCH, LOGP, "got action_dist_inputs"),
    "no outputs": (lambda c: c.outputs.clear(), MISMATCH, LOGP, "got none"),
    "inputs of another shape": (
        lambda c: tensor_to_proto(np.zeros((10, 5), np.float32), c.outputs["action_dist_inputs"]),
        MISMATCH, INPUTS, "expected [4], got [5]"),
    "NaN observed": (
        lambda c: put(c.observations.leaves[""], (10, 2), np.nan), NOT_FINITE, "observations",
        "row 10", "got nan"),
    "NaN reward": (lambda c: put(c.rewards, 3, np.nan), NOT_FINITE, "rewards[3]", "got nan"),
    "reward beyond float32": (lambda c: put(c.rewards, 9, 1e39), NOT_FINITE, "rewards[9]", "1e+39"),
    "infinite action": (
        lambda c: put(c.actions.leaves[""], (4, 1), np.inf), NOT_FINITE, "actions", "row 4"),
    "infinite logp": (
        lambda c: put(c.outputs["action_logp"], 2, -np.inf), NOT_FINITE, f"{LOGP}[2]", "got -inf"),
    "NaN input": (
        lambda c: put(c.outputs["action_dist_inputs"], (7, 3), np.nan), NOT_FINITE,
        f"{INPUTS}[7][3]", "got nan"),
    "unknown agent": (
        lambda c: setattr(c, "agent", "pilot"), Reason.UNKNOWN_AGENT, "agent", "'pilot'"),
    "unknown policy": (lambda c: setattr(c, "policy_id", "pilot"), Reason.UNKNOWN_POLICY,
                       "policy_id", '"default_policy"'),
    "unknown file": (
        lambda c: setattr(c, "policy_sha256", b"\7" * 32), Reason.UNKNOWN_POLICY, "policy_sha256",
        "restart", "Download the policy again"),
    "no file": (
        lambda c: setattr(c, "policy_sha256", b""), Reason.UNKNOWN_POLICY, "policy_sha256",
        "32 bytes", "got 0"),
    "unknown status": (lambda c: setattr(c, "status", 9), MALFORMED, "status", "got 9"),
    "too few environment steps": (
        lambda c: c.env_steps.extend(range(10)), MALFORMED, "env_steps", "expected 11"),
    "environment steps left out": (
        lambda c: c.env_steps.extend([*range(10), 20]), Reason.STEP_OUT_OF_ORDER, "env_steps",
        "consecutive"),
    "started in the middle": (
        lambda c: setattr(c, "first_step", 5), Reason.UNKNOWN_EPISODE, "first_step", "resumed"),
    "another density": (
        lambda c: put(c.outputs["action_logp"], 0, -9.0), POLICY, "actions", "at step 0",
        "says -9", "env_actions"),
    "another distribution": (
        lambda c: put(c.outputs["action_dist_inputs"], (9, 1), 9.0), POLICY, INPUTS, "at step 9",
        "says 9"),
    "other observations": (
        lambda c: put(c.observations.leaves[""], 0, -3.0), POLICY, INPUTS, "at step 0"),
}  # fmt: skip


@pytest.fixture(scope="module")
def box():
    with exporting(None, action_space=BOX) as server:
        yield server


@pytest.mark.parametrize("name", DAMAGES)
def test_bad_chunk_is_refused_alone_and_ends_its_episode(box, name):
    damage, reason, field, *says = DAMAGES[name]
    received, refusals = box.ledger()["received"], box.server.stats()["chunks_refused"]
    incidents = box.server.stats()["incidents"]
    observations = np.random.default_rng(2).normal(size=(11, 4)).astype(np.float32)
    with Uploader(box.address) as client:
        client.fly()
        good = client.chunk(1, 0, observations)
        bad = client.chunk(2, 0, observations)
        damage(bad)
        next_good = client.chunk(1, 10, observations, status=TERMINATED)
        for _ in range(2):  # and a repeat is told the same
            answer = client.upload(good, bad, next_good)
            assert answer.accepted_sequence == 3
            assert set(faults_in(answer)) == {1}
            check_fault(faults_in(answer)[1], reason, f"chunks[1].{field}", *says)
        assert box.ledger()["received"] == received + 20
        follower = client.chunk(2, 10, observations)
        fault = faults_in(client.upload(follower))[0]
        check_fault(fault, Reason.EPISODE_ENDED, "chunks[0].episode", "its chunk 2 was refused")
        assert box.ledger()["received"] == received + 20
        assert box.server.stats()["chunks_refused"] == refusals + 2
        assert box.server.stats()["incidents"] == incidents
        assert box.server.stats()["episodes_open"] == 0
        chunks = box.collect(20)
        assert [chunk.steps for chunk in chunks] == [10, 10]
        for chunk in chunks:
            box.buffer.ledger.deliver(chunk.steps)
            chunk.settle()
        assert client.deliver().delivered_sequence == 4
        assert box.unaccounted() == 0


@pytest.mark.parametrize("name", ["agent", "policy_id", "outputs"])
def test_refused_chunk_is_remembered_in_few_words_whatever_it_holds(box, name):
    with Uploader(box.address) as client:
        client.fly()
        chunk = client.chunk(1, 0, np.zeros((3, 4), np.float32))
        if name == "outputs":
            chunk.outputs["x" * 100_000].CopyFrom(chunk.outputs.pop("action_logp"))
        else:
            setattr(chunk, name, "x" * 100_000)
        (fault,) = client.upload(chunk).faults
        assert len(fault.error.message) < 500
        assert "xxx" in fault.error.message


@pytest.mark.parametrize("steps", [1, 7, 500])
def test_executed_actions_in_place_of_the_policys_own_are_noticed(box, steps):
    observations = np.random.default_rng(4).normal(size=(steps + 1, 4)).astype(np.float32)
    with Uploader(box.address) as client:
        client.fly()
        chunk = client.chunk(1, 0, observations, status=TERMINATED)
        chunk.actions.CopyFrom(batch(client.executed))
        fault = faults_in(client.upload(chunk))[0]
        says = ('"actions", not "env_actions"', "log-density")
        check_fault(fault, POLICY, "chunks[0].actions", *says)


def test_rounding_of_another_runtime_is_no_mismatch():
    with exporting() as server:
        with torch.no_grad():
            *_, bias = server.built.module.pi.parameters()
            bias += torch.tensor([500.0, 0.0])
        server.publish(2)
        with Uploader(server.address) as client:
            client.fly()
            small = (slice(None), 1)  # the logits that are near 0
            rounded = client.chunk(1, 0, seen(0, 1, 2))
            logits = tensor_from_proto(rounded.outputs["action_dist_inputs"])[small]
            put(rounded.outputs["action_dist_inputs"], small, logits + 0.1)
            client.deliver(rounded)
            wrong = client.chunk(2, 0, seen(0, 1, 2))
            put(wrong.outputs["action_dist_inputs"], (1, 1), logits[1] + 2.0)
            fault = faults_in(client.upload(wrong))[0]
            check_fault(fault, POLICY, f"chunks[0].{INPUTS}", "at step 1")


def test_discrete_action_that_the_policy_does_not_have_is_refused():
    with exporting() as server, Uploader(server.address) as client:
        client.fly()
        chunk = client.chunk(1, 0, seen(0, 1, 2))
        put(chunk.actions.leaves[""], 1, 2)
        fault = faults_in(client.upload(chunk))[0]
        check_fault(fault, MISMATCH, "chunks[0].actions", "row 1", "expected 0 to 1", "got 2")


@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_values_of_another_dtype_are_cast_where_nothing_is_lost(dtype):
    with exporting() as server, Uploader(server.address) as client:
        client.fly()
        chunk = client.chunk(1, 0, seen(0, 1, 2), [1, 2])
        cast(chunk.observations.leaves[""], dtype)
        cast(chunk.rewards, np.int16)
        cast(chunk.actions.leaves[""], np.int32)
        client.deliver(chunk)
        (taken,) = server.collect(2)
        assert taken.rewards == [1.0, 2.0]
        made = taken.rows[0][0]
        assert made.observations[""].dtype == np.float32
        assert made.actions[""].dtype == np.int64


def test_lossy_dtype_is_refused():
    space = gym.spaces.Dict({"pixels": gym.spaces.Box(0, 255, (2,), np.uint8)})
    server = exporting(None, space, gym.spaces.Discrete(2), FlattenObservations)
    with server as server, Uploader(server.address) as client:
        client.fly()
        chunk = client.chunk(1, 0, {"pixels": np.zeros((3, 2), np.uint8)})
        cast(chunk.observations.leaves["pixels"], np.float32)
        fault = faults_in(client.upload(chunk))[0]
        check_fault(fault, MISMATCH, 'chunks[0].observations["pixels"]', "uint8", "float32")


def test_gap_within_an_episode_is_refused_and_what_came_before_is_learnt():
    with exporting() as server, Uploader(server.address) as client:
        client.fly()
        client.deliver(client.chunk(1, 0, seen(0, 1, 2)))
        fault = faults_in(client.upload(client.chunk(1, 3, seen(3, 4))))[0]
        says = ("episode 1 is at step 2", "got one from step 3")
        check_fault(fault, Reason.STEP_OUT_OF_ORDER, "chunks[0].first_step", *says)
        steps, end = server.collect(2)
        assert (steps.steps, end.steps) == (2, 0)
        assert (end.truncated, end.end.reported) == (True, False)


def test_chunk_after_the_end_is_refused():
    with exporting() as server, Uploader(server.address) as client:
        client.fly()
        client.deliver(client.chunk(1, 0, seen(0, 1), status=TERMINATED))
        fault = faults_in(client.upload(client.chunk(1, 1, seen(1, 2))))[0]
        check_fault(fault, Reason.EPISODE_ENDED, "chunks[0].episode", "new number")


# Policies of the past.


def test_policy_that_is_no_longer_kept_is_taken_without_a_check():
    with exporting(policies_kept=2) as server, Uploader(server.address) as client:
        client.fly()
        chunk = client.chunk(1, 0, seen(0, 1, 2))
        put(chunk.outputs["action_logp"], 0, -9.0)
        for version in (2, 3):
            server.publish(version)
        client.deliver(chunk)
        fault = faults_in(client.upload(logged(client, [1], [-0.5])))[0]
        says = ("policies_kept", "newest policy")
        check_fault(fault, Reason.STALE_POLICY, "chunks[0].policy_sha256", *says)


def test_policy_that_is_no_longer_remembered_is_stale():
    with exporting(policies_remembered=2) as server, Uploader(server.address) as client:
        client.fly()
        chunk = client.chunk(1, 0, seen(0, 1, 2))
        for version in (2, 3):
            server.publish(version)
        fault = faults_in(client.upload(chunk))[0]
        says = ("version 1 is too old", "newest is 3", "policies_remembered")
        check_fault(fault, Reason.STALE_POLICY, "chunks[0].policy_sha256", *says)


def test_older_version_of_another_server_is_told_from_one_that_was_forgotten():
    with exporting(first_version=50) as server, Uploader(server.address) as client:
        client.fly()
        foreign = client.chunk(1, 0, seen(0, 1), policy_sha256=b"7" * 32, policy_version=49)
        fault = faults_in(client.upload(foreign))[0]
        says = ("another server's", "version 49 was named")
        check_fault(fault, Reason.UNKNOWN_POLICY, "chunks[0].policy_sha256", *says)


def test_upload_waits_for_the_first_policy():
    with exporting(first_version=None) as server, Uploader(server.address) as client:
        assert client.deliver().policy_version == 0  # without chunks it waits for nothing
        server.publish(1)
        client.fly()
        chunk = client.chunk(1, 0, seen(0, 1))
        model = server.policies.current
    with exporting(first_version=None) as server, Uploader(server.address) as client:
        upload = client.begin_upload(chunk)
        eventually(lambda: server.server.stats()["downloads_waiting"] == 1)
        server.policies.publish(model)
        assert not upload.result().faults
        assert [chunk.steps for chunk in server.collect(1)] == [1]


def test_upload_waits_for_the_policy_of_a_checkpoint_that_is_being_restored():
    with exporting() as server, Uploader(server.address) as client:
        server.publish(3)
        client.fly()
        chunk = client.chunk(1, 0, seen(0, 1))
        model = server.policies.current
    with exporting(first_version=1) as server, Uploader(server.address) as client:
        upload = client.begin_upload(chunk)
        eventually(lambda: server.server.stats()["downloads_waiting"] == 1)
        server.policies.publish(model)
        assert not upload.result().faults
        assert [chunk.steps for chunk in server.collect(1)] == [1]


def test_upload_that_waits_too_long_for_the_first_policy_has_left_nothing(monkeypatch):
    monkeypatch.setattr("policy_server.local._FIRST_POLICY_WAIT_S", 0.05)
    with exporting() as other, Uploader(other.address) as client:
        client.fly()
        chunk = client.chunk(1, 0, seen(0, 1))
    with exporting(first_version=None) as server, Uploader(server.address) as client:
        with refused(grpc.StatusCode.UNAVAILABLE, Reason.NOT_READY, "", "no policy yet"):
            client.upload(chunk)
        server.policies.publish(other.policies.current)
        client.deliver(chunk)
        assert [chunk.steps for chunk in server.collect(1)] == [1]


# Limits.


def test_steps_of_one_request_are_limited():
    with exporting(max_rows_per_request=10) as server, Uploader(server.address) as client:
        client.fly()
        chunks = [client.chunk(n, 0, seen(*range(6))) for n in (1, 2, 3)]
        with refused(EXHAUSTED, Reason.LIMIT_EXCEEDED, "chunks", "max_rows_per_request=10", "15"):
            client.upload(*chunks)
        assert server.ledger()["received"] == 0
        client.deliver(*chunks[:2])
        client.deliver(chunks[2])


def test_open_episodes_are_limited_and_nothing_is_lost_by_it():
    settings = {"max_open_episodes_per_session": 2}
    with exporting(**settings) as server, Uploader(server.address) as client:
        client.fly()
        chunks = [client.chunk(n, 0, seen(0, 1)) for n in (1, 2, 3)]
        with refused(EXHAUSTED, Reason.LIMIT_EXCEEDED, "", "max_open_episodes_per_session=2"):
            client.upload(*chunks)
        assert server.ledger()["received"] == 0
        client.deliver(*chunks[:2])
        with refused(EXHAUSTED, Reason.LIMIT_EXCEEDED, "", "max_open_episodes_per_session=2"):
            client.upload(chunks[2])
        client.sequence = 2
        client.deliver(client.chunk(1, 1, seen(1, 2), status=TERMINATED))
        client.deliver(client.chunk(3, 0, seen(0, 1)))


def test_short_episodes_that_end_within_a_request_are_as_many_as_there_are():
    settings = {"max_open_episodes_per_session": 1}
    with exporting(**settings) as server, Uploader(server.address) as client:
        client.fly()
        numbers = range(1, 11)
        client.deliver(
            *[client.chunk(n, 0, seen(0, 1), status=TERMINATED) for n in numbers],
            starts=[pb.EpisodeStart(episode=n, label=str(n)) for n in numbers[:1]],
        )
        assert len(server.collect(10)) == 10


def test_label_is_kept_for_logs():
    with exporting() as server, Uploader(server.address) as client:
        client.fly()
        client.deliver(
            client.chunk(1, 0, seen(0, 1)), starts=[pb.EpisodeStart(episode=1, label="x" * 1000)]
        )
        (chunk,) = server.collect(1)
        assert chunk.identity.label == "x" * 256


# Conservation.

CLIENT = """
import itertools, random, sys
import numpy as np
from client_sdk.wire import policyserver_pb2 as pb
from tests.server.talk import ABANDONED, RUNNING, TERMINATED
from tests.server.uploading import Uploader
address, name = sys.argv[1], int(sys.argv[2])
luck = random.Random(name)
client = Uploader(address)
count = itertools.count()
client.fly()
row = lambda episode, step: [float(x) for x in (name, next(count), episode, step)]
for episode in itertools.count(1):
    step, trail = 0, [row(episode, 0)]
    evaluation = luck.random() < 0.1
    while True:
        trail = [trail[-1], *(row(episode, step + i + 1) for i in range(luck.randrange(1, 12)))]
        status = luck.choice([RUNNING, RUNNING, TERMINATED, ABANDONED])
        chunk = client.chunk(episode, step, np.array(trail, np.float32), status=status)
        if luck.random() < 0.05:
            chunk.rewards.data = b""
        for _ in range(1 + luck.randrange(3) // 2):
            answer = client.upload(
                chunk, starts=[pb.EpisodeStart(episode=episode, evaluation=evaluation)]
            )
            assert answer.accepted_sequence == client.sequence
        step += len(trail) - 1
        if luck.random() < 0.1:
            client.fly()
        if status != RUNNING or answer.faults:
            break
"""


@pytest.mark.parametrize("when_full", ["wait", "discard"])
def test_nothing_is_lost_or_doubled_when_uploading_clients_are_killed(when_full):
    luck = random.Random(3)
    chunks = []

    def sample() -> None:
        for chunk in server.collect(100, 0.05):
            chunks.append(chunk)
            if luck.random() < 0.2:
                server.buffer.ledger.discard("stale", chunk.steps)
            else:
                server.buffer.ledger.deliver(chunk.steps)
            chunk.settle()

    with (
        # Longer than a busy machine leaves a client alone: what has lost its session ends.
        exporting(lease_s=3.0, capacity_steps=300, when_full=when_full) as server,
        contextlib.ExitStack() as stack,
    ):
        clients = []
        for name in range(3):
            clients.append(program(CLIENT, server.address, name))
            stack.enter_context(clients[-1])
            stack.callback(clients[-1].kill)
        eventually(lambda: server.server.sessions == 3, within_s=60)
        version = 1
        while clients:
            target = server.ledger()["received"] + 500
            while server.ledger()["received"] < target:
                assert all(client.poll() is None for client in clients)
                version += 1
                server.publish(version)
                sample()
            clients.pop(luck.randrange(len(clients))).kill()
        eventually(lambda: server.server.sessions == 0, within_s=20)
        while server.ledger()["held"]:
            sample()
        ledger = server.ledger()
        assert server.unaccounted() == 0
        assert ledger["received"] >= 1500
        assert ledger["discarded_evaluation"] > 0
        assert ledger["discarded_abandoned"] > 0
        sampled = sum(chunk.steps for chunk in chunks)
        assert sampled == ledger["delivered"] + ledger["discarded_stale"]
        check_trained_once_and_in_order([c for c in chunks if c.training], gaps=True)
