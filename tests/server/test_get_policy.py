"""Policy files for clients that act alone: what is downloaded, when, and by whom."""

from __future__ import annotations

import contextlib
import time

import grpc
import gymnasium as gym
import numpy as np
import pytest
from ray.rllib.algorithms.ppo import PPOConfig

from client_sdk.onnx_policy import OnnxPolicy
from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.faults import Reason
from tests.server.exporting import exporting
from tests.server.talk import Talker, check_fault, eventually, fault_in, refused, rows, seen
from tests.server.uploading import Uploader
from tests.servers import serving

PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


@pytest.fixture(scope="module")
def server():
    with exporting() as server:
        yield server


# Opening.


def test_local_session_is_told_how_to_upload():
    with (
        exporting(hold=True, steps_per_upload=77, first_version=3) as server,
        Uploader(server.address, connect=False) as client,
    ):
        told = client.open()
        assert (told.steps_per_upload, told.holds, told.policy_version) == (77, True, 3)
        assert told.agents[""].policy_id == "default_policy"
        with Talker(server.address, connect=False) as remote:
            told = remote.open()
            assert (told.steps_per_upload, told.holds) == (0, False)


def test_many_clients_that_are_held_upload_less_at_a_time():
    settings = {"steps_per_upload": 50, "capacity_steps": 200}
    with exporting(hold=True, **settings) as server, contextlib.ExitStack() as stack:
        told = []
        for _ in range(8):
            client = stack.enter_context(Uploader(server.address, connect=False))
            told.append(client.open().steps_per_upload)
        assert told == [50, 50, 50, 50, 40, 33, 28, 25]
    with exporting(**settings) as server, contextlib.ExitStack() as stack:
        for _ in range(8):
            client = stack.enter_context(Uploader(server.address, connect=False))
            assert client.open().steps_per_upload == 50


def test_local_session_is_refused_with_the_reason_where_the_policy_has_no_file():
    says = ("remote inference only", "made for tests", "INFERENCE_MODE_REMOTE")
    with serving() as server, Talker(server.address) as remote:
        with (
            Uploader(server.address, connect=False) as client,
            refused(PRECONDITION, Reason.NO_LOCAL_INFERENCE, "inference_mode", *says),
        ):
            client.open()
        with refused(PRECONDITION, Reason.NO_LOCAL_INFERENCE, "", *says):
            next(remote.stub.GetPolicy(pb.GetPolicyRequest(session_id=remote.session_id)))


def test_rows_in_a_local_session_are_refused_but_heartbeats_are_not(server):
    with Uploader(server.address) as client:
        with refused(PRECONDITION, Reason.WRONG_MODE, "session_id", "UploadEpisodes"):
            client.act(rows([1], [0], seen(0)))
        with refused(PRECONDITION, Reason.WRONG_MODE, "session_id"):
            client.act(starts=[pb.EpisodeStart(episode=1)])
        client.act()


def test_uploads_in_a_remote_session_are_refused(server):
    with (
        Talker(server.address) as client,
        refused(PRECONDITION, Reason.WRONG_MODE, "session_id"),
    ):
        client.stub.UploadEpisodes(pb.UploadEpisodesRequest(session_id=client.session_id))


def test_session_is_resumed_in_its_own_mode_only(server):
    with Uploader(server.address) as client:
        assert client.open(session_id=client.session_id).session_id == client.session_id
        with refused(PRECONDITION, Reason.WRONG_MODE, "inference_mode", "local", "remote"):
            client.open(session_id=client.session_id, inference_mode=pb.INFERENCE_MODE_REMOTE)


# Downloading.


def test_downloaded_file_is_what_serves_remote_clients(server):
    with Uploader(server.address) as client:
        got = client.download().check()
        assert got.model == server.policies.current.model
        assert got.header.policy_id == "default_policy"
        assert got.header.policy_version == server.policies.current.version
        policy = OnnxPolicy(got.model)
        assert policy.version == server.policies.current.version
        actions, _, outputs = policy.act({"": seen(0.1, 0.2)}, np.zeros(2, np.bool_))
        assert set(actions[""].tolist()) <= {0, 1}
        assert set(outputs) == {"action_logp", "action_dist_inputs"}


def test_header_alone_is_sent_to_whoever_has_the_file(server):
    with Uploader(server.address) as client:
        first = client.download().check()
        again = client.download(first.header.sha256)
        assert again.pieces == []
        assert again.header.size_bytes == 0
        assert again.header.sha256 == first.header.sha256
        assert again.header.policy_version == first.header.policy_version


@pytest.mark.parametrize("have", [b"x", b"\0" * 32, b"y" * 1000])
def test_whoever_has_another_file_gets_the_newest_at_once(server, have):
    with Uploader(server.address) as client:
        client.download(have, 100.0).check()


def test_large_file_comes_in_pieces_that_every_client_can_receive():
    algorithm = PPOConfig().rl_module(model_config={"fcnet_hiddens": [512, 512]})
    with exporting(algorithm) as server, Uploader(server.address) as client:
        got = client.download().check()
        assert len(got.pieces) > 2
        assert max(map(len, got.pieces)) <= 2**20


def test_policy_of_another_name_is_unknown(server):
    with Uploader(server.address) as client:
        client.download(policy_id="default_policy").check()
        code = grpc.StatusCode.NOT_FOUND
        says = ("'pilot'", '"default_policy"')
        with refused(code, Reason.UNKNOWN_POLICY, "policy_id", *says):
            client.download(policy_id="pilot")


def test_unknown_session_gets_nothing(server):
    with Uploader(server.address, connect=False) as client:
        client.session_id = "nobody"
        code = grpc.StatusCode.NOT_FOUND
        with refused(code, Reason.UNKNOWN_SESSION, "session_id"):
            client.download()


# Waiting.


def test_call_waits_for_another_file_and_brings_it():
    with exporting() as server, Uploader(server.address) as client:
        first = client.download()
        call = client.asking(first.header.sha256, wait_s=15)
        holding_calls(server, 1)
        policy = server.publish(2)
        assert next(call).header.sha256 == policy.sha256
        assert b"".join(part.piece for part in call) == policy.model


def holding_calls(server, calls):
    """Until so many calls wait for another policy."""
    eventually(lambda: server.server.stats()["downloads_waiting"] == calls)


def test_everyone_who_waits_is_told_of_one_version_once():
    with exporting() as server, Uploader(server.address) as client:
        have = client.download().header.sha256
        calls = [client.asking(have, wait_s=15) for _ in range(50)]
        holding_calls(server, 50)
        policy = server.publish(2)
        for call in calls:
            parts = list(call)
            assert parts[0].header.sha256 == policy.sha256
            assert b"".join(part.piece for part in parts[1:]) == policy.model
        holding_calls(server, 0)


def test_call_that_waits_in_vain_ends_with_the_header_alone(server):
    with Uploader(server.address) as client:
        have = client.download().header.sha256
        got = client.download(have, 0.05)
        assert (got.header.size_bytes, got.header.sha256, got.pieces) == (0, have, [])


def test_negative_wait_is_none(server):
    with Uploader(server.address) as client:
        have = client.download().header.sha256
        assert client.download(have, -5.0).header.size_bytes == 0


def test_before_the_first_weights_there_is_nothing_to_download_but_to_wait_for():
    with exporting(first_version=None) as server, Uploader(server.address) as client:
        with refused(UNAVAILABLE, Reason.NOT_READY, "", "no policy yet", "ask again") as found:
            client.download()
        assert found[0].retry_after_s is not None
        call = client.asking(wait_s=15)
        holding_calls(server, 1)
        policy = server.publish(0)
        assert next(call).header.sha256 == policy.sha256


def test_call_that_waits_keeps_the_lease():
    with exporting(lease_s=0.3) as server, Uploader(server.address) as client:
        have = client.download().header.sha256
        assert client.download(have, 1.0).header.size_bytes == 0
        assert server.server.sessions == 1
        client.act()


def test_cancelled_call_leaves_nothing_behind():
    with exporting(lease_s=0.3) as server, Uploader(server.address) as client:
        have = client.download().header.sha256
        call = client.asking(have, wait_s=15)
        holding_calls(server, 1)
        call.cancel()
        holding_calls(server, 0)
        eventually(lambda: server.server.sessions == 0)


def test_waiting_ends_with_the_session():
    with exporting() as server, Uploader(server.address) as client:
        call = client.asking(client.download().header.sha256, wait_s=15)
        holding_calls(server, 1)
        client.close_session()
        with pytest.raises(grpc.RpcError) as caught:
            next(call)
        check_fault(fault_in(caught.value), Reason.UNKNOWN_SESSION, "session_id", "closed")


def test_waiting_ends_when_the_session_is_resumed_elsewhere():
    with exporting() as server, Uploader(server.address) as client:
        call = client.asking(client.download().header.sha256, wait_s=15)
        holding_calls(server, 1)
        client.open(session_id=client.session_id)
        with pytest.raises(grpc.RpcError) as caught:
            next(call)
        check_fault(fault_in(caught.value), Reason.NOT_READY, "", "resumed")


def test_waiting_ends_when_the_server_stops():
    with exporting() as server, Uploader(server.address) as client:
        call = client.asking(client.download().header.sha256, wait_s=15)
        holding_calls(server, 1)
        begin = time.monotonic()
        server.server.stop()
        assert time.monotonic() - begin < 5
        with pytest.raises(grpc.RpcError) as caught:
            next(call)
        check_fault(fault_in(caught.value), Reason.DRAINING, "", "stopping")


def test_calls_of_one_session_are_limited():
    with exporting(max_calls_per_session=2) as server, Uploader(server.address) as client:
        have = client.download().header.sha256
        calls = [client.asking(have, wait_s=15) for _ in range(2)]
        holding_calls(server, 2)
        code = grpc.StatusCode.RESOURCE_EXHAUSTED
        with refused(code, Reason.LIMIT_EXCEEDED, "", "max_calls_per_session=2"):
            client.download(have)
        for call in calls:
            call.cancel()


def test_republished_policy_is_no_news():
    with exporting(first_version=5) as server, Uploader(server.address) as client:
        have = client.download().header.sha256
        server.policies.publish(server.policies.current)
        got = client.download(have, 0.05)
        assert (got.header.size_bytes, got.header.policy_version) == (0, 5)


@pytest.mark.parametrize(
    "space",
    [gym.spaces.MultiDiscrete([3, 2]), gym.spaces.Box(-1, 2, (3,), np.float32)],
    ids=["multi discrete", "box"],
)
def test_file_of_every_action_space_can_be_run(space):
    with exporting(None, action_space=space) as server, Uploader(server.address) as client:
        policy = OnnxPolicy(client.download().check().model)
        _, executed, _ = policy.act({"": seen(0.1)}, np.zeros(1, np.bool_))
        assert space.contains(executed[""][0])
