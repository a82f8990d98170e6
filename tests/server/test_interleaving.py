"""Many episodes at once, in any order: nothing crosses over."""

from __future__ import annotations

import collections
import contextlib
import random

import gymnasium as gym
import pytest

from client_sdk.wire import policyserver_pb2 as pb
from tests.server.talk import RUNNING, TERMINATED, TRUNCATED, Talker, actions_of, rows, seen
from tests.servers import EchoPolicy, serving

EPISODES = 1000
SESSIONS = 4
MANY_ACTIONS = gym.spaces.Discrete(1_000_000)


def test_thousand_interleaved_episodes_stay_apart():
    """Each row's observation names its episode; actions, rewards and memory must follow it."""
    order = random.Random(5)
    lengths = {episode: order.randrange(1, 7) for episode in range(EPISODES)}
    # What is still to be sent, one entry per row, in any order between episodes.
    entries = [episode for episode, steps in lengths.items() for _ in range(steps + 1)]
    order.shuffle(entries)
    next_step = collections.Counter()
    with serving(action_space=MANY_ACTIONS) as server, contextlib.ExitStack() as stack:
        server.policies.publish(EchoPolicy())
        talkers = [stack.enter_context(Talker(server.address)) for _ in range(SESSIONS)]
        while entries:
            # One message of one session: some rows of distinct episodes of its own.
            session = order.randrange(SESSIONS)
            mine = list(dict.fromkeys(e for e in entries[:200] if e % SESSIONS == session))
            for episode in mine:
                entries.remove(episode)
            if not mine:
                continue
            steps = [next_step[episode] for episode in mine]
            next_step.update(mine)
            ends = [step == lengths[episode] for episode, step in zip(mine, steps, strict=True)]
            answer = (
                talkers[session]
                .act(
                    rows(
                        # Sessions number their episodes alike.
                        [1 + episode // SESSIONS for episode in mine],
                        steps,
                        seen(*mine),
                        rewards=[
                            float(episode) if step else 0.0
                            for episode, step in zip(mine, steps, strict=False)
                        ],
                        statuses=[TERMINATED if end else RUNNING for end in ends],
                    ),
                    starts=[
                        pb.EpisodeStart(episode=1 + episode // SESSIONS, label=str(episode))
                        for episode, step in zip(mine, steps, strict=False)
                        if step == 0
                    ],
                )
                .groups[0]
            )
            assert not answer.faults
            if answer.HasField("actions"):
                assert actions_of(answer) == [
                    0 if end else 100 * episode + step
                    for episode, step, end in zip(mine, steps, ends, strict=False)
                ]
        ends = {}
        for chunk in server.collect(sum(lengths.values())):
            episode = int(chunk.identity.label)
            for step, (batch, row) in enumerate(chunk.rows):
                assert batch.observations[""][row].tolist() == [episode] * 4
                assert batch.actions[""][row] == 100 * episode + step
                assert batch.outputs["action_logp"][row] == episode
            assert chunk.rewards == [float(episode)] * lengths[episode]
            assert chunk.terminated
            assert chunk.last_observation[""].tolist() == [[episode] * 4]
            ends[episode] = chunk.end
        assert {episode: end.length for episode, end in ends.items()} == lengths
        assert all(end.episode_return == e * lengths[e] for e, end in ends.items())


@pytest.mark.parametrize("status", [TERMINATED, TRUNCATED])
def test_rows_that_end_and_rows_that_go_on_share_a_message(status):
    with serving(action_space=MANY_ACTIONS) as server, Talker(server.address) as talker:
        server.policies.publish(EchoPolicy())
        talker.act(rows([1, 2, 3], [0, 0, 0], seen(1, 2, 3)))
        # One ends, its successor starts, the others go on: one message, in two groups.
        answer = talker.act(
            rows([1, 2, 3], [1] * 3, seen(1, 2, 3), statuses=[RUNNING, status, RUNNING]),
            rows([4], [0], seen(4)),
        )
        assert actions_of(answer.groups[0]) == [101, 0, 301]
        assert actions_of(answer.groups[1]) == [400]
        assert server.server.stats()["episodes_open"] == 3
