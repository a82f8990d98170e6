"""When uploads are taken and answered: hold mode, a full buffer, and servers that stop."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.faults import Reason
from tests.server.exporting import exporting
from tests.server.talk import (
    ABANDONED,
    TERMINATED,
    check_fault,
    eventually,
    fault_in,
    refused,
    seen,
)
from tests.server.test_uploads import faults_in, logged, observations_of
from tests.server.uploading import Uploader

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.fixture
def actor():
    """RLlib's thread."""
    with ThreadPoolExecutor(1) as executor:
        yield executor


@pytest.fixture
def holding():
    with exporting(hold=True) as server:
        yield server


@pytest.fixture
def client(holding):
    with Uploader(holding.address) as client:
        yield client.fly()


def waiting(server, requests: int = 1) -> None:
    """Until so many requests are held."""
    eventually(lambda: server.server.stats()["requests_waiting"] == requests)


# Hold.


def test_answer_comes_when_rllib_asks_for_more(holding, client, actor):
    call = client.begin_upload(client.chunk(1, 0, seen(0, 1, 2)))
    waiting(holding)
    assert holding.ledger()["held"] == 2  # it is taken all the same
    sample = actor.submit(holding.collect, 4)
    assert call.result().accepted_sequence == 1
    # What meets the demand is the last that is answered.
    call = client.begin_upload(client.chunk(1, 2, seen(2, 3, 4)))
    assert sum(chunk.steps for chunk in sample.result()) == 4
    waiting(holding)
    assert not call.done()


def test_answer_comes_with_a_newer_policy_and_names_it(holding, client):
    call = client.begin_upload(client.chunk(1, 0, seen(0, 1)))
    waiting(holding)
    holding.publish(2)
    assert call.result().policy_version == 2
    # One upload each: the gate did not stay open.
    call = client.begin_upload(client.chunk(1, 1, seen(1, 2)))
    waiting(holding)


def test_upload_held_too_long_is_not_ready_and_stays_taken():
    with exporting(hold=True, hold_timeout_s=0.15) as server, Uploader(server.address) as client:
        client.fly()
        chunk = client.chunk(1, 0, seen(0, 1))
        for _ in range(2):
            with refused(UNAVAILABLE, Reason.NOT_READY, "", "not stored twice") as found:
                client.upload(chunk)
            assert found[0].retry_after_s is not None
        assert server.ledger()["received"] == 1
        call = client.begin_upload(chunk)
        waiting(server)
        server.publish(2)
        assert call.result().accepted_sequence == 1
        # It was answered: another repeat need not wait.
        client.deliver(chunk)


def test_repeat_beside_the_call_that_is_still_held_is_released_with_it(holding, client):
    chunk = client.chunk(1, 0, seen(0, 1))
    calls = []
    for number in (1, 2):
        calls.append(client.begin_upload(chunk))
        waiting(holding, number)
    holding.publish(2)
    assert [call.result().policy_version for call in calls] == [2, 2]
    assert holding.ledger()["received"] == 1


def test_faults_are_told_when_the_answer_comes_at_last():
    with exporting(hold=True, hold_timeout_s=0.1) as server, Uploader(server.address) as client:
        client.fly()
        good, bad = client.chunk(1, 0, seen(0, 1)), client.chunk(2, 0, seen(0, 1), policy_id="x")
        with refused(UNAVAILABLE, Reason.NOT_READY):
            client.upload(good, bad)
        server.publish(2)
        call = client.begin_upload(good, bad)
        waiting(server)
        server.publish(3)
        assert set(faults_in(call.result())) == {1}


def test_evaluation_is_never_held(holding, client):
    client.deliver(
        client.chunk(1, 0, seen(0, 1), status=TERMINATED),
        starts=[pb.EpisodeStart(episode=1, evaluation=True)],
        timeout=5,
    )


def test_logged_actions_are_never_held_in_uploads(holding, client):
    client.deliver(logged(client, [1, 0], [-0.5, -0.5]), timeout=5)


def test_abandoned_steps_are_never_held(holding, client):
    client.deliver(client.chunk(1, 0, seen(0, 1), status=ABANDONED), timeout=5)


def test_upload_without_chunks_is_never_held(holding, client):
    call = client.begin_upload(client.chunk(1, 0, seen(0, 1)))
    waiting(holding)
    client.deliver(timeout=5)
    call.cancel()


def test_client_that_dies_while_it_is_held_leaves_its_steps_and_stops_nobody(actor):
    with exporting(hold=True, lease_s=0.3) as server, Uploader(server.address) as survivor:
        survivor.fly()
        with Uploader(server.address) as client:
            client.fly()
            call = client.begin_upload(client.chunk(1, 0, seen(0, 1, 2)))
            waiting(server)
            assert not call.done()
        eventually(lambda: server.server.stats()["requests_waiting"] == 0)
        sample = actor.submit(server.collect, 3)
        eventually(lambda: server.buffer.wanted)
        call = survivor.begin_upload(survivor.chunk(1, 0, seen(5, 6)))
        assert sum(chunk.steps for chunk in sample.result()) == 3
        server.publish(2)
        assert call.result().accepted_sequence == 1


def test_held_upload_ends_with_an_error_when_the_server_stops(holding, client):
    call = client.begin_upload(client.chunk(1, 0, seen(0, 1)))
    waiting(holding)
    begin = time.monotonic()
    holding.server.stop()
    assert time.monotonic() - begin < 5
    error = call.exception()
    assert error.code() is UNAVAILABLE
    check_fault(fault_in(error), Reason.DRAINING, "", "stopping")
    assert holding.ledger() == {
        "received": 1, "delivered": 0, "discarded_shutdown": 1, "held": 0
    }  # fmt: skip


def test_held_upload_ends_with_an_error_when_learning_fails(holding, client):
    call = client.begin_upload(client.chunk(1, 0, seen(0, 1)))
    waiting(holding)
    holding.server.set_degraded("loss is NaN")
    error = call.exception()
    assert error.code() is UNAVAILABLE
    check_fault(fault_in(error), Reason.NOT_READY, "", "loss is NaN")


def test_serving_server_answers_at_once():
    with exporting() as server, Uploader(server.address) as client:
        client.fly()
        client.deliver(client.chunk(1, 0, seen(0, 1)), timeout=5)


# A full buffer.


def test_full_buffer_takes_nothing_until_there_is_room():
    with exporting(capacity_steps=4) as server, Uploader(server.address) as client:
        client.fly()
        client.deliver(client.chunk(1, 0, seen(0, 1, 2, 3, 4)))
        call = client.begin_upload(client.chunk(1, 4, seen(4, 5)))
        waiting(server)
        assert server.ledger()["received"] == 4
        (first,) = server.collect(4)
        assert call.result().accepted_sequence == 2
        (second,) = server.collect(1)
        assert (first.steps, second.steps) == (4, 1)


def test_upload_that_waits_too_long_for_room_has_left_nothing():
    with (
        exporting(capacity_steps=2, wait_timeout_s=0.15) as server,
        Uploader(server.address) as client,
    ):
        client.fly()
        client.deliver(client.chunk(1, 0, seen(0, 1, 2)))
        chunk = client.chunk(1, 2, seen(2, 3))
        says = ("2 steps", "wait_timeout_s=0.15", "when_full")
        for _ in range(2):
            with refused(EXHAUSTED, Reason.LIMIT_EXCEEDED, "", *says) as found:
                client.upload(chunk)
            assert found[0].retry_after_s is not None
        assert server.ledger()["received"] == 2
        server.collect(2)
        assert client.deliver(chunk).accepted_sequence == 2


def test_uploads_get_room_in_the_order_they_came():
    with (
        exporting(capacity_steps=2) as server,
        Uploader(server.address) as first,
        Uploader(server.address) as second,
        Uploader(server.address) as third,
    ):
        for client in (first, second, third):
            client.fly()
        first.deliver(first.chunk(1, 0, seen(0, 1, 2)))
        calls = []
        for client, value in ((second, 10), (third, 20), (first, 30)):
            chunk = client.chunk(2, 0, seen(value, value + 1, value + 2))
            calls.append(client.begin_upload(chunk))
            waiting(server, len(calls))
        got = [observations_of(server.collect(2)[0])[0] for _ in range(4)]
        assert got == [0, 10, 20, 30]
        for call in calls:
            call.result()


def test_repeat_beside_the_call_that_still_waits_for_room_is_stored_once():
    with exporting(capacity_steps=2) as server, Uploader(server.address) as client:
        client.fly()
        client.deliver(client.chunk(1, 0, seen(0, 1, 2)))
        chunk = client.chunk(1, 2, seen(2, 3))
        calls = []
        for number in (1, 2):
            calls.append(client.begin_upload(chunk))
            waiting(server, number)
        server.collect(2)
        assert [call.result().accepted_sequence for call in calls] == [2, 2]
        assert server.ledger()["received"] == 3


def test_evaluation_goes_on_while_the_buffer_is_full():
    with exporting(capacity_steps=1) as server, Uploader(server.address) as client:
        client.fly()
        client.deliver(client.chunk(1, 0, seen(0, 1)))
        client.deliver(
            client.chunk(2, 0, seen(0, 1), status=TERMINATED),
            starts=[pb.EpisodeStart(episode=2, evaluation=True)],
            timeout=5,
        )


def test_repeats_are_acknowledged_while_the_buffer_is_full():
    with exporting(capacity_steps=1) as server, Uploader(server.address) as client:
        client.fly()
        chunk = client.chunk(1, 0, seen(0, 1))
        for _ in range(2):
            client.deliver(chunk, timeout=5)


def test_discarding_buffer_never_delays_and_counts_what_it_drops():
    with (
        exporting(capacity_steps=8, when_full="discard") as server,
        Uploader(server.address) as client,
    ):
        client.fly()
        for number in range(1, 6):
            chunk = client.chunk(number, 0, seen(0, 1, 2, 3, 4), status=TERMINATED)
            answer = client.deliver(chunk, timeout=5)
        assert server.ledger() == {
            "received": 20, "delivered": 0, "discarded_full": 12, "held": 8
        }  # fmt: skip
        # What was discarded need not come again either.
        assert (answer.accepted_sequence, answer.delivered_sequence) == (5, 3)
        ends = [chunk.end for chunk in server.collect(8)]
        assert [end.episode_return for end in ends] == [4.0] * 5
