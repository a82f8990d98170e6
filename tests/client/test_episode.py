"""The state machine of episodes, without a server: numbers, steps, rewards, ends."""

import numpy as np
import pytest

from client_sdk.batch_track import BatchTrack
from client_sdk.episode_book import ENDED_IDS_REMEMBERED, EpisodeBook
from client_sdk.episode_track import EpisodeTrack
from client_sdk.errors import (
    EpisodeEndedError,
    InvalidValueError,
    NotFiniteError,
    UnknownEpisodeError,
)
from client_sdk.rows import EpisodeOptions, Numbering, Status, end_status
from client_sdk.values import numbers_of_info
from tests.client.support import all_seen

PLAIN = EpisodeOptions()


def track(options=PLAIN, numbering=None):
    return EpisodeTrack("x", numbering or Numbering(), options)


def columns(*values):
    return {"": all_seen(*values)}


def act(episode):
    rows = episode.row(columns(0))
    episode.accepted(rows)
    return rows


def test_steps_count_up_from_0():
    episode = track()
    assert [act(episode).steps for _ in range(3)] == [[0], [1], [2]]


def test_numbers_are_never_reused():
    numbering = Numbering()
    numbers = [track(numbering=numbering).row(None).episodes[0] for _ in range(3)]
    assert numbers == [1, 2, 3]


def test_a_reward_is_sent_once():
    episode = track()
    act(episode)
    episode.add_reward(1.0)
    episode.add_reward(2.0)
    assert act(episode).rewards == [3.0]
    assert act(episode).rewards == []


def test_a_refused_row_gives_back_what_it_carried():
    episode = track()
    act(episode)
    episode.add_reward(1.0)
    episode.add_metrics({"a": 1.0, "b": 1.0})
    refused = episode.row(columns(0))
    episode.add_reward(0.5)
    episode.add_metrics({"b": 2.0})
    episode.refused(refused)
    rows = episode.row(columns(0))
    assert (rows.steps, rows.rewards) == ([1], [1.5])
    assert list(rows.metrics.values()) == [{"a": 1.0, "b": 2.0}]


def test_an_abandoned_episode_counts_the_row_that_is_on_its_way():
    episode = track()
    act(episode)

    class OnItsWay:
        answered = False

    assert episode.last_row().steps == [1]
    episode.pending = OnItsWay()
    rows = episode.last_row()
    assert (rows.steps, list(rows.statuses), rows.observations) == ([2], [Status.ABANDONED], None)


def test_a_restarted_episode_goes_on_under_a_new_number_without_its_reward():
    numbering = Numbering()
    episode = track(numbering=numbering)
    first = act(episode)
    episode.add_reward(5.0)
    assert episode.restarted(None) == (1, 0)
    episode.add_reward(6.0)
    rows = episode.row(columns(1))
    assert rows.episodes != first.episodes
    assert (rows.steps, rows.rewards) == ([0], [])
    assert (rows.begun, rows.resumed) == (rows.episodes, rows.episodes)


def test_a_row_on_its_way_is_said_again_as_the_first_of_the_restarted_episode():
    episode = track()
    act(episode)
    episode.add_reward(5.0)
    episode.add_metrics({"a": 1.0})
    rows = episode.row(columns(1))
    before = rows.episodes
    assert episode.restarted(rows) == (1, 0)
    assert rows.episodes != before
    assert (rows.steps, rows.rewards, rows.resumed) == ([0], [], rows.episodes)
    assert rows.metrics == {rows.episodes[0]: {"a": 1.0}}
    episode.accepted(rows)
    assert episode.row(columns(2)).steps == [1]


def test_an_episode_that_had_not_begun_loses_nothing():
    episode = track()
    rows = episode.row(columns(0))
    assert episode.restarted(rows) == (0, 0)
    assert rows.resumed == ()


@pytest.mark.parametrize(
    ("terminated", "truncated", "status"),
    [
        (False, False, Status.TERMINATED),
        (True, False, Status.TERMINATED),
        (False, True, Status.TRUNCATED),
        (True, True, Status.TERMINATED),
    ],
)
def test_terminated_outweighs_truncated(terminated, truncated, status):
    assert end_status(terminated=terminated, truncated=truncated) is status


# -- batches ---------------------------------------------------------------------------------------


def step(batch, *ended, rewards=None, cut=()):
    terminated = np.isin(np.arange(batch.n), ended)
    truncated = np.isin(np.arange(batch.n), cut)
    rows = batch.rows(columns(*range(batch.n)), rewards, terminated, truncated)
    if rows is not None:
        batch.accepted(rows)
    return rows


def test_a_row_that_ended_begins_another_episode_with_the_next_step():
    batch = BatchTrack(Numbering(), 3, PLAIN)
    first = step(batch)
    last = step(batch, 1, rewards=[1, 2, 3], cut=[2])
    after = step(batch, rewards=[4, 5, 6])
    assert first.episodes == last.episodes == [1, 2, 3]
    assert list(last.statuses) == [Status.RUNNING, Status.TERMINATED, Status.TRUNCATED]
    assert (after.episodes, after.steps, after.rewards) == ([1, 4, 5], [2, 0, 0], [4, 0, 0])
    assert list(after.statuses) == []


def test_a_step_without_ends_says_nothing_about_them():
    batch = BatchTrack(Numbering(), 2, PLAIN)
    assert list(step(batch).statuses) == []
    assert batch.rows(columns(0, 1)).rewards == []


def test_an_episode_of_a_batch_without_a_step_is_left_out():
    batch = BatchTrack(Numbering(), 3, PLAIN)
    rows = step(batch, 1)
    assert rows.index.tolist() == [0, 2]
    assert len(rows.observations[""]) == 2
    assert rows.steps == [0, 0]
    assert step(batch).steps == [1, 0, 1]


def test_a_batch_of_nothing_but_empty_episodes_says_nothing():
    batch = BatchTrack(Numbering(), 2, PLAIN)
    assert step(batch, 0, 1) is None
    assert step(batch).steps == [0, 0]


def test_options_are_announced_for_every_episode_of_a_batch():
    batch = BatchTrack(Numbering(), 2, EpisodeOptions(training_enabled=False))
    assert list(step(batch).begun) == [1, 2]
    assert list(step(batch, 0).begun) == []
    assert list(step(batch).begun) == [3]


def test_faulty_rows_go_on_as_episodes_without_a_beginning():
    batch = BatchTrack(Numbering(), 2, PLAIN)
    step(batch)
    batch.accepted(batch.rows(columns(0, 1)), [1])
    rows = batch.rows(columns(0, 1), [1, 1])
    assert (rows.steps, rows.rewards, list(rows.resumed)) == ([2, 0], [1, 0], [rows.episodes[1]])
    batch.accepted(rows)
    assert list(batch.rows(columns(0, 1)).resumed) == []


def test_a_batch_on_its_way_is_said_again_without_its_ends():
    batch = BatchTrack(Numbering(), 3, PLAIN)
    step(batch)
    step(batch, 2)
    rows = batch.rows(columns(0, 1, 2), [1, 2, 3], [False, True, False])
    assert rows.steps == [2, 2, 0]
    assert batch.restarted(rows) == (1, 1)
    assert rows.index.tolist() == [0, 2]
    assert (rows.steps, rows.rewards, list(rows.statuses)) == ([0, 0], [], [1, 1])
    assert list(rows.resumed) == [rows.episodes[0]]
    batch.accepted(rows)
    assert batch.rows(columns(0, 1, 2)).steps == [1, 0, 1]


def test_an_idle_batch_goes_on_under_new_numbers():
    batch = BatchTrack(Numbering(), 2, PLAIN)
    step(batch)
    step(batch, 1)
    assert batch.restarted(None) == (1, 0)
    rows = batch.rows(columns(0, 1), [5, 5])
    assert (rows.steps, rows.rewards) == ([0, 0], [0, 0])
    assert list(rows.resumed) == [rows.episodes[0]]


def test_episodes_that_end_without_a_step_after_a_restart_leave_nothing_to_resume():
    batch = BatchTrack(Numbering(), 2, PLAIN)
    step(batch)
    batch.restarted(None)
    assert step(batch, 0, 1) is None
    assert list(step(batch).resumed) == []


def test_a_refused_first_row_keeps_its_number():
    batch = BatchTrack(Numbering(), 2, PLAIN)
    first = batch.rows(columns(0, 1))
    batch.refused(first)
    assert step(batch).episodes == first.episodes == [1, 2]


def test_a_batch_takes_back_first_rows_that_were_refused():
    batch = BatchTrack(Numbering(), 2, PLAIN)
    batch.refused(batch.rows(columns(0, 1)))
    assert batch.abandon(batch.running()).episodes == [1, 2]
    assert batch.running() == []


def test_abandoned_rows_begin_anew():
    batch = BatchTrack(Numbering(), 3, PLAIN)
    assert batch.abandon([0, 1]) is None
    step(batch)
    rows = batch.abandon([2, 0, 2])
    assert (rows.episodes, rows.steps) == ([3, 1], [1, 1])
    assert list(rows.statuses) == [Status.ABANDONED] * 2
    assert step(batch).steps == [0, 1, 0]
    with pytest.raises(InvalidValueError, match="rows"):
        batch.abandon([3])


def test_rewards_whose_sum_overflows_are_finite_all_the_same():
    batch = BatchTrack(Numbering(), 2, PLAIN)
    step(batch)
    assert step(batch, rewards=[3e38, 3e38]).rewards == [3e38, 3e38]
    for bad in (float("-inf"), float("nan"), -4e38):
        with pytest.raises(NotFiniteError, match=r"rewards\[1\]"):
            step(batch, rewards=[0.0, bad])


# -- the book --------------------------------------------------------------------------------------


def test_ended_episodes_are_told_from_unknown_ones_until_they_are_forgotten():
    book = EpisodeBook(Numbering())
    for number in range(ENDED_IDS_REMEMBERED + 1):
        book.end(book.start(f"{number}", training_enabled=True, explore=True))
    with pytest.raises(EpisodeEndedError):
        book.find("1")
    with pytest.raises(UnknownEpisodeError):
        book.find("0")


def test_only_numbers_of_an_info_are_metrics():
    info = {"a": 1, "b": np.float32(0.5), "c": True, "d": np.array(2), "e": "x", "f": [1], 7: 3}
    assert numbers_of_info(info) == {"a": 1.0, "b": 0.5, "c": 1.0, "d": 2.0, "7": 3.0}
    assert numbers_of_info(None) == {}
    with pytest.raises(InvalidValueError, match="info"):
        numbers_of_info([1, 2])
