"""What the verbs promise, through gRPC: for both clients, and whoever chooses the actions."""

import gymnasium as gym
import numpy as np
import pytest

from client_sdk import AsyncPolicyClient, BatchError, PolicyClient
from client_sdk.errors import (
    ClosedClientError,
    EpisodeEndedError,
    EpisodeStateError,
    InvalidValueError,
    LimitExceededError,
    LogpRequiredError,
    NotFiniteError,
    SpaceMismatchError,
    UnauthenticatedError,
    UnknownEpisodeError,
)
from tests.client.acting_alone import serving_for
from tests.client.support import KINDS, LOCAL_KINDS, all_seen, connect_once, connected, seen
from tests.servers import CARTPOLE_ACTIONS, CARTPOLE_OBSERVATIONS, serving

NAN = float("nan")

remote_only = pytest.mark.parametrize("kind", KINDS, indirect=True)


@pytest.fixture(params=[*KINDS, *LOCAL_KINDS])
def kind(request):
    """Which client, and in which inference mode."""
    return request.param


@pytest.fixture
def server(kind):
    """The real server for that kind of client."""
    with serving_for(kind, need_logp=False) as under_test:
        yield under_test


def collected(server, steps):
    """The chunks of that many steps."""
    chunks = server.collect(steps)
    assert sum(chunk.steps for chunk in chunks) == steps
    return chunks


def ended(server):
    """The chunks of all episodes that have ended so far."""
    chunks = server.collect(10_000, timeout_s=0.1)
    return [chunk for chunk in chunks if chunk.end is not None]


def observations_of(chunk):
    """The first element of each observation of a chunk, the last one included."""
    acted_on = [float(batch.observations[""][row, 0]) for batch, row in chunk.rows]
    return [*acted_on, float(chunk.last_observation[""][0, 0])]


# -- RLlib's verbs ---------------------------------------------------------------------------------


def test_the_server_tells_its_spaces_and_settings(kind):
    with (
        serving_for(kind, client_config={"frame_skip": 4, "scale": 0.5, "levels": ["a"]}) as server,
        connected(kind, server.address) as client,
    ):
        assert client.observation_space == CARTPOLE_OBSERVATIONS
        assert client.action_space == CARTPOLE_ACTIONS
        assert client.config == {"frame_skip": 4, "scale": 0.5, "levels": ["a"]}
        assert isinstance(client.config["frame_skip"], int)


def test_an_action_is_a_value_of_the_action_space(client, server):
    server.publish(2, action=1)
    client.update_policy_weights()
    episode_id = client.start_episode()
    action = client.get_action(episode_id, seen(0))
    assert action in client.action_space
    assert action == 1
    assert client.policy_version == 2


def test_rewards_accumulate_until_the_next_action_and_none_means_0(client, server):
    episode_id = client.start_episode()
    client.get_action(episode_id, seen(0))
    client.log_returns(episode_id, 1.0)
    client.log_returns(episode_id, 0.5)
    client.get_action(episode_id, seen(1))
    client.get_action(episode_id, seen(2))
    client.log_returns(episode_id, 2.0)
    client.end_episode(episode_id, seen(3))
    (chunk,) = collected(server, 3)
    assert chunk.rewards == [1.5, 0.0, 2.0]
    assert observations_of(chunk) == [0, 1, 2, 3]
    assert (chunk.terminated, chunk.truncated) == (True, False)


def test_a_truncated_episode_is_not_terminated(client, server):
    episode_id = client.start_episode()
    client.get_action(episode_id, seen(0))
    client.end_episode(episode_id, seen(1), truncated=True)
    (chunk,) = collected(server, 1)
    assert (chunk.terminated, chunk.truncated) == (False, True)


def test_numbers_of_info_become_metrics_of_the_episode(client, server):
    episode_id = client.start_episode()
    client.get_action(episode_id, seen(0))
    client.log_returns(episode_id, 1.0, info={"speed": 1, "name": "a", "deep": {"x": 1}})
    client.log_returns(episode_id, 0.0, {"speed": np.float32(2.5), "crashed": True})
    client.end_episode(episode_id, seen(1))
    (chunk,) = collected(server, 1)
    assert chunk.end.metrics == {"speed": 2.5, "crashed": 1.0}


def test_an_episode_may_have_a_name(client, server):
    assert client.start_episode("level 3") == "level 3"
    client.get_action("level 3", seen(0))
    client.end_episode("level 3", seen(1))
    (chunk,) = collected(server, 1)
    assert chunk.identity.label == "level 3"


def test_two_running_episodes_cannot_share_a_name_but_one_may_follow_the_other(client):
    client.start_episode("a")
    with pytest.raises(EpisodeStateError, match="running"):
        client.start_episode("a")
    client.get_action("a", seen(0))
    client.end_episode("a", seen(1))
    client.start_episode("a")
    client.get_action("a", seen(0))


def test_interleaved_episodes_do_not_mix(client, server):
    episodes = [client.start_episode() for _ in range(20)]
    for step in range(3):
        for number, episode_id in enumerate(episodes):
            client.get_action(episode_id, seen(100 * number + step))
    for number, episode_id in enumerate(episodes):
        client.end_episode(episode_id, seen(100 * number + 3))
    chunks = collected(server, 60)
    assert sorted(map(observations_of, chunks)) == [
        [100 * number + step for step in range(4)] for number in range(20)
    ]


def test_actions_after_the_end_are_refused(client):
    episode_id = client.start_episode()
    client.get_action(episode_id, seen(0))
    client.end_episode(episode_id, seen(1))
    for call in (
        lambda: client.get_action(episode_id, seen(2)),
        lambda: client.log_returns(episode_id, 1.0),
        lambda: client.end_episode(episode_id, seen(1)),
    ):
        with pytest.raises(EpisodeEndedError, match="already ended"):
            call()


def test_an_episode_that_never_began_is_unknown(client):
    with pytest.raises(UnknownEpisodeError, match="start_episode"):
        client.get_action("nobody", seen(0))


def test_a_reward_before_the_first_action_is_refused(client):
    episode_id = client.start_episode()
    client.log_returns(episode_id, 0.0)
    with pytest.raises(InvalidValueError, match="before the first action"):
        client.log_returns(episode_id, 1.0)


def test_an_episode_without_a_step_is_never_heard_of(client, server):
    client.end_episode(client.start_episode(), seen(0))
    assert client.stats.requests == 0
    assert server.ledger()["received"] == 0


@pytest.mark.parametrize(
    ("bad", "error", "says"),
    [
        (np.zeros(3, np.float32), SpaceMismatchError, r"observation: expected \[4\], got \[3\]"),
        (seen(NAN), NotFiniteError, "observation: expected a finite number"),
        (["a", "b", "c", "d"], SpaceMismatchError, "observation"),
        (None, SpaceMismatchError, "observation"),
    ],
)
def test_a_bad_observation_records_nothing_and_the_episode_goes_on(
    client, server, bad, error, says
):
    episode_id = client.start_episode()
    client.get_action(episode_id, seen(0))
    client.log_returns(episode_id, 1.0)
    with pytest.raises(error, match=says):
        client.get_action(episode_id, bad)
    if bad is not None:
        with pytest.raises(error, match=says):
            client.end_episode(episode_id, bad)
    client.get_action(episode_id, seen(1))
    client.end_episode(episode_id, seen(2))
    (chunk,) = collected(server, 2)
    assert chunk.rewards == [1.0, 0.0]


@pytest.mark.parametrize("reward", [NAN, float("inf"), -1e39, 10**400, "much", None])
def test_a_bad_reward_is_refused_at_once(client, server, reward):
    episode_id = client.start_episode()
    client.get_action(episode_id, seen(0))
    with pytest.raises(InvalidValueError, match="reward"):
        client.log_returns(episode_id, reward)
    client.end_episode(episode_id, seen(1))
    (chunk,) = collected(server, 1)
    assert chunk.rewards == [0.0]


def test_a_metric_that_is_not_finite_is_refused_with_its_name(client):
    episode_id = client.start_episode()
    client.get_action(episode_id, seen(0))
    with pytest.raises(NotFiniteError, match=r"info\['speed'\]"):
        client.log_returns(episode_id, 1.0, {"speed": NAN})


def test_rewards_whose_sum_the_learner_cannot_hold_are_refused_at_once(client, server):
    episode_id = client.start_episode()
    client.get_action(episode_id, seen(0))
    client.log_returns(episode_id, 3e38)
    with pytest.raises(NotFiniteError, match="reward"):
        client.log_returns(episode_id, 3e38)
    client.end_episode(episode_id, seen(1))
    (chunk,) = collected(server, 1)
    assert chunk.rewards == [3e38]


@pytest.mark.parametrize(
    ("info", "error"),
    [
        ({f"goal {number}": 1.0 for number in range(1001)}, LimitExceededError),
        ({"x" * 257: 1.0}, InvalidValueError),
        ({"\ud800": 1.0}, InvalidValueError),
        ({"speed": 10**400}, NotFiniteError),
        (["speed"], InvalidValueError),
    ],
    ids=["too many", "too long", "no UTF-8", "too large", "no dict"],
)
def test_metrics_that_cannot_be_sent_are_refused_at_once_and_cost_no_reward(
    client, server, info, error
):
    episode_id = client.start_episode()
    client.get_action(episode_id, seen(0))
    client.log_returns(episode_id, 1.0, {"level": 2})
    with pytest.raises(error, match="info"):
        client.log_returns(episode_id, 5.0, info)
    client.get_action(episode_id, seen(1))
    client.end_episode(episode_id, seen(2))
    (chunk,) = collected(server, 2)
    assert chunk.rewards == [1.0, 0.0]
    assert chunk.end.metrics == {"level": 2.0}


def test_a_name_that_cannot_be_sent_is_refused_at_once(client, kind, server):
    with pytest.raises(InvalidValueError, match="episode_id"):
        client.start_episode("\ud800")
    with pytest.raises(InvalidValueError, match="name"):
        connect_once(kind, server.address, name="\ud800")


def test_a_done_dict_of_several_agents_is_refused(client):
    episode_id = client.start_episode()
    client.log_returns(episode_id, 0.0, None, None)
    with pytest.raises(InvalidValueError, match="multiagent_done_dict"):
        client.log_returns(episode_id, 0.0, None, {"a": True})


@remote_only
def test_updating_weights_is_nothing_to_do(client):
    assert client.update_policy_weights() is None


# -- log_action ------------------------------------------------------------------------------------


@remote_only
def test_logged_actions_are_recorded_and_marked(client, server):
    episode_id = client.start_episode()
    client.log_action(episode_id, seen(0), 1)
    client.log_returns(episode_id, 1.0)
    client.log_action(episode_id, seen(1), 0, logp=-0.7)
    client.log_returns(episode_id, 2.0)
    client.get_action(episode_id, seen(2))
    client.end_episode(episode_id, seen(3))
    chunks = collected(server, 3)
    steps = [(float(batch.actions[""][row])) for chunk in chunks for batch, row in chunk.rows]
    assert steps == [1, 0, 0]
    assert [index for chunk in chunks for index in chunk.logged] == [0, 1]
    assert [reward for chunk in chunks for reward in chunk.rewards] == [1.0, 2.0, 0.0]


def test_log_action_without_a_needed_logp_is_refused_at_the_first_call(kind):
    with serving_for(kind, need_logp=True) as server, connected(kind, server.address) as client:
        episode_id = client.start_episode()
        with pytest.raises(LogpRequiredError, match="logp="):
            client.log_action(episode_id, seen(0), 1)
        client.log_action(episode_id, seen(0), 1, logp=-0.5)
        with pytest.raises(LogpRequiredError, match="logp="):
            client.log_action(episode_id, seen(1), 1)
        client.log_action(episode_id, seen(1), 1, logp=-0.5)
        client.end_episode(episode_id, seen(2))
        (chunk,) = collected(server, 2)
        assert chunk.logged == [0, 1]


@pytest.mark.parametrize(
    ("action", "logp", "says"),
    [
        (2, None, "action"),
        ("a", None, "action"),
        (0, NAN, "logp"),
        (0, -1e39, "logp"),
        (0, "little", "logp"),
    ],
)
def test_a_bad_logged_action_records_nothing(client, server, action, logp, says):
    episode_id = client.start_episode()
    with pytest.raises(InvalidValueError, match=says):
        client.log_action(episode_id, seen(0), action, logp)
    client.get_action(episode_id, seen(0))
    client.end_episode(episode_id, seen(1))
    (chunk,) = collected(server, 1)
    assert chunk.logged == []


# -- evaluation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"training_enabled": False}, {"explore": False}])
def test_episodes_that_do_not_train_never_reach_the_learner(client, server, options):
    episode_id = client.start_episode(None, **options)
    client.get_action(episode_id, seen(0))
    client.log_returns(episode_id, 7.0)
    client.end_episode(episode_id, seen(1))
    client.close()  # waits until the server knows it
    (report,) = ended(server)
    assert not report.training
    assert report.end.episode_return == 7.0


@remote_only
@pytest.mark.parametrize("explore", [True, False])
def test_only_explore_asks_for_samples(client, server, explore):
    client.get_action(client.start_episode(explore=explore), seen(0))
    assert server.policies.current.greedy[0].tolist() == [not explore]


# -- episode() -------------------------------------------------------------------------------------


@remote_only
def test_an_episode_object_tells_the_same_story(client, server):
    with client.episode("x") as episode:
        assert (episode.id, episode.ended) == ("x", False)
        episode.act(seen(0))
        episode.log_returns(0.25, {"speed": 3})
        episode.act(seen(1), 1.0)
        episode.log_action(seen(2), 1, reward=0.5)
        episode.end(seen(3), 2.0, terminated=True)
        assert episode.ended
        with pytest.raises(EpisodeEndedError):
            episode.act(seen(4))
    chunks = collected(server, 3)
    assert [reward for chunk in chunks for reward in chunk.rewards] == [1.25, 0.5, 2.0]
    assert chunks[-1].terminated
    assert chunks[-1].end.metrics == {"speed": 3.0}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, (True, False)),
        ({"terminated": True}, (True, False)),
        ({"truncated": True}, (False, True)),
        ({"terminated": True, "truncated": True}, (True, False)),
    ],
)
def test_an_end_is_terminated_unless_it_is_only_truncated(client, server, flags, expected):
    with client.episode() as episode:
        episode.act(seen(0))
        episode.end(seen(1), 1.0, **flags)
    (chunk,) = collected(server, 1)
    assert (chunk.terminated, chunk.truncated) == expected


def test_a_truncated_end_needs_its_observation_and_a_terminated_one_does_not(client, server):
    with client.episode() as episode:
        episode.act(seen(5))
        with pytest.raises(InvalidValueError, match="last observation"):
            episode.end(None, truncated=True)
        episode.end(None, 1.0, terminated=True)
    (chunk,) = collected(server, 1)
    assert observations_of(chunk) == [5, 5]


@remote_only
def test_an_episode_left_without_an_end_is_abandoned(client, server):
    with client.episode() as episode:
        episode.act(seen(0))
        episode.act(seen(1), 1.0)
    client.close()  # waits until the server knows it
    assert episode.ended
    ledger = server.ledger()
    assert ledger["received"] == ledger["discarded_abandoned"] == 1
    assert server.unaccounted() == 0


# -- episodes(n) -----------------------------------------------------------------------------------


@remote_only
def test_a_vector_step_is_one_message(client):
    with client.episodes(64) as batch:
        actions = batch.act(np.zeros((64, 4), np.float32))
        assert actions.shape == (64,)
        assert client.stats.requests == 1
        assert client.action_space.contains(actions[0])


class Countdown(gym.Env):
    """Observes ``1000 * number of the episode + step``; ends after ``length`` steps."""

    observation_space = CARTPOLE_OBSERVATIONS
    action_space = CARTPOLE_ACTIONS

    def __init__(self, length, offset, *, truncates):
        self._length = length
        self._truncates = truncates
        self._episode = offset
        self._step = 0

    def reset(self, *, seed=None, options=None):
        self._episode += 1
        self._step = 0
        return self._seen(), {}

    def step(self, action):
        self._step += 1
        over = self._step == self._length
        return self._seen(), 1.0, over and not self._truncates, over and self._truncates, {}

    def _seen(self):
        return seen(1000 * self._episode + self._step)


def test_final_observations_of_a_vector_environment_arrive_where_episodes_were_cut(client, server):
    lengths = [2, 3, 5]
    envs = gym.vector.SyncVectorEnv(
        [
            lambda length=length, row=row: Countdown(length, 10 * row, truncates=row != 1)
            for row, length in enumerate(lengths)
        ],
        autoreset_mode=gym.vector.AutoresetMode.NEXT_STEP,
    )
    with client.episodes(3) as batch:
        observations, _ = envs.reset()
        actions = batch.act(observations)
        for _ in range(11):
            observations, rewards, terminated, truncated, _ = envs.step(actions)
            actions = batch.act(observations, rewards, terminated, truncated)
    chunks = [chunk for chunk in ended(server) if chunk.steps]
    told = sorted((observations_of(chunk), chunk.rewards, chunk.truncated) for chunk in chunks)
    expected = []
    for row, length in enumerate(lengths):
        for number in range(12 // (length + 1)):
            first = 1000 * (10 * row + number + 1)
            seen_there = [float(first + step) for step in range(length + 1)]
            expected.append((seen_there, [1.0] * length, row != 1))
    assert told == sorted(expected)
    assert [chunk.terminated for chunk in chunks] == [not chunk.truncated for chunk in chunks]


def test_the_first_reward_of_a_new_row_is_ignored(client, server):
    with client.episodes(2) as batch:
        batch.act(all_seen(0, 10), [5, 5])
        batch.act(all_seen(1, 11), [1, 2], [True, False], [False, False])
        batch.act(all_seen(2, 12), [99, 3], [False, False], [False, True])
        batch.act(all_seen(3, 13), [4, 99], [True, False], [False, False])
    client.close()  # waits until the server knows it
    chunks = [chunk for chunk in ended(server) if chunk.steps]
    assert sorted(chunk.rewards for chunk in chunks) == [[1.0], [2.0, 3.0], [4.0]]


def test_one_bad_row_sends_nothing_and_can_be_dropped(client, server):
    with client.episodes(3) as batch:
        batch.act(all_seen(0, 10, 20))
        with pytest.raises(BatchError, match="row 1") as caught:
            batch.act(all_seen(1, NAN, 21), [1, 1, 1])
        assert list(caught.value.rows) == [1]
        assert isinstance(caught.value.rows[1], NotFiniteError)
        assert caught.value.actions is None
        batch.abandon([1])
        batch.act(all_seen(1, 15, 21), [1, 1, 1])
        batch.act(all_seen(2, 16, 22), [1, 1, 1], [True, True, True])
    client.close()  # waits until the server knows it
    chunks = [chunk for chunk in ended(server) if chunk.steps]
    assert sorted(map(observations_of, chunks)) == [[0, 1, 2], [15, 16], [20, 21, 22]]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((np.zeros((2, 4)),), "observations"),
        ((np.zeros((3, 5)),), "observations"),
        ((np.zeros((3, 4)), [1, 2]), "rewards"),
        ((np.zeros((3, 4)), [1, 2, NAN]), r"rewards\[2\]"),
        ((np.zeros((3, 4)), None, [True]), "terminated"),
        ((np.zeros((3, 4)), None, None, [[True, True, True]]), "truncated"),
    ],
)
def test_columns_of_another_length_are_refused(client, arguments, says):
    with client.episodes(3) as batch:
        batch.act(np.zeros((3, 4)))
        with pytest.raises(InvalidValueError, match=says):
            batch.act(*arguments)
        batch.act(np.zeros((3, 4)))


def test_a_batch_of_evaluation_episodes_trains_nothing(client, server):
    with client.episodes(2, training_enabled=False) as batch:
        batch.act(all_seen(0, 1))
        batch.act(all_seen(0, 1), [1, 2], [True, True])
        batch.act(all_seen(0, 1))
        batch.act(all_seen(0, 1), [3, 4], [True, True])
    client.close()  # waits until the server knows it
    reports = ended(server)
    assert sorted(chunk.end.episode_return for chunk in reports) == [1, 2, 3, 4]
    assert not any(chunk.training for chunk in reports)


@remote_only
def test_a_batch_beyond_a_limit_is_refused_with_the_setting(kind):
    with (
        serving(max_rows_per_request=8, max_open_episodes_per_session=6) as server,
        connected(kind, server.address) as client,
    ):
        with pytest.raises(LimitExceededError, match="max_rows_per_request"):
            client.episodes(9)
        for n in (0, -1, 2.5, "2", None):
            with pytest.raises(InvalidValueError, match="n: expected"):
                client.episodes(n)
        with pytest.raises(LimitExceededError, match="max_open_episodes"):
            client.episodes(7)
        with client.episodes(6) as batch:
            batch.act(np.zeros((6, 4)))


@pytest.mark.parametrize("option", ["training_enabled", "explore"])
def test_an_option_of_an_episode_is_true_or_false(client, option):
    for begin in (client.episode, lambda **options: client.episodes(2, **options)):
        with pytest.raises(InvalidValueError, match=f"^{option}: expected True or False, got str"):
            begin(**{option: "no"})


def test_a_batch_that_was_left_is_over(client):
    with client.episodes(2) as batch:
        batch.act(np.zeros((2, 4)))
    with pytest.raises(EpisodeEndedError):
        batch.act(np.zeros((2, 4)))


@remote_only
def test_composite_spaces_travel_both_ways(kind):
    observations = gym.spaces.Dict(
        {
            "camera": gym.spaces.Box(0, 255, (2, 2), np.uint8),
            "pose": gym.spaces.Tuple((gym.spaces.Discrete(3), gym.spaces.Box(-1, 1, (2,)))),
        }
    )
    actions = gym.spaces.Dict(
        {"move": gym.spaces.Box(-1, 1, (2,)), "jump": gym.spaces.Discrete(2, start=1)}
    )
    chosen = {"move": np.array([0.5, -0.5], np.float32), "jump": 2}
    with (
        serving(observations, actions, need_logp=False, first_version=None) as server,
        connected(kind, server.address) as client,
    ):
        server.publish(2, action=chosen)
        with client.episode() as episode:
            action = episode.act(observations.sample())
            assert actions.contains(action)
            assert action["jump"] == 2
            action["move"][0] = 0.0  # the caller's to keep
            episode.log_action(observations.sample(), chosen, reward=1.0)
        with client.episodes(3) as batch:
            vector = batch.act([observations.sample() for _ in range(3)])
            assert vector["move"].shape == (3, 2)
            assert vector["jump"].tolist() == [2, 2, 2]


# -- limits and refusals ---------------------------------------------------------------------------


@remote_only
def test_a_message_over_the_limit_is_refused_and_the_client_stays_usable(kind):
    with (
        serving(max_message_bytes=2000) as server,
        connected(kind, server.address) as client,
    ):
        limit = pytest.raises(LimitExceededError, match="max_message_bytes")
        with client.episodes(200) as batch, limit:
            batch.act(np.zeros((200, 4)))
        with client.episode() as episode:
            episode.act(seen(0))


def test_other_spaces_than_the_servers_are_refused_with_the_difference(kind, server):
    other = gym.spaces.Box(-np.inf, np.inf, (5,), np.float32)
    with pytest.raises(SpaceMismatchError, match=r"\[5\].*\[4\]"):
        connect_once(kind, server.address, observation_space=other)
    with pytest.raises(SpaceMismatchError, match="action_space"):
        connect_once(kind, server.address, action_space=gym.spaces.Discrete(3))
    unknown = gym.spaces.Dict(a=gym.spaces.Sequence(gym.spaces.Discrete(3)))
    with pytest.raises(SpaceMismatchError, match=r'observation_space\["a"\]: .* got Sequence'):
        connect_once(kind, server.address, observation_space=unknown)
    connect_once(
        kind,
        server.address,
        observation_space=CARTPOLE_OBSERVATIONS,
        action_space=CARTPOLE_ACTIONS,
    )


@pytest.mark.parametrize("token", [None, "wrong"])
def test_a_wrong_token_is_refused_at_once_and_not_retried(kind, token, caplog):
    with serving_for(kind, token="right-one") as server:
        with pytest.raises(UnauthenticatedError):
            connect_once(kind, server.address, token=token)
        assert server.server.stats()["sessions_opened"] == 0
        with connected(kind, server.address, token="right-one") as client:
            client.get_action(client.start_episode(), seen(0))
    assert "right-one" not in caplog.text
    assert "right-one" not in repr(client)


def test_closing_ends_the_session_and_closing_twice_is_fine(client, server):
    client.get_action(client.start_episode(), seen(0))
    assert server.server.sessions == 1
    client.close()
    client.close()
    assert server.server.sessions == 0
    assert client.closed
    with pytest.raises(ClosedClientError, match="closed"):
        client.start_episode()


def test_an_end_right_before_closing_arrives(kind, server):
    with connected(kind, server.address) as client:
        episode_id = client.start_episode()
        client.get_action(episode_id, seen(0))
        client.end_episode(episode_id, seen(1))
    (chunk,) = collected(server, 1)
    assert chunk.terminated


@pytest.mark.parametrize("prefix", ["http://", ""])
def test_an_address_may_be_written_as_a_url(kind, server, prefix):
    with connected(kind, f"{prefix}{server.address}") as client:
        assert client.ping() > 0.0


@remote_only
def test_the_third_argument_is_the_update_interval_of_old_programs(server):
    with PolicyClient(server.address, "remote", 10.0) as client:
        assert client.get_action(client.start_episode(), seen(0)) == 0
    AsyncPolicyClient(server.address, "remote", 10.0)


@pytest.mark.parametrize("interval", [-1.0, float("nan")])
@pytest.mark.parametrize("make", [PolicyClient, AsyncPolicyClient])
def test_a_negative_update_interval_is_refused(make, interval):
    with pytest.raises(InvalidValueError, match="update_interval"):
        make("localhost:9900", update_interval=interval)
