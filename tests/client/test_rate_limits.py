"""What a client notices of a server that limits its pace: it waits, and loses nothing."""

import threading

import pytest

from client_sdk.config import Timeouts
from tests.client.acting_alone import serving_for
from tests.client.support import KINDS, LOCAL_KINDS, all_seen, connect_once, connected, seen
from tests.server.talk import eventually

RATE = 40.0
PATIENT = Timeouts(connect_s=5.0, action_s=10.0, reconnect_s=10.0, close_s=10.0)
MOST = "max_steps_per_second_per_session=40"


def play(client, steps):
    """One episode."""
    with client.episode() as episode:
        for step in range(steps):
            episode.act(seen(step), float(step > 0))
        episode.end(seen(steps), 1.0, terminated=True)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_beyond_the_pace_are_late_and_complete(kind, caplog):
    with serving_for(kind, max_steps_per_second_per_session=RATE) as server:
        with connected(kind, server.address) as client:
            play(client, 80)
            assert client.stats.asked_again > 0
        (chunk,) = server.collect(80)
        assert chunk.steps == 80
        assert [batch.observations[""][row][0] for batch, row in chunk.rows] == list(range(80))
        assert chunk.rewards == [1.0] * 80
        assert server.ledger()["received"] == 80
    # Once, though nearly every step was.
    assert caplog.text.count(MOST) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_beyond_the_pace_waits_as_a_whole(kind):
    with (
        serving_for(kind, max_steps_per_second_per_session=RATE) as server,
        connected(kind, server.address) as client,
    ):
        with client.episodes(50) as batch:
            none, zeros = [False] * 50, [0.0] * 50
            for step in range(3):
                assert batch.act(all_seen(*[step] * 50), zeros, none, none).shape == (50,)
        assert client.stats.rows_refused == 0
        assert client.stats.asked_again > 0
        eventually(lambda: server.ledger()["received"] == 100)


@pytest.mark.parametrize("kind", LOCAL_KINDS)
def test_uploads_beyond_the_pace_are_late_and_complete(kind, caplog):
    settings = {"max_steps_per_second_per_session": RATE, "steps_per_upload": 20}
    with serving_for(kind, **settings) as server:
        with connected(kind, server.address, timeouts=PATIENT) as client:
            play(client, 60)
            eventually(lambda: client.stats.steps_uploaded == 60)
            play(client, 60)
        # Closing has waited for the second.
        assert server.ledger()["received"] == 120
        assert server.server.stats()["requests_over_rate"] > 0
    assert caplog.text.count(MOST) == 1


@pytest.mark.parametrize("kind", LOCAL_KINDS)
def test_closing_in_hold_mode_waits_for_what_is_late(kind):
    settings = {"max_steps_per_second_per_session": RATE, "steps_per_upload": 20, "hold": True}
    with serving_for(kind, **settings) as server:
        over = threading.Event()

        def ask_for_experience():  # so that no answer is held back
            while not over.is_set():
                server.collect(1000, timeout_s=0.2)

        learner = threading.Thread(target=ask_for_experience)
        learner.start()
        try:
            with connected(kind, server.address, timeouts=PATIENT) as client:
                play(client, 60)
                eventually(lambda: client.stats.steps_uploaded == 60)
                play(client, 60)
        finally:
            over.set()
            learner.join(5)
        assert server.ledger()["received"] == 120


@pytest.mark.parametrize("kind", [*KINDS, *LOCAL_KINDS])
def test_more_clients_than_may_come_in_a_second_come_one_after_the_other(kind):
    with serving_for(kind, max_sessions_opened_per_second=2) as server:
        for _ in range(5):
            connect_once(kind, server.address)
        assert server.server.stats()["sessions_opened"] == 5
        assert server.server.stats()["requests_over_rate"] > 0
