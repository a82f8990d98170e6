"""StreamAct where a client waits for each answer: which requests that is, and how such a stream ends."""

from __future__ import annotations

import asyncio
import queue
import time
import types

import grpc
import gymnasium as gym
import numpy as np
import pytest

from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.faults import Reason
from policy_server import lockstep
from policy_server.act_stream import ActStream
from policy_server.batcher import Batcher
from policy_server.lockstep import Lockstep
from tests.server.talk import (
    ABANDONED,
    RUNNING,
    TERMINATED,
    Talker,
    actions_of,
    check_fault,
    eventually,
    fault_in,
    faults_of,
    rows,
    seen,
    waiting,
)
from tests.servers import EchoPolicy, serving

UNREAD = [("grpc.max_receive_message_length", -1), ("grpc.http2.bdp_probe", 0)]
MANY_ACTIONS = gym.spaces.Discrete(1_000_000)


@pytest.fixture
def together(monkeypatch):
    """The answers that were written together with the reading of the next request."""
    answers = []
    original = Lockstep.answer

    def answer(self, data, then):
        answers.append(pb.StreamActResponse.FromString(data).request)
        original(self, data, then)

    monkeypatch.setattr(Lockstep, "answer", answer)
    return answers


@pytest.fixture
def server():
    with serving(action_space=MANY_ACTIONS) as server:
        server.policies.publish(EchoPolicy())
        yield server


@pytest.fixture
def talker(server):
    with Talker(server.address) as talker:
        yield talker


def one(step: int, **fields) -> pb.StepRows:
    return rows([1], [step], seen(step), rewards=[1.0 if step else 0.0], **fields)


def test_the_only_episode_of_a_client_is_answered_in_lockstep(talker, together):
    stream = talker.stream()
    for step in range(200):  # beyond where the numbers get longer
        assert actions_of(stream.ask(one(step)).act.groups[0]) == [101 * step]
    # gRPC's first message, which carries the metadata, goes alone.
    assert together == list(range(2, 201))


def test_all_episodes_of_a_client_in_one_request_are_answered_in_lockstep(talker, together):
    stream = talker.stream()
    for step in range(5):
        earned = [1.0] * 3 if step else []
        answer = stream.ask(rows([1, 2, 3], [step] * 3, seen(4, 5, 6), rewards=earned))
        assert actions_of(answer.act.groups[0]) == [400 + step, 500 + step, 600 + step]
    assert together == [2, 3, 4, 5]


def test_one_of_several_episodes_is_answered_while_more_is_read(talker, together):
    stream = talker.stream()
    stream.ask(rows([1, 2], [0, 0], seen(0, 0)))
    for step in range(1, 20):
        numbers = {
            stream.send(rows([episode], [step], seen(episode), rewards=[1.0])) for episode in (1, 2)
        }
        assert {stream.receive().request, stream.receive().request} == numbers
    assert together == []


def test_whoever_does_not_wait_is_answered_all_the_same(talker):
    stream = talker.stream()
    for step in range(300):
        stream.send(one(step))
    answers = [stream.receive() for _ in range(300)]
    assert [answer.request for answer in answers] == list(range(1, 301))
    assert [actions_of(answer.act.groups[0]) for answer in answers] == [
        [101 * step] for step in range(300)
    ]


def test_whoever_does_not_wait_leaves_the_loop_time_for_others(talker, monkeypatch):
    in_a_row = [0]  # recorded between two iterations of the loop
    recorded = Batcher.recorded

    def recorded_slowly(self, row):
        if in_a_row[-1] == 0:
            asyncio.get_running_loop().call_soon(in_a_row.append, 0)
        in_a_row[-1] += 1
        recorded(self, row)
        time.sleep(0.001)  # in which the answer leaves, and the next request comes

    monkeypatch.setattr(Batcher, "recorded", recorded_slowly)
    stream = talker.stream()
    for step in range(400):
        stream.send(one(step))
    for _ in range(400):
        stream.receive()
    assert sum(in_a_row) > 300
    assert max(in_a_row) <= 4


def test_an_episode_follows_the_other(server, talker, together):
    stream = talker.stream()
    for episode in range(1, 6):
        for step in range(3):
            earned = [1.0] if step else []
            answer = stream.ask(rows([episode], [step], seen(7), rewards=earned))
            assert actions_of(answer.act.groups[0]) == [700 + step]
        stream.ask(rows([episode], [3], seen(7), rewards=[1.0], statuses=[TERMINATED]))
    assert server.buffer.held == 15
    assert together


def test_a_refused_row_is_answered_and_the_stream_goes_on(talker):
    stream = talker.stream()
    for step in range(3):
        stream.ask(one(step))
    (fault,) = faults_of(stream.ask(one(7)).act.groups[0]).values()
    assert fault.reason is Reason.STEP_OUT_OF_ORDER
    assert stream.ask(one(3), session_id="nobody").error.reason == Reason.UNKNOWN_SESSION
    assert actions_of(stream.ask(one(3)).act.groups[0]) == [303]


def test_an_answer_that_is_held_back_holds_up_nothing_else(together):
    with serving(hold=True) as server, Talker(server.address) as talker:
        stream = talker.stream()
        held = stream.send(rows([1], [0], seen(0)))
        eventually(lambda: waiting(server) == 1)
        evaluation = [pb.EpisodeStart(episode=2, evaluation=True)]
        ready = stream.send(rows([2], [0], seen(0)), starts=evaluation)
        assert stream.receive().request == ready
        server.publish(2)
        assert stream.receive().request == held
        assert together == []


def test_an_answer_that_is_due_later_is_not_kept_back_by_another_episode():
    with serving(hold=True, hold_timeout_s=0.5) as server, Talker(server.address) as talker:
        stream = talker.stream()
        stream.ask()  # the first message is out
        held = stream.send(rows([1], [0], seen(0)))
        gone = stream.send(rows([1], [1], statuses=[ABANDONED]))
        evaluation = [pb.EpisodeStart(episode=2, evaluation=True)]
        other = stream.send(rows([2], [0], seen(1)), starts=evaluation)
        assert {stream.receive().request for _ in range(3)} == {held, gone, other}


def test_answers_are_written_one_after_the_other(monkeypatch):
    original = ActStream._is_all

    def is_all(self, ask):
        # As if the task that writes had been woken just before, and had not run yet.
        writing, self._writing = self._writing, False
        try:
            return original(self, ask)
        finally:
            self._writing = writing

    monkeypatch.setattr(ActStream, "_is_all", is_all)
    # More than is sent to somebody who does not read.
    large = gym.spaces.Box(-1, 1, (600_000,), np.float32)
    evaluation = [pb.EpisodeStart(episode=1, evaluation=True)]
    with (
        serving(action_space=large, hold=True) as server,
        Talker(server.address, options=UNREAD) as talker,
        Talker(server.address, options=UNREAD) as other,
    ):
        other.act(rows([1], [0], seen(0)), starts=evaluation)  # so that the answers come later
        stream = talker.stream()
        stream.ask(rows([1], [0], seen(1)), starts=evaluation)
        held = stream.send(rows([2], [0], seen(2)))
        eventually(lambda: waiting(server) == 1)
        server.publish(2)
        eventually(lambda: server.server.stats()["actions"] == 3)
        statuses = [TERMINATED, RUNNING]
        last = stream.send(rows([2, 1], [1, 1], seen(2, 1), rewards=[1.0] * 2, statuses=statuses))
        eventually(lambda: server.server.stats()["actions"] == 4)
        assert [stream.receive().request for _ in range(2)] == [held, last]


def in_lockstep(talker, together):
    """A stream on which the server waits for the request after an answer."""
    stream = talker.stream()
    for step in range(3):
        stream.ask(one(step))
    assert together
    return stream


def test_a_client_that_says_no_more_ends_its_stream(server, talker, together):
    stream = in_lockstep(talker, together)
    stream.half_close()
    with pytest.raises(StopIteration):
        stream.receive()
    assert stream.call.code() is grpc.StatusCode.OK
    eventually(lambda: not server.server._parts.service._streams)


def test_a_client_that_goes_away_frees_its_stream(server, talker, together):
    stream = in_lockstep(talker, together)
    stream.close()
    eventually(lambda: not server.server._parts.service._streams)
    (session,) = server.server._parts.sessions._sessions.values()
    assert not session.calls  # its lease runs


def test_garbage_ends_the_stream_and_nothing_else(server, talker, together):
    outbox = queue.SimpleQueue()
    call = talker.channel.stream_stream("/policyserver.v1.PolicyService/StreamAct")(
        iter(outbox.get, None), timeout=20
    )
    for number in (1, 2, 3):
        act = talker.request(one(number - 1))
        outbox.put(pb.StreamActRequest(request=number, act=act).SerializeToString())
        assert pb.StreamActResponse.FromString(next(call)).request == number
    assert together
    outbox.put(b"garbage")
    with pytest.raises(grpc.RpcError) as caught:
        next(call)
    outbox.put(None)
    check_fault(fault_in(caught.value), Reason.MALFORMED_TENSOR, "", "StreamActRequest")
    eventually(lambda: not server.server._parts.service._streams)
    assert actions_of(talker.stream().ask(one(3)).act.groups[0]) == [303]


@pytest.mark.parametrize("alone", [True, False])
def test_a_grpc_that_refuses_an_operation_costs_that_stream_alone(
    server, talker, together, monkeypatch, alone
):
    def refuse(*_):
        raise TypeError("no such operation")

    stream = in_lockstep(talker, together)
    with Talker(server.address) as other:
        if not alone:  # what is asked is answered later then, in case the other one asks as well
            running = other.stream()
            running.ask(one(0))
        changed = {**vars(lockstep.cygrpc), "execute_batch": refuse}
        monkeypatch.setattr(lockstep, "cygrpc", types.SimpleNamespace(**changed))
        stream.send(one(3))
        # The answer to it was to go with the next request.
        with pytest.raises(grpc.RpcError) as caught:
            stream.receive()
        assert caught.value.code() is grpc.StatusCode.UNKNOWN
        monkeypatch.undo()
        if not alone:
            assert actions_of(running.ask(one(1)).act.groups[0]) == [101]
        assert actions_of(other.stream().ask(rows([5], [0], seen(2))).act.groups[0]) == [200]
        assert actions_of(talker.stream().ask(one(3)).act.groups[0]) == [303]


def test_a_resumed_session_ends_the_stream(server, talker, together):
    stream = in_lockstep(talker, together)
    with Talker(server.address, session_id=talker.session_id) as again:
        with pytest.raises(grpc.RpcError) as caught:
            stream.receive()
        check_fault(fault_in(caught.value), Reason.NOT_READY, "", "resumed", "ask again")
        assert actions_of(again.stream().ask(one(3)).act.groups[0]) == [303]


def test_a_server_that_stops_ends_the_stream(together):
    with serving() as server, Talker(server.address) as talker:
        stream = in_lockstep(talker, together)
        server.server.stop()
        with pytest.raises(grpc.RpcError) as caught:
            stream.receive()
        check_fault(fault_in(caught.value), Reason.DRAINING, "", "stopping")


@pytest.mark.parametrize("name", lockstep._NEEDED)
def test_a_grpc_that_has_changed_inside_reads_and_writes_as_ever(
    server, talker, together, monkeypatch, name
):
    changed = {key: value for key, value in vars(lockstep.cygrpc).items() if key != name}
    monkeypatch.setattr(lockstep, "cygrpc", types.SimpleNamespace(**changed))
    stream = talker.stream()
    for step in range(20):
        assert actions_of(stream.ask(one(step)).act.groups[0]) == [101 * step]
    assert together == []
