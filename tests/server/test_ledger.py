"""Where every step went: received = delivered + discarded by reason + held, whoever dies."""

from __future__ import annotations

import contextlib
import random
from collections import defaultdict

import pytest

from client_sdk.wire import policyserver_pb2 as pb
from tests.server.talk import ABANDONED, TERMINATED, Talker, eventually, program, rows, seen
from tests.servers import serving

# Each row's observation is [client, that client's own count of rows, episode, step].
CLIENT = """
import itertools, random, sys
from tests.server.talk import RUNNING, TERMINATED, Talker, rows
address, name = sys.argv[1], int(sys.argv[2])
luck = random.Random(name)
count = itertools.count()
stream = Talker(address).stream(timeout=100)
for episode in itertools.count(1):
    length = luck.randrange(2, 40)
    for step in range(length + 1):
        group = rows(
            [episode], [step], [[float(x) for x in (name, next(count), episode, step)]],
            rewards=[float(step > 0)], statuses=[TERMINATED if step == length else RUNNING],
        )
        repeats = 1 + luck.randrange(3) // 2  # now and then a row is sent twice
        for _ in range(repeats):
            stream.send(group)
        for _ in range(repeats):
            assert not stream.receive().act.groups[0].faults
"""


def observations_of(chunk) -> list[list[float]]:
    return [batch.observations[""][row].tolist() for batch, row in chunk.rows]


@pytest.mark.parametrize("when_full", ["wait", "discard"])
def test_nothing_is_lost_or_doubled_when_clients_are_killed_at_random(when_full):
    luck = random.Random(3)
    chunks = []

    def sample(timeout_s: float = 0.05) -> None:
        """What RLlib would do: some is learnt from, some has become stale."""
        for chunk in server.collect(100, timeout_s):
            chunks.append(chunk)
            if luck.random() < 0.2:
                server.buffer.ledger.discard("stale", chunk.steps)
            else:
                server.buffer.ledger.deliver(chunk.steps)

    with (
        serving(lease_s=1.0, capacity_steps=300, when_full=when_full) as server,
        contextlib.ExitStack() as stack,
    ):
        clients = []
        for name in range(4):
            clients.append(program(CLIENT, server.address, name))
            stack.enter_context(clients[-1])
            stack.callback(clients[-1].kill)
        eventually(lambda: server.server.sessions == 4, within_s=30)
        version = 1
        while clients:
            target = server.ledger()["received"] + 300
            while server.ledger()["received"] < target:
                version += 1
                server.publish(version)
                sample()
            clients.pop(luck.randrange(len(clients))).kill()
        eventually(lambda: server.server.sessions == 0, within_s=10)
        while server.ledger()["held"]:
            sample()
        ledger = server.ledger()
        assert ledger["received"] >= 1200
        assert server.unaccounted() == 0
        sampled = sum(chunk.steps for chunk in chunks)
        assert sampled == ledger["delivered"] + ledger["discarded_stale"]
        assert sampled + ledger.get("discarded_full", 0) == ledger["received"]
        assert when_full == "discard" or "discarded_full" not in ledger
        check_trained_once_and_in_order(chunks, gaps=when_full == "discard")


def check_trained_once_and_in_order(chunks, *, gaps: bool) -> None:
    """No row twice; rows of an episode consecutive, where nothing was discarded in between."""
    seen_rows = [tuple(row) for chunk in chunks for row in observations_of(chunk)]
    assert len(set(seen_rows)) == len(seen_rows)
    position = defaultdict(int)
    for chunk in chunks:
        trail = [*observations_of(chunk), chunk.last_observation[""][0].tolist()]
        if not chunk.steps:
            continue
        assert len({(row[0], row[2]) for row in trail}) == 1
        assert [row[3] for row in trail] == list(
            range(chunk.first_step, chunk.first_step + len(trail))
        )
        assert [row[1] - row[3] for row in trail] == [trail[0][1] - trail[0][3]] * len(trail)
        assert chunk.rewards == [1.0] * chunk.steps
        assert len({id(batch.policy) for batch, _ in chunk.rows}) == 1
        if not gaps:
            assert chunk.first_step == position[id(chunk.identity)]
        assert chunk.first_step >= position[id(chunk.identity)]
        position[id(chunk.identity)] = chunk.first_step + chunk.steps


def test_steps_that_nobody_took_are_counted_when_the_server_stops():
    with serving() as server, Talker(server.address) as talker:
        talker.play(1, 5)  # finished, in the buffer
        for step in range(4):
            talker.step(2, step, step, float(step > 0))  # running
        assert server.ledger()["held"] == 8
        server.server.stop()
        assert server.ledger() == {
            "received": 8,
            "delivered": 0,
            "discarded_shutdown": 8,
            "held": 0,
        }
        assert sum(chunk.steps for chunk in server.collect(timeout_s=0.05)) == 0


def test_steps_are_received_when_the_next_row_completes_them():
    with serving() as server, Talker(server.address) as talker:
        talker.step(1, 0)
        assert server.ledger()["received"] == 0
        talker.step(1, 1, 1.0, 1.0)
        assert server.ledger()["received"] == 1
        talker.step(1, 2, 2.0, 1.0, TERMINATED)
        assert server.ledger()["received"] == 2


def test_every_kind_of_end_is_accounted_for():
    with serving() as server, Talker(server.address) as talker:
        talker.play(1, 3)
        talker.play(2, 3, end=ABANDONED)
        talker.act(starts=[pb.EpisodeStart(episode=3, evaluation=True)])
        talker.play(3, 3)
        talker.act(starts=[pb.EpisodeStart(episode=4, greedy=True)])
        talker.play(4, 3)
        talker.act(rows([5, 6], [0, 0], seen(0, 0)))
        talker.act(rows([5, 6], [1, 1], seen(0, 0)))
        assert server.ledger() == {
            "received": 13,
            "delivered": 0,
            "discarded_abandoned": 2,
            "discarded_evaluation": 6,
            "held": 5,
        }
        talker.close_session()
        assert server.unaccounted() == 0
        steps = sum(chunk.steps for chunk in server.collect(5))
        assert steps == 5
        server.buffer.ledger.deliver(steps)
        assert server.unaccounted() == 0
        assert server.ledger()["held"] == 0
