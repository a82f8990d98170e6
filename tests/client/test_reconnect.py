"""Lost connections, restarted servers and unreachable ones, for both clients."""

import contextlib
import logging
import re
import socket
import threading
import time

import numpy as np
import pytest

from client_sdk import BatchError, PolicyTimeout, Timeouts
from client_sdk.config import Address
from client_sdk.diagnosis import diagnose
from client_sdk.endpoint import Endpoint
from client_sdk.errors import (
    ClosedClientError,
    ConnectError,
    ConnectRefused,
    ConnectTimeout,
    InternalServerError,
    NameNotResolved,
)
from tests.client.support import PATIENCE_S, Relay, all_seen, connect_once, connected, seen
from tests.servers import serving

BRIEF = Timeouts(connect_s=1.0, action_s=5.0, reconnect_s=1.0, close_s=0.5)


@pytest.fixture
def relay(server):
    with Relay(server.address) as relay:
        yield relay


def port_of(server):
    return int(server.address.rpartition(":")[2])


def chunks_of(server):
    return [chunk for chunk in server.collect(10_000, timeout_s=0.1) if chunk.steps]


# -- the same session goes on ----------------------------------------------------------------------


def test_a_cut_connection_costs_nothing(kind, server, relay):
    with connected(kind, relay.address) as client:
        with client.episode("kept") as episode:
            episode.act(seen(0))
            for step in range(1, 6):
                relay.cut()
                episode.act(seen(step), 1.0)
            episode.end(seen(6), 1.0)
        assert client.stats.reconnects >= 1
        assert client.stats.sessions_lost == 0
    assert server.unaccounted() == 0
    assert server.server.stats()["sessions_opened"] == 1
    chunks = chunks_of(server)
    assert [reward for chunk in chunks for reward in chunk.rewards] == [1.0] * 6
    assert chunks[-1].end.reported


def test_what_was_said_while_away_arrives(kind, server, relay):
    with connected(kind, relay.address) as client:
        episode_id = client.start_episode()
        client.get_action(episode_id, seen(0))
        relay.cut()
        client.log_returns(episode_id, 3.0)
        client.end_episode(episode_id, seen(1))
    (chunk,) = chunks_of(server)
    assert (chunk.rewards, chunk.terminated) == ([3.0], True)


def test_a_batch_survives_a_cut(kind, server, relay):
    with connected(kind, relay.address) as client, client.episodes(3) as batch:
        batch.act(all_seen(0, 10, 20))
        relay.cut()
        batch.act(all_seen(1, 11, 21), [1, 2, 3], [True, True, True])
        relay.cut()
        batch.act(all_seen(2, 12, 22))
    assert sorted(chunk.rewards for chunk in chunks_of(server)) == [[1.0], [2.0], [3.0]]


def test_a_connection_that_falls_silent_is_given_up_in_time(kind, server, relay):
    with connected(kind, relay.address, timeouts=Timeouts(action_s=100.0)) as client:
        episode = client.episode()
        assert episode.act(seen(0)) == 0
        relay.silence()
        begin = time.monotonic()
        assert episode.act(seen(1), 1.0) == 0
        assert time.monotonic() - begin < 30
        assert client.stats.reconnects == 1
        episode.end(seen(2), 1.0, terminated=True)


def test_the_loss_and_the_return_are_logged(kind, relay, caplog):
    with caplog.at_level(logging.INFO, "client_sdk"), connected(kind, relay.address) as client:
        episode_id = client.start_episode()
        client.get_action(episode_id, seen(0))
        relay.cut()
        client.get_action(episode_id, seen(1))
    assert f"connection to {relay.address} lost" in caplog.text
    assert f"connected to {relay.address} again" in caplog.text


# -- another session goes on -----------------------------------------------------------------------


@contextlib.contextmanager
def restarted(server):
    """The same port, by a server that knows nothing."""
    server.server.stop()
    with serving(need_logp=False, port=port_of(server)) as another:
        yield another


def test_episodes_go_on_as_new_ones_after_a_restart(kind, server, caplog):
    with connected(kind, server.address) as client:
        idle = client.start_episode("idle")
        client.get_action(idle, seen(50))
        with client.episode("busy") as episode, client.episodes(2) as batch:
            episode.act(seen(0))
            batch.act(all_seen(10, 20))
            with restarted(server) as another:
                episode.act(seen(1), 7.0)
                episode.act(seen(2), 1.0)
                episode.end(seen(3), 2.0)
                batch.act(all_seen(11, 21), [7, 7])
                batch.act(all_seen(12, 22), [3, 4], [True, False])
                client.log_returns(idle, 9.0)
                client.get_action(idle, seen(51))
                client.log_returns(idle, 5.0)
                client.end_episode(idle, seen(52))
                batch.close()
                client.close()
                assert another.unaccounted() == 0
                chunks = chunks_of(another)
    told = {chunk.identity.label or "batch": chunk for chunk in chunks}
    assert told["busy"].rewards == [1.0, 2.0]
    assert told["idle"].rewards == [5.0]
    assert told["batch"].rewards == [3.0]
    assert not any(chunk.end.reported for chunk in chunks)
    assert client.stats.sessions_lost == 1
    assert client.stats.episodes_resumed == 4
    assert "4 running episodes go on as new ones" in caplog.text


def test_a_first_row_lost_with_its_server_is_said_again_as_it_was(kind, server):
    with connected(kind, server.address) as client, restarted(server) as another:
        with client.episode("x") as episode:
            episode.act(seen(0))
            episode.end(seen(1), 1.0)
        client.close()
        (chunk,) = chunks_of(another)
    assert chunk.end.reported
    assert chunk.identity.label == "x"


def test_an_end_lost_with_its_server_is_counted(kind, server, relay):
    with connected(kind, relay.address) as client:
        episode_id = client.start_episode()
        client.get_action(episode_id, seen(0))
        relay.open = False
        relay.cut()
        client.end_episode(episode_id, seen(1))
        with restarted(server) as another:
            relay.open = True
            client.get_action(client.start_episode(), seen(5))
            client.close()
            assert another.ledger()["received"] == 0
    assert client.stats.ends_lost == 1


def test_a_lower_policy_version_is_taken_from_a_restarted_server(kind, server):
    server.publish(9)
    with connected(kind, server.address) as client:
        episode_id = client.start_episode()
        client.get_action(episode_id, seen(0))
        assert client.policy_version == 9
        with restarted(server):
            client.get_action(episode_id, seen(1))
            assert client.policy_version == 1


def test_away_for_longer_than_the_lease_is_another_session(kind):
    with (
        serving(lease_s=0.3, need_logp=False) as server,
        Relay(server.address) as relay,
        connected(kind, relay.address) as client,
    ):
        with client.episode() as episode:
            episode.act(seen(0))
            episode.act(seen(1), 1.0)
            relay.open = False
            relay.cut()
            until = time.monotonic() + PATIENCE_S
            while server.server.stats()["sessions_expired"] == 0:
                assert time.monotonic() < until
                threading.Event().wait(0.01)
            relay.open = True
            episode.act(seen(2), 1.0)
            episode.end(seen(3), 4.0)
        client.close()
        chunks = chunks_of(server)
        assert sorted(chunk.rewards for chunk in chunks) == [[1.0], [4.0]]
        assert client.stats.sessions_lost == 1


# -- nobody answers --------------------------------------------------------------------------------


def test_a_server_that_stays_away_is_an_error_in_bounded_time_and_the_client_recovers(kind, server):
    with connected(kind, server.address, timeouts=BRIEF) as client:
        episode = client.episode()
        episode.act(seen(0))
        server.server.stop()
        start = time.monotonic()
        with pytest.raises(ConnectRefused, match=re.escape(server.address)):
            episode.act(seen(1), 1.0)
        assert time.monotonic() - start < 5.0
        with restarted(server):
            episode.act(seen(1), 1.0)
            assert client.stats.episodes_resumed == 1


def unused_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def test_refused_says_that_nobody_listens(kind):
    start = time.monotonic()
    with pytest.raises(ConnectRefused, match="nobody listens"):
        connect_once(kind, f"127.0.0.1:{unused_port()}", timeouts=BRIEF)
    assert time.monotonic() - start < 3.0


def test_an_unknown_name_says_so(kind):
    with pytest.raises(NameNotResolved, match=r"nowhere\.invalid"):
        connect_once(kind, "nowhere.invalid:9900", timeouts=BRIEF)


def test_silence_says_that_nothing_answers(kind):
    # A full backlog drops what knocks, as a firewall does.
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            knock = stack.enter_context(socket.socket())
            knock.setblocking(False)
            knock.connect_ex(listener.getsockname())
        start = time.monotonic()
        with pytest.raises(ConnectTimeout, match="nothing answers"):
            connect_once(kind, f"127.0.0.1:{listener.getsockname()[1]}", timeouts=BRIEF)
        assert time.monotonic() - start < 3.0


def test_something_else_that_listens_is_told_apart(kind):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(ConnectTimeout, match="Is it a policy server"):
            connect_once(kind, address, timeouts=BRIEF)


def test_a_server_that_comes_up_late_is_waited_for(kind, server):
    port = port_of(server)
    server.server.stop()
    done = threading.Event()

    def serve():
        threading.Event().wait(0.3)
        with serving(port=port):
            done.wait(PATIENCE_S)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        connect_once(kind, server.address)
    finally:
        done.set()
        thread.join()


def test_diagnosis_ends_in_time_whatever_the_resolver_does(monkeypatch):
    stuck = threading.Event()

    def resolve(*_, **__):
        stuck.wait(PATIENCE_S)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    start = time.monotonic()
    error = diagnose(Endpoint(Address("slow.invalid", 1)), 1.0, "UNAVAILABLE", 0.2)
    stuck.set()
    assert isinstance(error, ConnectTimeout)
    assert time.monotonic() - start < 2.0


# -- hold ------------------------------------------------------------------------------------------


def test_a_held_action_is_asked_again_until_the_server_asks_for_experience(kind):
    with (
        serving(hold=True, hold_timeout_s=0.2, need_logp=False) as server,
        connected(kind, server.address) as client,
    ):
        until_asked = threading.Thread(target=lambda: server.collect(2, timeout_s=PATIENCE_S))
        with client.episode() as episode:
            threading.Timer(0.6, until_asked.start).start()
            episode.act(seen(0))
            assert client.stats.asked_again >= 1
            episode.act(seen(1), 1.0)
            episode.end(seen(2), 1.0)
        client.close()
        until_asked.join(PATIENCE_S)


def test_a_batch_with_an_ended_row_may_be_held_for_longer_than_a_lease(kind):
    with (
        serving(hold=True, hold_timeout_s=0.2, lease_s=0.5) as server,
        connected(kind, server.address) as client,
        client.episodes(2) as batch,
    ):
        first = threading.Thread(target=server.collect, args=(1000, 0.5))
        first.start()
        batch.act(all_seen(0, 0))
        first.join(5)
        learning = threading.Timer(2.0, server.collect, args=(1000, 0.5))
        learning.start()
        # The server is told of the end again and again.
        batch.act(all_seen(1, 1), [1.0, 1.0], [True, False])
        learning.join(5)
        assert client.stats.asked_again >= 5
        assert server.ledger()["received"] == 2


def test_the_end_of_an_episode_is_not_held(kind):
    with (
        serving(hold=True, hold_timeout_s=PATIENCE_S, need_logp=False) as server,
        connected(kind, server.address) as client,
    ):
        got = threading.Thread(target=lambda: server.collect(1, timeout_s=0.2))
        got.start()
        episode_id = client.start_episode()
        client.get_action(episode_id, seen(0))
        got.join()
        start = time.monotonic()
        client.end_episode(episode_id, seen(1))
        client.close()
        assert time.monotonic() - start < 2.0


def test_a_timeout_while_held_leaves_the_episode_usable(kind):
    with (
        serving(hold=True, hold_timeout_s=PATIENCE_S, need_logp=False) as server,
        connected(kind, server.address, timeouts=Timeouts(action_s=0.3, close_s=0.5)) as client,
        client.episodes(2) as batch,
    ):
        with pytest.raises(PolicyTimeout):
            batch.act(all_seen(0, 1))
        taking = threading.Thread(target=lambda: server.collect(2, timeout_s=PATIENCE_S))
        taking.start()
        assert batch.act(all_seen(0, 1)).tolist() == [0, 0]
        batch.act(all_seen(0, 1), [1, 1], [True, True])
        taking.join(PATIENCE_S)
        assert server.ledger()["received"] == 2


def test_closing_from_another_thread_wakes_a_held_call(kind):
    with (
        serving(hold=True, hold_timeout_s=PATIENCE_S) as server,
        connected(kind, server.address) as client,
    ):
        threading.Timer(0.3, client.close).start()
        start = time.monotonic()
        with pytest.raises((ClosedClientError, ConnectError)):
            client.get_action(client.start_episode(), np.zeros(4))
        assert time.monotonic() - start < 5.0


def test_abandoning_rows_after_a_timeout_keeps_the_answer_of_the_others(kind):
    with (
        serving(hold=True, hold_timeout_s=PATIENCE_S, need_logp=False) as server,
        connected(kind, server.address, timeouts=Timeouts(action_s=0.5, close_s=0.5)) as client,
        client.episodes(2) as batch,
    ):
        with pytest.raises(PolicyTimeout):
            batch.act(all_seen(0, 10))
        taking = threading.Thread(target=lambda: server.collect(2, timeout_s=PATIENCE_S))
        taking.start()
        batch.abandon([1])
        assert batch.act(all_seen(0, 10)).tolist() == [0, 0]
        assert server.ledger()["received"] == 0
        batch.act(all_seen(1, 20), [1, 1])
        assert server.ledger()["received"] == 1
        batch.act(all_seen(2, 21), [1, 1], [True, True])
        taking.join(PATIENCE_S)
        assert server.ledger()["received"] == 3


# -- the policy fails ------------------------------------------------------------------------------


class FailingPolicy:
    """One that cannot act."""

    version = 2

    def infer(self, observations, greedy, contexts):
        raise RuntimeError("no action")


def wait_until_none_is_open(server):
    until = time.monotonic() + PATIENCE_S
    while server.server.stats()["episodes_open"] > 0:
        assert time.monotonic() < until
        threading.Event().wait(0.01)


def test_episodes_whose_first_row_failed_do_not_stay_open(kind, server):
    server.policies.publish(FailingPolicy())
    with connected(kind, server.address) as client:
        for _ in range(50):
            with client.episode() as episode, pytest.raises(InternalServerError):
                episode.act(seen(0))
        ended = client.start_episode()
        with pytest.raises(InternalServerError):
            client.get_action(ended, seen(0))
        client.end_episode(ended, seen(0))
        wait_until_none_is_open(server)


def test_retried_first_calls_of_a_batch_do_not_leave_episodes_open(kind, server):
    server.policies.publish(FailingPolicy())
    with connected(kind, server.address) as client:
        with client.episodes(3) as batch:
            for _ in range(5):
                with pytest.raises((BatchError, InternalServerError)):
                    batch.act(all_seen(0, 1, 2))
            assert server.server.stats()["episodes_open"] <= 3
        wait_until_none_is_open(server)


def test_an_idle_client_keeps_its_session(kind):
    with (
        serving(lease_s=0.5, need_logp=False) as server,
        connected(kind, server.address) as client,
    ):
        threading.Event().wait(1.5)
        client.get_action(client.start_episode(), seen(0))
        assert client.stats.sessions_lost == client.stats.reconnects == 0
        assert server.server.stats()["sessions_expired"] == 0
        assert server.server.stats()["sessions_opened"] == 1
