"""Floods meet caps that name their setting, and cost nobody else anything."""

from __future__ import annotations

import grpc
import numpy as np
import pytest

from client_sdk.wire import policyserver_pb2 as pb
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
from tests.servers import serving

EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


def starts(numbers) -> list[pb.EpisodeStart]:
    return [pb.EpisodeStart(episode=number) for number in numbers]


def test_limits_are_told_when_a_session_opens():
    with serving(max_rows_per_request=7, max_open_episodes_per_session=5) as server:
        with Talker(server.address, connect=False) as talker:
            limits = talker.open().limits
        assert limits.max_rows_per_request == 7
        assert limits.max_open_episodes == 5
        assert limits.max_message_bytes == server.config.max_message_bytes


def test_flood_of_starts_is_capped_per_session_and_others_are_served():
    with (
        serving(max_open_episodes_per_session=10) as server,
        Talker(server.address) as flooder,
        Talker(server.address) as other,
    ):
        says = ("max_open_episodes_per_session=10", "end some", "raise that setting")
        with refused(EXHAUSTED, Reason.LIMIT_EXCEEDED, "starts", "got 10000", *says):
            flooder.act(starts=starts(range(1, 10_001)))
        flooder.act(starts=starts(range(1, 11)))
        with refused(EXHAUSTED, Reason.LIMIT_EXCEEDED, "", *says) as found:
            flooder.act(starts=starts([11]))
        assert found[0].retry_after_s > 0
        # A first row that was not announced is a start as well.
        answer = flooder.act(rows([1, 11, 2], [0, 0, 0], seen(0, 0, 0))).groups[0]
        assert set(faults_of(answer)) == {1}
        check_fault(faults_of(answer)[1], Reason.LIMIT_EXCEEDED, "", *says)
        assert actions_of(answer) == [0, 0, 0]
        other.play(1, 5)
        # What ends makes room.
        flooder.step(1, 1, 0.0, 1.0, TERMINATED)
        assert flooder.step(11, 0) == 0


def test_flood_of_starts_is_capped_over_all_sessions():
    with (
        serving(max_open_episodes=4) as server,
        Talker(server.address) as one,
        Talker(server.address) as two,
    ):
        one.act(starts=starts([1, 2]))
        one.step(3, 0)
        two.step(1, 0)
        says = ("max_open_episodes=4", "raise that setting")
        for talker in (one, two):
            with refused(EXHAUSTED, Reason.LIMIT_EXCEEDED, "", *says):
                talker.act(starts=starts([9]))
        # Those announced may start all the same.
        assert one.step(1, 0) == 0
        # A session that closes gives back what it announced and what it ran.
        one.close_session()
        two.act(starts=starts([2, 3, 4]))


def test_announcing_again_changes_nothing_and_takes_no_room():
    with serving(max_open_episodes=1) as server, Talker(server.address) as talker:
        first = pb.EpisodeStart(episode=1, label="first", evaluation=True)
        talker.act(starts=[first])
        talker.act(starts=[pb.EpisodeStart(episode=1, label="second")])
        talker.play(1, 3)
        (chunk,) = server.collect(timeout_s=0.05)
        assert (chunk.identity.label, chunk.training) == ("first", False)


@pytest.mark.parametrize("groups", [1, 2])
def test_too_many_rows_are_refused_with_number_limit_and_setting(groups):
    with serving(max_rows_per_request=9) as server, Talker(server.address) as talker:
        parts = np.array_split(np.arange(1, 11), groups)
        message = [rows(part, [0] * len(part), seen(*part)) for part in parts]
        says = ("max_rows_per_request=9", "got 10", "several requests", "raise that setting")
        with refused(EXHAUSTED, Reason.LIMIT_EXCEEDED, "groups", *says):
            talker.act(*message)
        assert server.server.stats()["episodes_open"] == 0
        assert actions_of(talker.act(rows([1], [0], seen(0))).groups[0]) == [0]


def test_flood_of_empty_groups_is_refused():
    with (
        serving() as server,
        Talker(server.address) as talker,
        refused(EXHAUSTED, Reason.LIMIT_EXCEEDED, "groups", "got 10000"),
    ):
        talker.act(*[pb.StepRows()] * 10_000)


def test_message_over_the_limit_is_refused_with_sizes_and_the_client_goes_on():
    with serving(max_message_bytes=20_000) as server, Talker(server.address) as talker:
        large = pb.EpisodeStart(episode=1, label="x" * 20_000)
        with pytest.raises(grpc.RpcError) as caught:
            talker.act(starts=[large])
        assert caught.value.code() is EXHAUSTED
        assert "20000" in caught.value.details()
        stream = talker.stream()
        stream.send(starts=[large])
        with pytest.raises(grpc.RpcError) as caught:
            stream.receive()
        assert caught.value.code() is EXHAUSTED
        assert talker.step(1, 0) == 0
        assert actions_of(talker.stream().ask(rows([1], [1], seen(0))).act.groups[0]) == [0]


def test_label_of_any_length_is_kept_short():
    with serving() as server, Talker(server.address) as talker:
        talker.step(1, 0, starts=[pb.EpisodeStart(episode=1, label="x" * 1_000_000)])
        talker.step(1, 1, 0.0, 1.0, TERMINATED)
        (chunk,) = server.collect(1)
        assert chunk.identity.label == "x" * 256


def test_metrics_under_ever_new_names_are_bounded():
    with serving() as server, Talker(server.address) as talker:
        talker.step(1, 0)
        names = [f"goal {index}" for index in range(1500)]
        with refused(EXHAUSTED, Reason.LIMIT_EXCEEDED, "metrics[0].values", "1000", "got 1500"):
            talker.act(metrics=[pb.EpisodeMetrics(episode=1, values=dict.fromkeys(names, 1.0))])
        with refused(EXHAUSTED, Reason.LIMIT_EXCEEDED, "metrics[0].values", "256", "one of 257"):
            talker.act(metrics=[pb.EpisodeMetrics(episode=1, values={"x" * 257: 1.0})])
        for part in (names[:750], names[750:], names[:1]):
            values = dict.fromkeys(part, float(len(part)))
            talker.act(metrics=[pb.EpisodeMetrics(episode=1, values=values)])
        talker.step(1, 1, 0.0, 1.0, TERMINATED)
        (chunk,) = server.collect(1)
        assert len(chunk.end.metrics) == 1000
        assert chunk.end.metrics["goal 0"] == 1.0


def test_calls_of_one_session_are_capped_and_others_are_served():
    with (
        serving(max_calls_per_session=3, hold=True) as server,
        Talker(server.address) as talker,
        Talker(server.address) as other,
    ):
        held = [talker.begin(rows([episode], [0], seen(0))) for episode in (1, 2, 3)]
        eventually(lambda: server.server.stats()["requests_waiting"] == 3)
        with refused(EXHAUSTED, Reason.LIMIT_EXCEEDED, "", "max_calls_per_session=3"):
            talker.act(rows([4], [0], seen(0)))
        other.act()
        server.publish(2)
        assert [actions_of(call.result().groups[0]) for call in held] == [[0]] * 3
        talker.act()
