"""Sessions: their episodes, their secret, their lease."""

from __future__ import annotations

import grpc
import gymnasium as gym
import pytest

from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.faults import Reason
from tests.server.talk import (
    TERMINATED,
    Talker,
    check_fault,
    eventually,
    refuse_row,
    refused,
    rows,
    seen,
)
from tests.servers import EchoPolicy, serving

STEPS = "groups[0].steps[0]"
MANY_ACTIONS = gym.spaces.Discrete(1_000_000)
NOT_FOUND = grpc.StatusCode.NOT_FOUND


def test_same_numbers_and_label_of_two_clients_are_two_episodes():
    with (
        serving(action_space=MANY_ACTIONS) as server,
        Talker(server.address) as one,
        Talker(server.address) as two,
    ):
        server.policies.publish(EchoPolicy())
        start = [pb.EpisodeStart(episode=1, label="same")]
        assert one.step(1, 0, 3, starts=start) == 300
        assert two.step(1, 0, 4, starts=start) == 400
        assert one.step(1, 1, 3) == 301
        one.step(1, 2, 3, 1.0, TERMINATED)
        assert two.step(1, 1, 4) == 401
        two.step(1, 2, 4, 2.0, TERMINATED)
        chunks = server.collect(4)
        assert [chunk.identity.label for chunk in chunks] == ["same", "same"]
        assert [chunk.end.episode_return for chunk in chunks] == [1.0, 2.0]
        assert chunks[0].identity is not chunks[1].identity


@pytest.mark.parametrize("session_id", ["", "0" * 32, "guess", "\x00"])
def test_unknown_session_is_not_found_with_the_likely_causes(session_id):
    with serving() as server, Talker(server.address, connect=False) as talker:
        talker.session_id = session_id
        says = ("never opened", "lease is over", "restarted", "Open another one")
        with refused(NOT_FOUND, Reason.UNKNOWN_SESSION, "session_id", *says) as found:
            talker.act(rows([1], [0], seen(0)))
        if session_id:
            assert session_id not in found[0].message


def test_session_id_is_128_random_bits():
    with serving() as server, Talker(server.address, connect=False) as talker:
        ids = {talker.open().session_id for _ in range(20)}
        assert len(ids) == 20
        assert all(len(bytes.fromhex(session_id)) == 16 for session_id in ids)


def test_session_of_another_client_cannot_be_named_without_its_id():
    """Its name, its number and a prefix of its id are no credentials."""
    with serving() as server, Talker(server.address, client_name="victim") as victim:
        victim.step(1, 0)
        with Talker(server.address, client_name="victim") as intruder:
            fault = refuse_row(intruder, 1, 1)
            check_fault(fault, Reason.UNKNOWN_EPISODE, STEPS)
            for guess in ("victim", "victim #1", "1", victim.session_id[:-1]):
                assert intruder.open(session_id=guess).session_id != victim.session_id
                intruder.session_id = guess
                with refused(NOT_FOUND, Reason.UNKNOWN_SESSION, "session_id"):
                    intruder.step(1, 1)
                intruder.close_session()
        assert victim.step(1, 1) == 0


def test_closing_twice_is_fine():
    with serving() as server, Talker(server.address) as talker:
        talker.step(1, 0)
        talker.step(1, 1)
        for _ in range(2):
            talker.close_session()
        assert server.server.sessions == 0
        assert server.server.stats()["episodes_open"] == 0


def test_closing_truncates_what_is_unfinished():
    with serving() as server, Talker(server.address) as talker:
        for step in range(4):
            talker.step(1, step, step, float(step > 0))
        talker.close_session()
        (chunk,) = server.collect(3)
        assert (chunk.steps, chunk.truncated, chunk.terminated) == (3, True, False)
        assert chunk.last_observation[""].tolist() == [[3.0] * 4]
        assert not chunk.end.reported
        with refused(NOT_FOUND, Reason.UNKNOWN_SESSION, "session_id"):
            talker.step(1, 4)


def test_resumed_session_keeps_its_episodes():
    with serving() as server, Talker(server.address) as talker:
        talker.step(1, 0)
        with Talker(server.address, session_id=talker.session_id) as again:
            assert again.session_id == talker.session_id
            assert again.step(1, 0) == 0
            again.step(1, 1, 0.0, 1.0, TERMINATED)
        assert server.server.stats()["sessions_opened"] == 1
        assert server.collect()[0].end.episode_return == 1.0


def test_too_many_sessions_are_refused_naming_the_setting_and_when_to_retry():
    with serving(max_sessions=2) as server, Talker(server.address) as talker:
        talker.open()
        with refused(
            grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.LIMIT_EXCEEDED, "", "max_sessions=2", "raise"
        ) as found:
            talker.open()
        assert found[0].retry_after_s > 0
        assert talker.open(session_id=talker.session_id).session_id == talker.session_id
        talker.close_session()
        talker.session_id = talker.open().session_id
        assert talker.step(1, 0) == 0


def test_silent_session_ends_with_its_lease_and_its_episodes_are_truncated():
    with serving(lease_s=50.0) as server, Talker(server.address) as talker:
        now = [1000.0]
        server.server._parts.sessions.clock = lambda: now[0]
        for step in range(3):
            talker.step(1, step, step, float(step > 0))
        now[0] += 49
        talker.step(1, 2, 2, 1.0)  # a call renews it
        now[0] += 49
        eventually(lambda: server.server.sessions == 1)
        now[0] += 2
        eventually(lambda: server.server.sessions == 0)
        (chunk,) = server.collect(2)
        assert (chunk.steps, chunk.truncated, chunk.end.reported) == (2, True, False)
        assert server.server.stats()["sessions_expired"] == 1
        assert server.server.stats()["episodes_lost"] == 1
        with refused(NOT_FOUND, Reason.UNKNOWN_SESSION, "session_id"):
            talker.step(1, 3)


def test_heartbeat_keeps_a_session_and_its_episodes():
    with serving(lease_s=50.0) as server, Talker(server.address) as talker:
        now = [1000.0]
        server.server._parts.sessions.clock = lambda: now[0]
        talker.step(1, 0)
        for _ in range(5):
            now[0] += 40
            assert talker.act() == pb.ActResponse()
        assert talker.step(1, 1) == 0


def test_end_can_be_repeated_for_a_lease_after_each_answer_and_is_forgotten_after():
    with (
        serving(lease_s=50.0, hold_timeout_s=8.0, wait_timeout_s=9.0) as server,
        Talker(server.address) as talker,
    ):
        now = [1000.0]
        parts = server.server._parts
        parts.sessions.clock = parts.store.clock = lambda: now[0]

        def wait(seconds):
            until = now[0] + seconds
            while now[0] < until:
                now[0] = min(now[0] + 40.0, until)
                talker.act()
                server.server._call_soon(parts.sweep)
            talker.act()

        talker.play(1, 2)
        # An answer takes 9 seconds at most, and the client has a lease to ask again.
        for _ in range(3):
            wait(58.9)
            assert talker.step(1, 2, 2.0, 1.0, TERMINATED) is None
        wait(59.1)
        book = parts.sessions.find(talker.session_id).book
        eventually(lambda: not book._ended)
        check_fault(refuse_row(talker, 1, 2, 2.0, 1.0, TERMINATED), Reason.UNKNOWN_EPISODE, STEPS)
