"""StreamAct: answers by number, and streams that break, are cancelled, or flood."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import time

import grpc
import gymnasium as gym
import numpy as np
import pytest

from client_sdk.traffic import Traffic
from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.faults import Fault, Reason
from policy_server import service
from policy_server.act_stream import ActStream
from policy_server.requests import Ask
from tests.server.talk import (
    TERMINATED,
    Talker,
    actions_of,
    check_fault,
    eventually,
    fault_in,
    program,
    rows,
    seen,
    waiting,
)
from tests.servers import EchoPolicy, serving

MANY_ACTIONS = gym.spaces.Discrete(1_000_000)


def streams(server) -> int:
    """Open on the server."""
    return len(server.server._parts.service._streams)


def test_answer_that_is_ready_overtakes_one_that_waits():
    with serving(hold=True) as server, Talker(server.address) as talker:
        stream = talker.stream()
        held = stream.send(rows([1], [0], seen(0)))
        evaluation = [pb.EpisodeStart(episode=2, evaluation=True)]
        ready = stream.send(rows([2], [0], seen(0)), starts=evaluation)
        assert stream.receive().request == ready
        server.publish(2)
        assert stream.receive().request == held


def test_failed_request_does_not_end_the_stream():
    with serving() as server, Talker(server.address) as talker:
        stream = talker.stream()
        stream.send(rows([1], [0], seen(0)), session_id="nobody")
        stream.send(rows([1], [0, 1], seen(0)))
        stream.send(rows([1], [0], seen(0)))
        answers = [stream.receive() for _ in range(3)]
        assert [answer.request for answer in answers] == [1, 2, 3]
        assert Reason(answers[0].error.reason) is Reason.UNKNOWN_SESSION
        assert Reason(answers[1].error.reason) is Reason.MALFORMED_TENSOR
        assert actions_of(answers[2].act.groups[0]) == [0]


def test_half_closed_stream_still_gets_its_answers():
    with serving(hold=True) as server, Talker(server.address) as talker:
        stream = talker.stream()
        for episode in (1, 2):
            stream.send(rows([episode], [0], seen(0)), number=7)
        stream.half_close()
        eventually(lambda: waiting(server) == 2)
        server.publish(2)
        assert [answer.request for answer in stream.call] == [7, 7]
        assert stream.call.code() is grpc.StatusCode.OK


def test_half_closed_stream_ends_when_there_is_no_policy():
    with serving(first_version=None) as server, Talker(server.address) as talker:
        stream = talker.stream()
        stream.send(rows([1], [0], seen(0)))
        stream.half_close()
        (answer,) = stream.call
        check_fault(Fault.from_detail(answer.error), Reason.NOT_READY, "", "no policy yet", "again")
        assert answer.error.status_code == grpc.StatusCode.UNAVAILABLE.value[0]


def test_cancelled_stream_gives_back_what_it_held_within_a_second():
    with serving(hold=True) as server, Talker(server.address) as talker:
        stream = talker.stream()
        for episode in range(1, 5):
            stream.send(rows([episode], [0], seen(0)))
        eventually(lambda: waiting(server) == 4)
        stream.call.cancel()
        eventually(lambda: waiting(server) == 0 and streams(server) == 0, within_s=1.0)
        # The rows are there still: asked again, each gets its one action.
        again = talker.begin(rows([1, 2, 3, 4], [0] * 4, seen(0, 0, 0, 0)))
        eventually(lambda: waiting(server) == 1)
        server.publish(2)
        assert actions_of(again.result().groups[0]) == [0] * 4


def test_cancelled_call_gives_back_what_it_held_within_a_second():
    with serving(hold=True) as server, Talker(server.address) as talker:
        call = talker.begin(rows([1], [0], seen(0)))
        eventually(lambda: waiting(server) == 1)
        call.cancel()
        eventually(lambda: waiting(server) == 0, within_s=1.0)


def test_repeat_whose_first_call_was_cancelled_is_told_to_ask_again():
    with serving(hold=True) as server, Talker(server.address) as talker:
        group = rows([1], [0], seen(0))
        first = talker.begin(group)
        eventually(lambda: waiting(server) == 1)
        second = talker.begin(group)
        eventually(lambda: server.server.stats()["requests"] == 2)
        first.cancel()
        error = second.exception()
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        check_fault(fault_in(error), Reason.NOT_READY, "", "ask again")
        third = talker.begin(group)
        eventually(lambda: waiting(server) == 1)
        server.publish(2)
        assert actions_of(third.result().groups[0]) == [0]


def test_cancelled_repeats_of_a_held_row_leave_nothing_behind():
    def alive() -> int:
        return sum(type(each) is Ask for each in gc.get_objects())

    with serving(hold=True) as server, Talker(server.address) as talker:
        group = rows([1], [0], seen(0))
        first = talker.begin(group)
        eventually(lambda: waiting(server) == 1)
        others = alive() - 1
        (session,) = server.server._parts.sessions._sessions.values()
        for repeat in range(1, 21):
            call = talker.begin(group)
            eventually(lambda: server.server.stats()["requests"] == 1 + repeat)  # noqa: B023
            call.cancel()
            eventually(lambda: len(session.calls) == 1)
        eventually(lambda: alive() - others <= 2)  # the first, and maybe the last one's frame
        server.publish(2)
        assert actions_of(first.result().groups[0]) == [0]


def test_broken_connection_gives_back_its_stream_within_a_second():
    with serving(hold=True) as server:
        with Talker(server.address) as talker:
            talker.stream().send(rows([1], [0], seen(0)))
            eventually(lambda: waiting(server) == 1)
        eventually(lambda: waiting(server) == 0 and streams(server) == 0, within_s=1.0)
        assert server.server.sessions == 1  # until its lease is over


def test_resuming_a_session_ends_its_older_stream():
    with serving(hold=True) as server, Talker(server.address) as talker:
        stream = talker.stream()
        stream.send(rows([1], [0], seen(0)))
        eventually(lambda: waiting(server) == 1)
        with Talker(server.address, session_id=talker.session_id) as again:
            assert again.session_id == talker.session_id
            with pytest.raises(grpc.RpcError) as caught:
                stream.receive()
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            check_fault(fault_in(caught.value), Reason.NOT_READY, "", "resumed", "ask again")
            newer = again.stream()
            newer.send(rows([1], [0], seen(0)))
            eventually(lambda: waiting(server) == 1)
            server.publish(2)
            assert actions_of(newer.receive().act.groups[0]) == [0]


@pytest.mark.parametrize("how", ["stream", "call"])
def test_closing_a_session_ends_its_calls(how):
    with serving(hold=True) as server, Talker(server.address) as talker:
        group = rows([1], [0], seen(0))
        if how == "stream":
            call = talker.stream()
            call.send(group)
        else:
            call = talker.begin(group)
        eventually(lambda: waiting(server) == 1)
        talker.close_session()
        with pytest.raises(grpc.RpcError) as caught:
            call.receive() if how == "stream" else call.result()
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        check_fault(fault_in(caught.value), Reason.UNKNOWN_SESSION, "session_id", "closed")
        eventually(lambda: waiting(server) == 0)


@pytest.mark.parametrize("how", ["stream", "call"])
def test_session_with_a_call_under_way_does_not_expire(how):
    with serving(hold=True, lease_s=50.0) as server, Talker(server.address) as talker:
        now = [1000.0]
        parts = server.server._parts
        parts.sessions.clock = lambda: now[0]
        group = rows([1], [0], seen(0))
        call = talker.stream() if how == "stream" else talker.begin(group)
        if how == "stream":
            call.send(group)
        eventually(lambda: waiting(server) == 1)
        for _ in range(3):
            now[0] += 49
            seen_at = now[0]
            (session,) = parts.sessions._sessions.values()
            eventually(lambda: session.last_seen_s == seen_at)  # noqa: B023
        assert server.server.sessions == 1
        server.publish(2)
        answer = call.receive().act if how == "stream" else call.result()
        assert actions_of(answer.groups[0]) == [0]


def test_streams_of_two_sessions_do_not_mix():
    with serving(action_space=MANY_ACTIONS) as server:
        server.policies.publish(EchoPolicy())
        with Talker(server.address) as one, Talker(server.address) as two:
            first, second = one.stream(), two.stream()
            for step in range(20):
                first.send(rows([1], [step], seen(3)))
                second.send(rows([1], [step], seen(4)))
            for step in range(20):
                assert actions_of(first.receive().act.groups[0]) == [300 + step]
                assert actions_of(second.receive().act.groups[0]) == [400 + step]


def test_streams_without_a_request_are_bounded_and_the_oldest_ends_first(monkeypatch):
    monkeypatch.setattr(service, "_MAX_NAMELESS", 3)
    with serving() as server, Talker(server.address) as talker:
        used = talker.stream()
        used.ask(rows([1], [0], seen(0)))
        silent = []
        for opened in range(2, 5):
            silent.append(talker.stream())
            eventually(lambda: streams(server) == opened)  # noqa: B023
        last = talker.stream()
        with pytest.raises(grpc.RpcError) as caught:
            silent[0].receive()
        check_fault(fault_in(caught.value), Reason.LIMIT_EXCEEDED, "", "without a request")
        for stream in (used, *silent[1:], last):
            stream.ask()


def test_one_stream_may_speak_for_two_sessions():
    with serving(action_space=MANY_ACTIONS) as server, Talker(server.address) as talker:
        server.policies.publish(EchoPolicy())
        other = talker.open().session_id
        stream = talker.stream()
        for step in range(3):
            assert actions_of(stream.ask(rows([1], [step], seen(3))).act.groups[0]) == [300 + step]
            answer = stream.ask(rows([1], [step], seen(4)), session_id=other)
            assert actions_of(answer.act.groups[0]) == [400 + step]


def test_answers_that_nobody_reads_stop_the_reading_of_requests():
    """What is unread is bounded, so a flood stays with who sends it; and nothing of it is lost."""
    action_space = gym.spaces.Box(-1.0, 1.0, (200_000,), np.float32)
    with (
        serving(action_space=action_space, hold=True) as server,
        Talker(server.address) as talker,
        Talker(server.address) as other,
    ):
        parts = server.server._parts
        of_others = parts.acting.requests
        stream = talker.stream(timeout=60.0)
        for episode in range(1, 31):
            stream.send(rows([episode], [0], seen(0)))
        eventually(lambda: waiting(server) == 30)
        server.publish(2)  # 24 MB, more than the connection takes unread
        for _ in range(3000):
            stream.send()
        (served,) = parts.service._streams
        taken = -1
        while taken != (taken := parts.acting.requests - of_others):
            for _ in range(20):
                other.act()  # others are served meanwhile
                of_others += 1
        assert 1000 < taken < 2000
        assert len(served._outbox) <= 1000
        numbers = [stream.receive().request for _ in range(3030)]
        assert sorted(numbers) == list(range(1, 3031))


def test_stream_that_is_ended_while_its_first_answer_leaves_says_why(caplog):
    with serving() as server, Talker(server.address) as talker:
        stream = talker.stream()
        eventually(lambda: streams(server) == 1)
        parts, loop = server.server._parts, server.server._loop
        (served,) = parts.service._streams

        def end_it_meanwhile():
            if served._writing:
                parts.sessions.close(talker.session_id)
            else:
                loop.call_soon(end_it_meanwhile)

        loop.call_soon_threadsafe(end_it_meanwhile)
        assert actions_of(stream.ask(rows([1], [0], seen(0))).act.groups[0]) == [0]
        with pytest.raises(grpc.RpcError) as ended:
            stream.receive()
        check_fault(fault_in(ended.value), Reason.UNKNOWN_SESSION, "session_id", "closed")
        eventually(lambda: streams(server) == 0)
    assert [record.name for record in caplog.records if record.name.startswith("grpc")] == []


@pytest.mark.parametrize("held", [True, False])
def test_server_that_stops_under_its_streams_leaves_no_traceback(held, caplog):
    for _ in range(4):
        with (
            contextlib.ExitStack() as stack,
            serving(hold=held, drain_s=0.0 if held else 0.2) as server,
        ):
            talkers = [stack.enter_context(Talker(server.address)) for _ in range(48)]
            for talker in talkers:
                talker.stream().send(rows([1], [0], seen(0)))
            if held:
                eventually(lambda: waiting(server) == len(talkers))  # noqa: B023 -- called here
    assert [record.name for record in caplog.records if record.name.startswith("grpc")] == []


def test_answer_over_the_message_limit_fails_its_stream_and_no_other():
    """A small observation, a huge action: the answer does not fit."""
    action_space = gym.spaces.Box(-1.0, 1.0, (4000,), np.float32)
    with (
        serving(action_space=action_space, max_message_bytes=30_000) as server,
        Talker(server.address) as talker,
    ):
        stream = talker.stream()
        assert stream.ask(rows([1], [0], seen(0))).act.groups[0].HasField("actions")
        stream.send(rows([2, 3], [0, 0], seen(0, 0)))
        with pytest.raises(grpc.RpcError) as caught:
            stream.receive()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "30000" in caught.value.details()
        eventually(lambda: streams(server) == 0)
        assert talker.stream().ask(rows([4], [0], seen(0))).act.groups[0].HasField("actions")


KILLED_CLIENT = """
import sys
from tests.server.talk import Talker, rows, seen
talker = Talker(sys.argv[1], client_name="doomed")
stream = talker.stream(timeout=100)
for step in range(5):
    stream.ask(rows([1], [step], seen(step), rewards=[float(step > 0)]))
print("acted", flush=True)
stream.receive()
"""


def test_killed_client_is_noticed_and_truncated_at_its_last_complete_step():
    with (
        serving(lease_s=0.3) as server,
        program(KILLED_CLIENT, server.address) as client,
    ):
        try:
            assert client.stdout.readline() == b"acted\n"
            assert streams(server) == 1
        finally:
            client.kill()
        begin = time.monotonic()
        eventually(lambda: streams(server) == 0, within_s=1.0)
        eventually(lambda: server.server.sessions == 0)
        assert time.monotonic() - begin < 2.0
        (chunk,) = server.collect(4)
        assert (chunk.steps, chunk.truncated, chunk.terminated) == (4, True, False)
        assert chunk.last_observation[""].tolist() == [[4.0] * 4]
        assert server.unaccounted() == 4  # collected: neither delivered nor discarded yet
        # Training goes on with others.
        with Talker(server.address) as talker:
            talker.play(1, 3)
            assert server.collect(3)[0].terminated
            assert talker.step(1, 3, 3.0, 1.0, TERMINATED) is None


def test_frozen_client_is_noticed_by_keepalive():
    """Its connection stays open and silent, as that of a machine that lost its power does."""
    with (
        serving(lease_s=0.2, keepalive_s=0.3) as server,
        program(KILLED_CLIENT, server.address) as client,
    ):
        try:
            assert client.stdout.readline() == b"acted\n"
            client.send_signal(signal.SIGSTOP)
            eventually(lambda: streams(server) == 0)
            eventually(lambda: server.server.sessions == 0)
        finally:
            client.kill()
        assert server.server.stats()["episodes_lost"] == 1
        assert sum(chunk.steps for chunk in server.collect(4)) == 4


class Slow:
    """A call whose first answer takes its time to leave."""

    def __init__(self):
        self.requests = asyncio.Queue()
        self.left = asyncio.Event()

    async def read(self):
        return await self.requests.get()

    async def write(self, _data):
        await self.left.wait()


async def passes(condition):
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def test_stream_that_is_cancelled_twice_is_no_call_of_its_session():
    """By the server as its first answer has left, and by gRPC, for its client is gone."""

    async def twice(parts):
        session, _ = parts.sessions.open("resumed", "")
        call = Slow()
        acting = parts.service._acting
        stream = ActStream(call, parts.sessions, acting, Traffic(), max_open_episodes=10)
        serving_it = asyncio.create_task(stream.serve())

        def say(step):
            act = pb.ActRequest(session_id=session.session_id)
            act.groups.append(rows([1], [step], seen(step), rewards=[0.0]))
            call.requests.put_nowait(pb.StreamActRequest(request=1, act=act).SerializeToString())

        say(0)
        await passes(lambda: stream._writing)
        assert stream in session.calls
        parts.sessions.open("resumed", session.session_id)  # on another connection
        say(1)  # was on its way already
        await passes(call.requests.empty)
        call.left.set()
        while not serving_it.cancelling() and not serving_it.done():  # noqa: ASYNC110
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        serving_it.cancel()
        await asyncio.wait({serving_it})
        return session.calls

    with serving() as server, Talker(server.address) as other:
        other.step(1, 0)  # of somebody else's episode, so that no answer is given at once
        done = asyncio.run_coroutine_threadsafe(twice(server.server._parts), server.server._loop)
        assert not done.result(10)
