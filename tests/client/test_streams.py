"""Streams that end alone: another one goes on over the same connection, and nothing is lost.

And the stream of an asyncio client that runs one episode: its task receives the answers itself.
"""

import asyncio
import contextlib
import logging
import signal
import threading
import time

import numpy as np
import pytest

from client_sdk import AsyncPolicyClient, PolicyTimeout, Timeouts, aio_remote_actor, remote_actor
from client_sdk.aio_transport import AioStream
from client_sdk.errors import ClosedClientError
from tests.client.support import PATIENCE_S, QUICK, Relay, all_seen, connected, seen
from tests.servers import serving

HASTY = Timeouts(connect_s=3.0, action_s=0.5, reconnect_s=3.0, close_s=0.5)


def silent_at_first(scripted, requests=1):
    """A script that leaves so many requests without an answer."""
    left = iter(range(requests))
    return lambda request: scripted.answer(request) if next(left, None) is None else None


def episodes_of(request):
    (rows,) = request.act.groups
    return list(rows.episodes)


@contextlib.contextmanager
def nothing_lost(client, scripted, caplog):
    """What happens within costs no connection."""
    with caplog.at_level(logging.INFO, "client_sdk"):
        yield
    assert client.stats.reconnects == client.stats.sessions_lost == 0
    assert len(scripted.hellos) == 1
    assert "lost" not in caplog.text


# -- a call that ends without its answer -----------------------------------------------------------


@pytest.mark.parametrize("forks_survive", ["0", "1"])
def test_a_timeout_costs_neither_the_connection_nor_the_step(
    kind, scripted, caplog, monkeypatch, forks_survive
):
    monkeypatch.setenv("GRPC_ENABLE_FORK_SUPPORT", forks_survive)
    with (
        connected(kind, scripted.address, timeouts=HASTY) as client,
        nothing_lost(client, scripted, caplog),
    ):
        episode = client.episode()
        for step in range(2):
            episode.act(seen(step))
            scripted.next_asked()
        for step in range(2, 5):
            scripted.on_act = silent_at_first(scripted)
            start = time.monotonic()
            with pytest.raises(PolicyTimeout, match="same step"):
                episode.act(seen(step))
            assert 0.4 < time.monotonic() - start < 5.0
            assert episode.act(seen(step)) == 0
            assert scripted.next_asked() == scripted.next_asked()
        assert episode.act(seen(5)) == 0
        assert list(scripted.next_asked().act.groups[0].steps) == [5]


@contextlib.contextmanager
def interrupted_after(seconds):
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("forks_survive", ["0", "1"])
def test_an_interrupt_costs_neither_the_connection_nor_the_step(
    scripted, caplog, monkeypatch, forks_survive
):
    monkeypatch.setenv("GRPC_ENABLE_FORK_SUPPORT", forks_survive)
    with (
        connected("sync", scripted.address) as client,
        nothing_lost(client, scripted, caplog),
    ):
        episode = client.episode()
        for step in range(3):
            scripted.on_act = silent_at_first(scripted)
            with interrupted_after(0.2):
                episode.act(seen(step))
            assert episode.act(seen(step)) == 0
            assert scripted.next_asked() == scripted.next_asked()
        episode.end(seen(3))
        assert list(scripted.next_asked().act.groups[0].steps) == [3]


class Struck:
    """gRPC's side of a call, with an interrupt just when it has taken something to send."""

    def __init__(self, call):
        self._call = call

    def __getattr__(self, name):
        return getattr(self._call, name)

    def operate(self, operations, due):
        self.operate = self._call.operate  # from the next time on
        self._call.operate(operations, due)
        raise KeyboardInterrupt


@pytest.mark.parametrize("verb", ["act", "end"])
def test_interrupts_of_what_sends_cost_no_more(scripted, caplog, verb):
    with (
        connected("sync", scripted.address, timeouts=HASTY) as client,
        nothing_lost(client, scripted, caplog),
    ):
        episodes = [client.episode() for _ in range(3)]
        for episode in episodes:
            episode.act(seen(0))
        for episode in episodes:
            if (stream := client._actor._stream) is None:
                break  # another one begins with the next call that waits
            stream._call = Struck(stream._call)
            with pytest.raises(KeyboardInterrupt):
                getattr(episode, verb)(seen(1))
        with client.episode() as another:
            for step in range(3):
                assert another.act(seen(step)) == 0


def test_a_client_that_is_idle_after_a_timeout_keeps_its_session(kind):
    with (
        serving(hold=True, hold_timeout_s=PATIENCE_S, lease_s=0.5, need_logp=False) as server,
        connected(kind, server.address, timeouts=HASTY) as client,
    ):
        with pytest.raises(PolicyTimeout):
            client.get_action(client.start_episode(), seen(0))
        threading.Event().wait(1.5)  # thrice the lease
        assert server.server.stats()["sessions_expired"] == 0


# -- nobody waits for an answer --------------------------------------------------------------------


def test_an_end_arrives_though_the_client_says_nothing_more(kind, scripted):
    with connected(kind, scripted.address) as client:
        episode = client.episode()
        episode.act(seen(0))
        scripted.next_asked()
        episode.end(seen(1))
        assert list(scripted.next_asked().act.groups[0].statuses) == [2]


@pytest.mark.parametrize(
    ("kind", "actor"), [("sync", remote_actor), ("aio", aio_remote_actor)], ids=["sync", "aio"]
)
def test_more_ends_than_may_be_unanswered_arrive_in_a_row(scripted, kind, actor):
    many = actor.MAX_UNANSWERED + 50
    with connected(kind, scripted.address) as client:
        begun = [client.start_episode() for _ in range(many)]
        for episode_id in begun:
            client.get_action(episode_id, seen(0))
        ended = set()
        for episode_id in begun:
            client.end_episode(episode_id, seen(1))
        for _ in range(2 * many):
            asked = scripted.next_asked()
            if list(asked.act.groups[0].statuses) == [2]:
                ended.update(episodes_of(asked))
        assert len(ended) == many
        assert client.stats.reconnects == 0


# -- one episode of an asyncio client --------------------------------------------------------------


@pytest.fixture
def asks(monkeypatch):
    """Every question whose answer its own task received."""
    asked = []

    async def ask(stream, question):
        asked.append(question)
        return await original(stream, question)

    original = AioStream.ask
    monkeypatch.setattr(AioStream, "ask", ask)
    return asked


@pytest.fixture(params=[True, False], ids=["questions", "no questions"])
def questions(request, monkeypatch):
    """Whether gRPC has what they need, or has changed inside."""
    if not request.param:
        monkeypatch.setattr("client_sdk.aio_transport._QUESTIONS", False)
    return request.param


def run(main, address, timeouts=QUICK):
    """Run that with a client."""

    async def within():
        async with (
            asyncio.timeout(3 * PATIENCE_S),
            AsyncPolicyClient(address, timeouts=timeouts) as client,
        ):
            await main(client)

    asyncio.run(within())


async def arrived(scripted):
    """The next request that the server has received."""
    return await asyncio.to_thread(scripted.next_asked)


async def warm(episode, scripted):
    """Two steps: from here on, a question may be asked."""
    for step in range(2):
        assert await episode.act(seen(step)) == 0
        await arrived(scripted)


def test_one_episode_receives_its_answers_itself(scripted, asks, questions):
    async def main(client):
        async with client.episode() as episode:
            for step in range(20):
                assert await episode.act(seen(step), 1.0 if step else 0.0) == 0
            await episode.end(seen(20), 1.0)

    run(main, scripted.address)
    assert (len(asks) >= 18) if questions else not asks
    told = [scripted.next_asked().act.groups[0] for _ in range(21)]
    assert [list(rows.steps) for rows in told] == [[step] for step in range(21)]


def test_one_episode_after_the_other_receives_its_answers_itself(scripted, asks):
    async def main(client):
        for _ in range(5):
            async with client.episode() as episode:
                for step in range(20):
                    await episode.act(seen(step))

    run(main, scripted.address)
    assert len(asks) >= 5 * 18


def test_a_batch_alone_receives_its_answers_itself(scripted, asks, questions):
    async def main(client):
        async with client.episodes(4) as batch:
            for step in range(20):
                actions = await batch.act(all_seen(*[step] * 4), [1.0] * 4 if step else None)
                assert actions.tolist() == [0] * 4

    run(main, scripted.address)
    assert (len(asks) >= 18) if questions else not asks


def test_with_a_second_episode_the_reader_receives(scripted, asks):
    async def main(client):
        async with client.episode() as one, client.episode() as two:
            for step in range(10):
                await one.act(seen(step))
                await asyncio.gather(one.act(seen(step)), two.act(seen(step)))

    run(main, scripted.address)
    assert not asks


def test_a_cancelled_act_costs_neither_the_connection_nor_the_step(scripted, caplog):
    async def main(client):
        with nothing_lost(client, scripted, caplog):
            async with client.episode() as episode:
                await warm(episode, scripted)
                for step in range(2, 5):
                    scripted.on_act = silent_at_first(scripted)
                    with pytest.raises(TimeoutError):
                        await asyncio.wait_for(episode.act(seen(step)), 0.2)
                    assert await episode.act(seen(step)) == 0
                    assert await arrived(scripted) == await arrived(scripted)

    run(main, scripted.address)


def test_a_cancelled_act_of_a_batch_is_answered_by_the_next(scripted, caplog):
    async def main(client):
        with nothing_lost(client, scripted, caplog):
            async with client.episodes(2) as batch:
                for step in range(2):
                    await batch.act(all_seen(step, step), [1.0, 1.0] if step else None)
                scripted.on_act = silent_at_first(scripted)
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(batch.act(all_seen(2, 2), [1.0, 1.0]), 0.2)
                assert (await batch.act(all_seen(2, 2), [1.0, 1.0])).tolist() == [0, 0]

    run(main, scripted.address)


def test_cancellation_may_strike_anywhere(scripted, questions):
    random = np.random.default_rng(1)

    async def main(client):
        episode = client.episode()
        await warm(episode, scripted)
        for step in range(2, 150):
            while True:
                try:
                    async with asyncio.timeout(random.uniform(0.0, 3e-3)):
                        assert await episode.act(seen(step)) == 0
                    break
                except TimeoutError:
                    # Now and then its answer comes first.
                    if random.random() < 0.5:
                        assert await episode.act(seen(step)) == 0
                        break
        assert client.stats.sessions_lost == 0
        assert client.stats.requests == 150

    run(main, scripted.address)
    steps = [0]
    while not scripted.asked.empty():
        (step,) = scripted.next_asked().act.groups[0].steps
        steps.append(step)
    assert set(steps) == {0, *range(2, 150)}
    assert steps == sorted(steps)


def test_a_task_cancelled_while_its_request_is_written_costs_no_connection(scripted, caplog):
    async def main(client):
        with nothing_lost(client, scripted, caplog):
            episodes = [client.episode() for _ in range(3)]
            for step in range(60):
                acts = [asyncio.create_task(episode.act(seen(step))) for episode in episodes]
                for _ in range(1 + step % 4):
                    await asyncio.sleep(0)
                acts[0].cancel()
                await asyncio.gather(*acts, return_exceptions=True)
                assert await episodes[0].act(seen(step)) == 0
                assert [await act for act in acts[1:]] == [0, 0]

    run(main, scripted.address)


@pytest.mark.parametrize("held", ["unanswered", "unread"])
def test_another_episode_does_not_wait_for_an_answer_that_is_held_back(scripted, caplog, held):
    released = threading.Event()

    async def main(client):
        with nothing_lost(client, scripted, caplog):
            one = client.episode()
            await warm(one, scripted)
            answer = silent_at_first(scripted)

            def on_act(request):
                if (response := answer(request)) is None and held == "unread":
                    released.wait(PATIENCE_S)
                return response

            scripted.on_act = on_act
            first = asyncio.create_task(one.act(seen(2)))
            asked = await arrived(scripted)
            two = client.episode()
            start = time.monotonic()
            assert await two.act(seen(7)) == 0
            assert time.monotonic() - start < 5.0
            assert await first == 0
            assert await arrived(scripted) == asked  # on another stream
            for step in range(3, 6):
                assert await asyncio.gather(one.act(seen(step)), two.act(seen(step))) == [0, 0]
        released.set()

    try:
        run(main, scripted.address)
    finally:
        released.set()


def test_another_episode_that_begins_under_a_question_is_answered_too(scripted, caplog):
    released = threading.Event()
    released.set()

    def on_act(request):
        released.wait(PATIENCE_S)
        return scripted.answer(request)

    async def main(client):
        with nothing_lost(client, scripted, caplog):
            one = client.episode()
            await warm(one, scripted)
            released.clear()
            first = asyncio.create_task(one.act(seen(2)))
            await arrived(scripted)
            two = client.episode()
            second = asyncio.create_task(two.act(seen(7)))
            await asyncio.sleep(0)  # so that it has begun
            await asyncio.sleep(0)
            released.set()
            assert await asyncio.gather(first, second) == [0, 0]
            assert await asyncio.gather(one.act(seen(3)), two.act(seen(3))) == [0, 0]

    scripted.on_act = on_act
    run(main, scripted.address, Timeouts(action_s=2.0, close_s=0.5))


def test_an_end_is_not_kept_from_the_server_by_a_question(scripted, caplog):
    async def main(client):
        with nothing_lost(client, scripted, caplog):
            one, two = client.episode(), client.episode()
            for episode in (one, two):
                await warm(episode, scripted)
            await two.end(seen(2))  # it is no more among the episodes that run
            await arrived(scripted)
            await one.act(seen(2))
            await arrived(scripted)
            scripted.on_act = silent_at_first(scripted)
            first = asyncio.create_task(one.act(seen(3)))
            asked = await arrived(scripted)
            three = client.episode()
            assert await three.act(seen(0)) == 0
            await three.end(seen(1))
            assert await first == 0
            told = [await arrived(scripted) for _ in range(3)]
            assert asked in told
            assert [2] in [list(each.act.groups[0].statuses) for each in told]

    run(main, scripted.address)


def test_closing_releases_the_one_act_under_way(scripted, questions):
    async def main(client):
        episode = client.episode()
        await warm(episode, scripted)
        scripted.on_act = silent_at_first(scripted)
        acting = asyncio.create_task(episode.act(seen(2)))
        await arrived(scripted)
        start = time.monotonic()
        await client.close()
        with pytest.raises(ClosedClientError, match="closed"):
            await acting
        assert time.monotonic() - start < 5.0

    run(main, scripted.address)


def test_a_stream_that_the_server_ends_under_the_one_act_is_begun_anew(scripted, questions, caplog):
    failures = iter([RuntimeError("a bug of the server")])

    def on_act(request):
        for failure in failures:
            raise failure
        return scripted.answer(request)

    async def main(client):
        episode = client.episode()
        await warm(episode, scripted)
        scripted.on_act = on_act
        assert await episode.act(seen(2)) == 0
        assert await arrived(scripted) == await arrived(scripted)
        assert await episode.act(seen(3)) == 0
        assert client.stats.reconnects == 1
        assert client.stats.sessions_lost == 0

    with caplog.at_level(logging.INFO, "client_sdk"):
        run(main, scripted.address)
    assert "lost" in caplog.text


def test_a_connection_that_is_cut_under_the_one_act_is_made_again(scripted, questions):
    async def main(client):
        episode = client.episode()
        await warm(episode, scripted)
        for step in range(2, 5):
            scripted.on_act = silent_at_first(scripted)
            acting = asyncio.create_task(episode.act(seen(step)))
            asked = await arrived(scripted)
            relay.cut()
            assert await acting == 0
            assert await arrived(scripted) == asked
        assert client.stats.reconnects == 3

    with Relay(scripted.address) as relay:
        run(main, relay.address)


def test_a_connection_lost_between_acts_is_found_by_the_idle_reader(scripted, asks):
    async def main(client):
        episode = client.episode()
        await warm(episode, scripted)
        relay.cut()
        until = time.monotonic() + PATIENCE_S
        while client.stats.reconnects == 0:
            assert time.monotonic() < until
            await asyncio.sleep(0.01)
        for step in range(2, 10):
            assert await episode.act(seen(step)) == 0

    with Relay(scripted.address) as relay:
        run(main, relay.address)
    assert len(asks) >= 8  # also on the new connection


class CountedWrites:
    """A call of gRPC's that tells how many writes were under way at once: it bears one."""

    _cython_call = object()

    def __init__(self):
        self.writing = self.most = 0

    def add_done_callback(self, _):
        pass

    async def write(self, _):
        self.writing += 1
        self.most = max(self.most, self.writing)
        for _ in range(5):
            await asyncio.sleep(0)
        self.writing -= 1


def test_what_a_question_kept_back_is_not_written_beside_something_else(monkeypatch):
    answered = None

    async def execute_batch(*_):
        await answered.wait()

    async def main():
        nonlocal answered
        answered, call = asyncio.Event(), CountedWrites()
        stream = AioStream(call)
        asking = asyncio.create_task(stream.ask(b"question"))
        await asyncio.sleep(0)
        await stream.send(b"kept back")
        answered.set()
        await asyncio.gather(asking, stream.send(b"another"))
        await stream._flusher
        assert call.most == 1

    monkeypatch.setattr("client_sdk.aio_transport.cygrpc.execute_batch", execute_batch)
    asyncio.run(main())
