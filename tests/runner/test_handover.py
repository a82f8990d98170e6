from __future__ import annotations

from unittest import mock

import gymnasium as gym
import numpy as np
import pytest
import tree
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.connectors.env_to_module import MeanStdFilter
from ray.rllib.env.utils.infinite_lookback_buffer import InfiniteLookbackBuffer
from ray.rllib.utils.replay_buffers import EpisodeReplayBuffer

from policy_server.chunk_columns import LOGGED_ACTION
from policy_server.episode_builder import CHUNKS_KEPT
from policy_server.experience import Deliveries
from tests.runner.support import OBSERVATIONS, HandOverUnderTest, Lane, ppo_config


@pytest.fixture
def under_test():
    return HandOverUnderTest()


def _first_observations(episode):
    return episode.get_observations()[:, 0].tolist()


def test_a_chunk_becomes_an_episode_with_its_own_columns(under_test):
    chunk = Lane().chunk(under_test.policy(4), 5, terminated=True)
    (episode,) = under_test.take(chunk, version=4).episodes
    assert episode.is_numpy
    assert len(episode) == 5
    assert _first_observations(episode) == [0, 1, 2, 3, 4, 5]
    assert episode.get_actions().tolist() == [0, 1, 2, 0, 1]
    assert episode.get_rewards().tolist() == [0, 1, 2, 3, 4]
    logp = episode.get_extra_model_outputs("action_logp")
    np.testing.assert_allclose(logp, [0, -0.1, -0.2, -0.3, -0.4], atol=1e-6)
    assert episode.get_extra_model_outputs("weights_seq_no").tolist() == [4] * 5
    state = episode.get_extra_model_outputs("state_out")
    assert state["actor"]["h"][:, 0].tolist() == [0, 1, 2, 3, 4]
    episode.validate()


@pytest.mark.parametrize("how", ["terminated", "truncated"])
def test_termination_and_truncation_stay_apart(under_test, how):
    chunk = Lane().chunk(under_test.policy(), 2, **{how: True})
    (episode,) = under_test.take(chunk).episodes
    assert episode.is_terminated is (how == "terminated")
    assert episode.is_truncated is (how == "truncated")


def test_chunks_of_one_episode_continue_each_other(under_test):
    lane, policy = Lane(), under_test.policy()
    chunks = [lane.chunk(policy, 3), lane.chunk(policy, 4), lane.chunk(policy, 2, terminated=True)]
    episodes = [episode for chunk in chunks for episode in under_test.take(chunk).episodes]
    assert len({episode.id_ for episode in episodes}) == 1
    assert [episode.t_started for episode in episodes] == [0, 3, 7]
    assert [len(episode) for episode in episodes] == [3, 4, 2]
    whole = episodes[0]
    for episode in episodes[1:]:
        whole.concat_episode(episode)
    assert _first_observations(whole) == list(range(10))
    assert whole.is_terminated


def test_chunks_that_go_over_together_are_one_so_that_the_learner_bootstraps_once(under_test):
    one, other, policy = Lane(), Lane(offset=100), under_test.policy()
    handed = under_test.take(
        one.chunk(policy, 3, logged=[2]),
        other.chunk(policy, 2),
        one.chunk(policy, 4, logged=[1]),
        other.chunk(policy, 1, truncated=True),
        one.chunk(policy, 2, terminated=True),
    )
    first, second = handed.episodes
    assert _first_observations(first) == list(range(10))
    assert first.get_rewards().tolist() == list(range(9))
    assert [t for t, info in enumerate(first.get_infos()[1:]) if LOGGED_ACTION in info] == [2, 4]
    assert first.is_terminated
    assert _first_observations(second) == [100, 101, 102, 103]
    assert second.is_truncated
    assert len(handed.ends) == 2
    assert under_test.ledger.snapshot()["delivered"] == 12
    first.validate()


def test_chunks_are_not_joined_over_a_new_version_or_a_loss(under_test):
    lane, old, new = Lane(), under_test.policy(1), under_test.policy(2)
    chunks = [lane.chunk(old, 2), lane.chunk(new, 3)]
    lane.chunk(new, 1)  # never arrives
    episodes = under_test.take(*chunks, lane.chunk(new, 4), version=2).episodes
    assert [len(episode) for episode in episodes] == [2, 3, 4]
    assert episodes[0].id_ == episodes[1].id_ != episodes[2].id_


def test_uploads_that_went_over_as_one_chunk_are_settled_together(under_test):
    lane, policy, deliveries = Lane(), under_test.policy(), Deliveries()
    chunks = [lane.chunk(policy, 2, receipt=deliveries.take(sequence)) for sequence in (1, 2, 3)]
    assert deliveries.through == 0
    under_test.take(*chunks)
    assert deliveries.through == 3


def test_a_chunk_brings_the_end_of_the_one_before_as_lookback():
    under_test = HandOverUnderTest(lookback=2)
    lane, policy = Lane(), under_test.policy()
    under_test.take(lane.chunk(policy, 1))
    under_test.take(lane.chunk(policy, 3))
    (episode,) = under_test.take(lane.chunk(policy, 2)).episodes
    lookback = {"indices": slice(-2, 0), "neg_index_as_lookback": True}
    assert episode.get_observations(**lookback)[:, 0].tolist() == [2, 3]
    assert episode.get_actions(**lookback).tolist() == [2, 0]
    assert episode.get_rewards(**lookback).tolist() == [2, 3]
    state = episode.get_extra_model_outputs("state_out", **lookback)
    assert state["actor"]["h"][:, 0].tolist() == [2, 3]
    assert _first_observations(episode) == [4, 5, 6]
    episode.validate()


def test_lookback_of_nested_observations_keeps_their_structure():
    space = gym.spaces.Dict(
        {
            "pair": gym.spaces.Tuple((OBSERVATIONS, gym.spaces.Discrete(9))),
            "inner": gym.spaces.Dict({"position": OBSERVATIONS}),
        }
    )

    class NestedLane(Lane):
        def observation(self, step):
            value = super().observation(step)
            return {"pair": (value, step % 9), "inner": {"position": value}}

    under_test = HandOverUnderTest(ppo_config().environment(observation_space=space), lookback=2)
    lane, policy = NestedLane(space), under_test.policy()
    under_test.take(lane.chunk(policy, 3))
    (episode,) = under_test.take(lane.chunk(policy, 2)).episodes
    for indices, steps in ((slice(-2, 0), [1, 2]), (slice(0, 3), [3, 4, 5])):
        seen = episode.get_observations(indices, neg_index_as_lookback=True)
        assert seen["pair"][0][:, 0].tolist() == steps
        assert seen["pair"][1].tolist() == steps
        assert seen["inner"]["position"][:, 0].tolist() == steps


def _buffers(episode):
    yield from (episode.observations, episode.actions, episode.rewards, episode.infos)
    yield from episode.extra_model_outputs.values()


def test_an_episodes_buffers_are_as_rllib_makes_them(under_test):
    lane, policy = Lane(), under_test.policy()
    under_test.take(lane.chunk(policy, 3))
    (episode,) = under_test.take(lane.chunk(policy, 2)).episodes
    for ours in _buffers(episode):
        theirs = InfiniteLookbackBuffer(ours.data, space=ours.space)
        theirs.lookback = 1  # which it takes for the length of dicts
        assert vars(ours) == vars(theirs)


def test_an_episode_keeps_no_memory_of_those_that_were_handed_over_with_it(under_test):
    lane, other, policy = Lane(), Lane(), under_test.policy()
    first = under_test.take(lane.chunk(policy, 3), other.chunk(policy, 3)).episodes
    second = under_test.take(lane.chunk(policy, 3), other.chunk(policy, 3)).episodes
    for episode in first + second:
        columns = tree.flatten([buffer.data for buffer in _buffers(episode)])
        arrays = [column for column in columns if isinstance(column, np.ndarray)]
        assert len(arrays) == 7
        assert all(array.base is None for array in arrays)


def test_after_a_loss_the_episode_goes_on_as_another_one(under_test):
    lane, policy = Lane(), under_test.policy()
    (before,) = under_test.take(lane.chunk(policy, 3)).episodes
    lane.chunk(policy, 2)  # never arrives
    (after,) = under_test.take(lane.chunk(policy, 4)).episodes
    assert after.id_ != before.id_
    assert after.t_started == 0
    assert _first_observations(after) == [5, 6, 7, 8, 9]
    assert after.observations.lookback == 0


def test_a_replay_buffer_takes_what_is_left_after_a_loss():
    under_test = HandOverUnderTest(joins_chunks=True, max_policy_lag=None)
    replay = EpisodeReplayBuffer(capacity=100)
    lane, policy = Lane(), under_test.policy()
    for steps, arrives in ((3, True), (2, True), (2, False), (3, True), (4, True)):
        chunk = lane.chunk(policy, steps)
        if arrives:
            replay.add(under_test.take(chunk).episodes)
    assert replay.get_num_timesteps() == 12
    assert replay.get_num_episodes() == 2


def test_episodes_of_two_clients_with_the_same_label_stay_apart(under_test):
    policy = under_test.policy()
    one, other = Lane(), Lane()
    one.identity.label = other.identity.label = "left"
    episodes = under_test.take(one.chunk(policy, 2), other.chunk(policy, 2)).episodes
    assert episodes[0].id_ != episodes[1].id_


def test_experience_that_is_too_old_is_discarded_and_counted(under_test):
    lane, policy = Lane(), under_test.policy(3)
    (first,) = under_test.take(lane.chunk(policy, 2), version=4).episodes
    handed = under_test.take(lane.chunk(policy, 5), version=5)
    assert handed.episodes == []
    assert under_test.ledger.snapshot() == {"received": 0, "delivered": 2, "discarded_stale": 5}
    (next_one,) = under_test.take(lane.chunk(under_test.policy(5), 1), version=5).episodes
    assert next_one.id_ != first.id_


def test_an_end_is_reported_even_if_its_steps_are_too_old(under_test):
    chunk = Lane().chunk(under_test.policy(1), 5, terminated=True)
    handed = under_test.take(chunk, version=9)
    assert handed.episodes == []
    assert [end.length for end in handed.ends] == [5]


def test_evaluation_is_reported_and_never_learnt_from(under_test):
    chunk = Lane().chunk(under_test.policy(), 3, terminated=True, training=False)
    handed = under_test.take(chunk)
    assert (handed.episodes, handed.ends) == ([], [])
    assert [end.length for end in handed.evaluation_ends] == [3]
    assert under_test.ledger.snapshot()["discarded_evaluation"] == 3


def test_an_end_without_steps_is_only_reported(under_test):
    handed = under_test.take(Lane().chunk(under_test.policy(), 0, truncated=True))
    assert handed.episodes == []
    assert len(handed.ends) == 1


def test_logged_steps_are_marked_without_another_column(under_test):
    lane, policy = Lane(), under_test.policy()
    mixed, plain = under_test.take(
        lane.chunk(policy, 3, logged=[1]), Lane().chunk(policy, 3)
    ).episodes
    assert [LOGGED_ACTION in info for info in mixed.get_infos()] == [False, False, True, False]
    assert mixed.extra_model_outputs.keys() == plain.extra_model_outputs.keys()


def test_a_mark_at_the_end_of_a_chunk_survives_joining(under_test):
    lane, policy = Lane(), under_test.policy()
    (first,) = under_test.take(lane.chunk(policy, 2, logged=[1])).episodes
    (second,) = under_test.take(lane.chunk(policy, 1)).episodes
    first.concat_episode(second)
    assert [LOGGED_ACTION in info for info in first.get_infos()] == [False, False, True, False]


def test_each_step_carries_its_own_version_where_chunks_are_not_cut(under_test):
    old, new = under_test.policy(1), under_test.policy(2)
    chunk = Lane().chunk(None, 4, policies=[old, old, old, new], terminated=True)
    (episode,) = under_test.take(chunk, version=2).episodes
    assert episode.get_extra_model_outputs("weights_seq_no").tolist() == [1, 1, 1, 2]


def test_rows_are_picked_from_batches_that_are_mostly_others():
    under_test = HandOverUnderTest()
    chunk = Lane().chunk(under_test.policy(), 3)
    for i, (batch, row) in enumerate(chunk.rows):
        for columns in (batch.observations, batch.actions, batch.outputs):
            for name, column in columns.items():
                columns[name] = np.concatenate([np.zeros((50, *column.shape[1:])), column])
        chunk.rows[i] = (batch, row + 50)
    (episode,) = under_test.take(chunk).episodes
    assert _first_observations(episode) == [0, 1, 2, 3]


def test_a_chunk_that_cannot_be_handed_over_costs_nobody_else(under_test, caplog):
    policy = under_test.policy()
    good = Lane().chunk(policy, 2)
    bad = Lane().chunk(policy, 3)
    for batch, _ in bad.rows:
        del batch.outputs["action_logp"]
    handed = under_test.take(good, bad, Lane().chunk(policy, 4))
    assert [len(episode) for episode in handed.episodes] == [2, 4]
    assert under_test.ledger.snapshot()["discarded_handover_failed"] == 3
    assert "could not be handed over" in caplog.text


def test_a_chunk_that_cannot_even_be_gathered_costs_nobody_else(under_test, caplog):
    policy = under_test.policy()
    bad = Lane().chunk(policy, 3, terminated=True)
    for batch, _ in bad.rows:
        batch.actions.clear()
    handed = under_test.take(Lane().chunk(policy, 2), bad, Lane().chunk(policy, 4))
    assert [len(episode) for episode in handed.episodes] == [2, 4]
    assert [end.length for end in handed.ends] == [3]
    assert under_test.ledger.snapshot() == {
        "received": 0,
        "delivered": 6,
        "discarded_handover_failed": 3,
    }
    assert under_test.handover.errors == 2
    assert "could not be gathered" in caplog.text


@pytest.mark.parametrize("broken", ["row", "last_observation"])
def test_a_chunk_that_is_wrong_about_its_rows_costs_nobody_else(under_test, broken):
    policy = under_test.policy()
    bad = Lane().chunk(policy, 3)
    if broken == "row":
        bad.rows[-1] = (bad.rows[-1][0], 99)
    else:
        bad.last_observation = {"": np.zeros((1, 5), np.float32)}
    handed = under_test.take(Lane().chunk(policy, 2), bad, Lane().chunk(policy, 4))
    assert [_first_observations(episode) for episode in handed.episodes] == [
        [0, 1, 2],
        [0, 1, 2, 3, 4],
    ]
    assert under_test.ledger.snapshot()["discarded_handover_failed"] == 3
    assert under_test.handover.errors == 1


def test_statistics_that_fail_cost_no_experience(caplog):
    config = ppo_config(env_to_module_connector=lambda env, spaces, device: MeanStdFilter())
    under_test = HandOverUnderTest(config)
    count = under_test.views.count
    under_test.views.count = mock.Mock(side_effect=ArithmeticError("no mean today"))
    policy = under_test.policy()
    assert len(under_test.take(Lane().chunk(policy, 3)).episodes) == 1
    assert under_test.ledger.snapshot()["delivered"] == 3
    assert under_test.handover.errors == 1
    assert "no mean today" in caplog.text
    under_test.views.count = count
    under_test.take(Lane().chunk(policy, 2))
    (statistics,) = under_test.pipeline.connectors[0].running()
    assert statistics.num_pushes == 3  # those that failed are not tried for ever


def test_an_episode_is_not_changed_by_what_rllib_does_to_the_one_before(under_test):
    lane, policy = Lane(), under_test.policy()
    (first,) = under_test.take(lane.chunk(policy, 3)).episodes
    first.observations.data[...] = 99
    (second,) = under_test.take(lane.chunk(policy, 3)).episodes
    assert second.get_observations(-1, neg_index_as_lookback=True)[0] == 2
    assert _first_observations(second) == [3, 4, 5, 6]


class _Recorder(RLlibCallback):
    def __init__(self):
        self.events = []

    def on_episode_created(self, *, episode, env, **kwargs):
        assert env is None
        self.events.append(("created", len(episode.observations)))

    def on_episode_start(self, *, episode, **kwargs):
        episode.custom_data["seen"] = []
        self.events.append(("start", len(episode.observations)))

    def on_episode_end(self, *, episode, prev_episode_chunks, **kwargs):
        steps = len(episode) + sum(len(chunk) for chunk in prev_episode_chunks)
        self.events.append(("end", steps))


class _StepRecorder(_Recorder):
    def on_episode_step(self, *, episode, **kwargs):
        episode.custom_data["seen"].append(int(episode.get_observations(-1)[0]))
        self.events.append(("step", episode.t))

    def on_episode_end(self, *, episode, **kwargs):
        super().on_episode_end(episode=episode, **kwargs)
        self.events.append(("seen", episode.custom_data["seen"]))


def _with(callback):
    config = ppo_config().callbacks(callback)
    under_test = HandOverUnderTest(config)
    return under_test, under_test.callbacks._objects[0].events


def test_callbacks_come_in_order_over_chunks():
    under_test, events = _with(_StepRecorder)
    lane, policy = Lane(), under_test.policy()
    under_test.take(lane.chunk(policy, 2))
    under_test.take(lane.chunk(policy, 1, terminated=True))
    assert events == [
        ("created", 0),
        ("start", 1),
        ("step", 1),
        ("step", 2),
        ("step", 3),
        ("end", 3),
        ("seen", [1, 2, 3]),
    ]


@pytest.mark.parametrize("callback", [_Recorder, _StepRecorder])
def test_an_episode_without_an_end_keeps_its_latest_chunks_only(callback):
    under_test, events = _with(callback)
    lane, policy = Lane(), under_test.policy()
    for _ in range(CHUNKS_KEPT + 5):
        under_test.take(lane.chunk(policy, 2))
    assert len(lane.identity.memory.handed) == CHUNKS_KEPT
    under_test.take(lane.chunk(policy, 1, terminated=True))
    assert ("end", 2 * CHUNKS_KEPT + 1) in events


def test_callbacks_come_in_order_where_nobody_watches_steps():
    under_test, events = _with(_Recorder)
    lane, policy = Lane(), under_test.policy()
    under_test.take(lane.chunk(policy, 2))
    (last,) = under_test.take(lane.chunk(policy, 1, terminated=True)).episodes
    assert events == [("created", 0), ("start", 1), ("end", 3)]
    assert last.custom_data == {"seen": []}


def test_watching_steps_changes_nothing_of_what_is_learnt():
    def episodes(config):
        under_test = HandOverUnderTest(config)
        lane = Lane()
        old, new = under_test.policy(1), under_test.policy(2)
        return under_test.take(
            lane.chunk(old, 3, logged=[2]), lane.chunk(new, 2, terminated=True), version=2
        ).episodes

    plain = episodes(ppo_config())
    watched = episodes(ppo_config().callbacks(_StepRecorder))
    for one, other in zip(plain, watched, strict=True):
        assert (one.t_started, one.t, one.is_done) == (other.t_started, other.t, other.is_done)
        assert one.is_numpy
        assert other.is_numpy
        np.testing.assert_array_equal(one.get_observations(), other.get_observations())
        np.testing.assert_array_equal(one.get_actions(), other.get_actions())
        np.testing.assert_array_equal(one.get_rewards(), other.get_rewards())
        assert one.get_infos() == other.get_infos()
        for name in ("action_logp", "action_dist_inputs", "weights_seq_no"):
            np.testing.assert_array_equal(
                one.get_extra_model_outputs(name), other.get_extra_model_outputs(name)
            )
        np.testing.assert_array_equal(
            one.get_extra_model_outputs("state_out")["actor"]["h"],
            other.get_extra_model_outputs("state_out")["actor"]["h"],
        )


def test_a_callback_that_raises_is_logged_and_counted(caplog):
    def fail(**kwargs):
        raise RuntimeError("the user's own bug")

    under_test = HandOverUnderTest(ppo_config().callbacks(on_episode_end=fail))
    (episode,) = under_test.take(Lane().chunk(under_test.policy(), 2, terminated=True)).episodes
    assert len(episode) == 2
    assert under_test.callbacks.errors == 1
    assert "the user's own bug" in caplog.text


def test_the_end_is_called_back_even_if_all_steps_were_handed_over_before():
    under_test, events = _with(_Recorder)
    lane, policy = Lane(), under_test.policy()
    under_test.take(lane.chunk(policy, 2))
    under_test.take(lane.chunk(policy, 0, truncated=True))
    assert events[-1] == ("end", 2)
