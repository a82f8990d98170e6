"""How fast clients may be: a limit over time, named to whoever exceeds it, at nobody else's cost."""

from __future__ import annotations

import grpc
import numpy as np
import pytest

from client_sdk.wire.faults import Fault, Reason
from policy_server.rate_limits import RateLimit
from tests.server.exporting import exporting
from tests.server.talk import (
    Talker,
    actions_of,
    check_fault,
    eventually,
    faults_of,
    refused,
    rows,
    seen,
)
from tests.server.uploading import Uploader
from tests.servers import serving

EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
STEP_RATE = ("max_steps_per_second_per_session=20", "nothing was taken", "raise that setting")
OPEN_RATE = ("max_sessions_opened_per_second=1", "raise that setting")


class Clock:
    """Goes when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def limit(clock):
    # An eighth of a second is a binary fraction: sums of it are exact.
    return RateLimit("some_setting", 8.0, pause_s=0.1, longest_s=5.0, clock=clock)


def in_the_end(call):
    """What a call returns once it is not refused any more."""
    answers = []

    def answered() -> bool:
        try:
            answers.append(call())
        except grpc.RpcError as error:
            if error.code() is not EXHAUSTED:
                raise
        return bool(answers)

    eventually(answered)
    return answers[0]


def takes(meter) -> bool:
    try:
        meter.take(1)
    except Fault:
        return False
    return True


def test_on_average_it_is_the_pace_that_was_set(limit, clock):
    meter, taken = limit.meter(), 0
    for _ in range(10_000):  # 100 seconds
        taken += takes(meter)
        clock.now += 0.01
    # 8 by second, and those of the first burst.
    assert 800 <= taken <= 809
    assert limit.refused == 10_000 - taken


def test_whoever_was_silent_has_one_burst_and_no_more(limit, clock):
    meter = limit.meter()
    clock.now += 3600.0
    assert sum(takes(meter) for _ in range(100)) == 9


def test_who_is_refused_is_told_when_it_is_worth_coming_again(limit, clock):
    meter = limit.meter()
    meter.take(24)  # at once, for the meter was idle
    waits = []
    for _ in range(100):
        with pytest.raises(Fault) as caught:
            meter.take(1)
        waits.append(caught.value.retry_after_s)
    # Due in 3 s; a second of it is the burst.
    assert all(2.0 + 0.05 <= wait <= 2.0 + 0.15 for wait in waits)
    assert len(set(waits)) > 50  # so that not all come back at once
    clock.now += 1.99
    assert not takes(meter)
    clock.now += 0.02
    assert takes(meter)


def test_nobody_is_sent_away_for_long(limit):
    meter = limit.meter()
    meter.take(1_000_000)
    with pytest.raises(Fault) as caught:
        meter.take(1)
    assert caught.value.retry_after_s == 5.0


def test_meters_of_one_limit_know_nothing_of_each_other(limit):
    one, other = limit.meter(), limit.meter()
    one.take(1000)
    assert not takes(one)
    assert takes(other)


def test_too_many_steps_are_refused_and_others_are_served():
    with (
        serving(max_steps_per_second_per_session=20) as server,
        Talker(server.address) as hasty,
        Talker(server.address) as other,
    ):
        episodes = range(1, 41)
        hasty.act(rows(episodes, [0] * 40, seen(*episodes)))  # 2 seconds' worth
        more = rows(episodes, [1] * 40, seen(*episodes), rewards=[1.0] * 40)
        received = server.ledger()["received"]
        with refused(EXHAUSTED, Reason.LIMIT_EXCEEDED, "", *STEP_RATE) as found:
            hasty.act(more)
        assert 0.5 < found[0].retry_after_s < 1.1
        assert server.ledger()["received"] == received
        assert server.server.stats()["requests_over_rate"] == 1
        other.play(1, 5)
        # The very same request is welcome later.
        answer = in_the_end(lambda: hasty.act(more)).groups[0]
        assert actions_of(answer) == [0] * 40
        assert not faults_of(answer)


def test_a_stream_that_is_too_fast_goes_on():
    with serving(max_steps_per_second_per_session=20) as server, Talker(server.address) as talker:
        stream, step, refusals = talker.stream(), 0, []

        def ask() -> None:
            nonlocal step
            reward = {"rewards": [1.0]} if step else {}
            answer = stream.ask(rows([1], [step], seen(step), **reward))
            if answer.HasField("error"):
                refusals.append(Fault.from_detail(answer.error))
            else:
                assert actions_of(answer.act.groups[0]) == [0]
                step += 1

        while not refusals:
            ask()
        assert step > 20  # a burst comes first
        check_fault(refusals[0], Reason.LIMIT_EXCEEDED, "", *STEP_RATE)
        assert refusals[0].retry_after_s > 0
        taken = step

        def goes_on() -> bool:
            ask()
            return step > taken

        eventually(goes_on)


def test_requests_without_steps_are_always_taken():
    with serving(max_steps_per_second_per_session=20) as server, Talker(server.address) as talker:
        talker.act(rows(range(1, 41), [0] * 40, seen(*range(40))))
        for _ in range(100):
            talker.act()
        with refused(EXHAUSTED, Reason.LIMIT_EXCEEDED, "", *STEP_RATE):
            talker.act(rows([50], [0], seen(0)))


def test_too_many_uploaded_steps_are_refused_and_welcome_later():
    settings = {"max_steps_per_second_per_session": 20}
    with exporting(**settings) as server, Uploader(server.address) as client:
        client.fly()
        chunks = [client.chunk(n, 0, seen(*range(41))) for n in (1, 2)]
        client.deliver(chunks[0])
        received = server.ledger()["received"]
        with refused(EXHAUSTED, Reason.LIMIT_EXCEEDED, "", *STEP_RATE):
            client.upload(chunks[1])
        assert server.ledger()["received"] == received
        assert in_the_end(lambda: client.upload(chunks[1])).accepted_sequence == 2
        assert server.ledger()["received"] == 2 * received


def test_uploads_that_come_again_are_not_counted_twice():
    settings = {"max_steps_per_second_per_session": 20, "hold": True, "hold_timeout_s": 0.05}
    with exporting(**settings) as server, Uploader(server.address) as client:
        client.fly()
        chunk = client.chunk(1, 0, seen(*range(21)))
        for _ in range(20):  # 400 steps, had each of them been new
            with refused(grpc.StatusCode.UNAVAILABLE, Reason.NOT_READY):
                client.upload(chunk)
        assert server.server.stats()["requests_over_rate"] == 0


def test_who_uploads_too_fast_has_the_newest_policy_all_the_same():
    settings = {"max_steps_per_second_per_session": 20}
    with exporting(**settings) as server, Uploader(server.address) as client:
        client.fly()
        client.deliver(client.chunk(1, 0, seen(*range(41))))
        for _ in range(100):
            client.download()
        with refused(EXHAUSTED, Reason.LIMIT_EXCEEDED, "", *STEP_RATE):
            client.upload(client.chunk(2, 0, seen(0, 1)))


def test_sessions_that_come_too_fast_are_refused_and_open_ones_are_served():
    with serving(max_sessions_opened_per_second=1) as server, Talker(server.address) as first:
        with (
            Talker(server.address, connect=False) as talker,
            refused(EXHAUSTED, Reason.LIMIT_EXCEEDED, "", *OPEN_RATE) as found,
        ):
            for _ in range(100):
                talker.open()
        assert 0.5 <= found[0].retry_after_s <= 5.0
        assert first.step(1, 0) == 0
        assert server.server.stats()["requests_over_rate"] == 1
        # A connection that broke may come back at any time.
        for _ in range(5):
            first.open(session_id=first.session_id)
        assert first.step(1, 1, 0.0, 1.0) == 0


def test_waiting_ends_within_a_lease():
    settings = {"max_steps_per_second_per_session": 1, "lease_s": 0.9}
    with serving(**settings) as server, Talker(server.address) as talker:
        talker.act(rows(range(1, 101), [0] * 100, seen(*range(100))))
        with refused(EXHAUSTED, Reason.LIMIT_EXCEEDED) as found:
            talker.act(rows([200], [0], seen(0)))
        assert found[0].retry_after_s == pytest.approx(0.3)


def test_a_rate_counts_what_is_in_order_only():
    with serving(max_steps_per_second_per_session=20) as server, Talker(server.address) as talker:
        malformed = rows([1], [0], np.zeros((1, 3), np.float32))
        for _ in range(100):
            answer = talker.begin(malformed)
            with pytest.raises(grpc.RpcError) as caught:
                answer.result()
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert actions_of(talker.act(rows([1], [0], seen(0))).groups[0]) == [0]
